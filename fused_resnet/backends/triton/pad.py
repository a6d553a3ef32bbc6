"""A stem's few channels, padded to a multiple of four."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends.triton.runtime import cdiv, empty_nhwc, launch, wide

_BLOCK = 2048


@triton.jit
def pad_channels_kernel(
    x_ptr, out_ptr, N, C: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """out[pixel, c] = x[pixel, c], 0 where c >= C.

    Tile: BLOCK elements of out. Traffic: x once, out once.
    """
    start = tl.program_id(0)
    if WIDE:
        start = start.to(tl.int64)
    i = start * BLOCK + tl.arange(0, BLOCK)
    pixel = i // PADDED
    c = i - pixel * PADDED
    value = tl.load(x_ptr + pixel * C + c, mask=(i < N) & (c < C), other=0.0)
    tl.store(out_ptr + i, value, mask=i < N)


def pad_channels(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x and weight, padded with channels of zeros if they have fewer than eight channels and no multiple of four.

    Three 16-bit channels are loaded element by element: they are too small for the asynchronous copies that keep the
    matrix units busy. Four channels are one copy of 8 bytes. This gains more than reading x once more costs.

    Args:
        x: NHWC in memory.
    """
    c = x.shape[1]
    if c >= 8 or c % 4 == 0:
        return x, weight
    padded = 4 * cdiv(c, 4)
    out = empty_nhwc(x, (x.shape[0], padded, *x.shape[2:]))
    launch(
        pad_channels_kernel, (cdiv(out.numel(), _BLOCK),), x, out, out.numel(),
        C=c, PADDED=padded, WIDE=wide(out), BLOCK=_BLOCK, writes=(out,),
    )  # fmt: skip
    return out, F.pad(weight, (0, 0, 0, 0, 0, padded - c))
