"""Images so small that a module's own forward is faster than its chains: the calls cost more than the passes they save.

On a CPU a chain saves passes over the raw outputs of its convolutions, which take time in proportion to their values,
shared by the threads, and costs calls, which take the same time for one value as for a million. Where a module has
fewer values per call and thread than ``SMALL`` it runs PyTorch's own operators, as it did before ``fuse``. For float32
alone. Whoever asks for a backend by name gets it at any size.

Measured with torch 2.13 on one AVX-512 core, blocks of ResNets and MobileNets in rows and single convolutions, 16 to
512 channels: in training chains are 0.9 to 1.0 times as fast as PyTorch around 150,000 values per call and 1.15 to 1.3
times around 600,000; without gradients 0.85 to 0.95 and 1.1 to 1.25 times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from fused_resnet.backends import forced

# Values per call and thread from which chains pay: wherever gradients are recorded, without them, and of the one
# convolution in question when frozen.
SMALL = {"training": 220_000, "evaluation": 260_000, "frozen": 32_768}
# A unit is one call; a chain costs as much as so many more, called alone or by a row.
ALONE, IN_ROW = 2, 1
_always: ContextVar[bool] = ContextVar("fused_resnet_always", default=False)


def weight(conv: nn.Conv2d | None) -> float:
    """What a value of a convolution's output counts: half behind a depthwise one, more behind a 3x3 one that runs by
    Winograd's algorithm, which saves multiplications with every input channel."""
    if conv is None or conv.groups > 1:
        return 1.0 if conv is None or conv.groups < conv.in_channels else 0.5
    wide = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and min(conv.in_channels, conv.out_channels) >= 64
    return 1 + conv.in_channels / 64 if wide else 1.0


def least_values(kind: str) -> int:
    """Values per call from which chains pay with this many threads."""
    return SMALL[kind] * torch.get_num_threads()


def is_small(x: Tensor, values: float, kind: str) -> bool:
    """Whether PyTorch's own operators are the better choice for ``values`` per call, made from x."""
    return (  # in a few hundred nanoseconds: a small module's own forward takes some ten microseconds
        values < SMALL[kind] * torch.get_num_threads()
        and x.dtype is torch.float32
        and x.is_cpu
        and not (_always.get() or forced() is not None or torch.is_autocast_enabled("cpu"))
    )


@contextmanager
def chains_always() -> Iterator[None]:
    """Within it chains run at any size: for checks of what they compute."""
    token = _always.set(True)
    try:
        yield
    finally:
        _always.reset(token)
