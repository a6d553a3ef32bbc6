"""Starts kernels, and records the bytes that they read and write.

Every kernel starts through ``launch``, which is told what it writes and, unless that is every other tensor, what it
reads. A ``traffic`` context sums the bytes. On meta tensors nothing else happens, so a whole network's traffic can be
counted without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from fused_resnet.base.scoped import scoped

# Triton decides at import whether kernels are compiled or interpreted: TRITON_INTERPRET=1 before the first import.
INTERPRET: bool = triton.knobs.runtime.interpret
# Tensors with at least this many elements need 64-bit offsets; tiles reach a little beyond the last element.
_WIDE = 2**31 - 2**24


@dataclass
class Launch:
    """One kernel launch: its name and the bytes it reads and writes."""

    kernel: str
    read: int
    written: int


@dataclass
class Traffic:
    """The launches within a ``traffic`` context, in order."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The bytes read and written."""
        return sum(launch.read + launch.written for launch in self.launches)


_traffic: ContextVar[Traffic | None] = ContextVar("fused_resnet_traffic", default=None)
_observer: ContextVar[Callable[..., None] | None] = ContextVar("fused_resnet_launches", default=None)


def traffic() -> AbstractContextManager[Traffic]:
    """Records every launch of this thread within the context."""
    return scoped(_traffic, Traffic())


def observe(call: Callable[..., None]) -> AbstractContextManager[Callable[..., None]]:
    """Calls ``call(kernel, args, constants)`` for each launch of this thread in the context, on meta tensors too."""
    return scoped(_observer, call)


def _bytes(operands: Sequence[Tensor | int | None]) -> int:
    sizes = (t.numel() * t.element_size() if isinstance(t, Tensor) else t for t in operands)
    return sum(size for size in sizes if size is not None)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    writes: Sequence[Tensor | int | None],
    reads: Sequence[Tensor | int | None] | None = None,
    **constants: Any,
) -> None:
    """kernel[grid](*args, **constants), recorded.

    Args:
        writes, reads: tensors or bytes, each counted once; None in their place: the operand is absent. By default the
            kernel reads every tensor of ``args`` that it does not write.
    """
    if (record := _traffic.get()) is not None:
        if reads is None:
            reads = [t for t in args if isinstance(t, Tensor) and not any(t is written for written in writes)]
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        record.launches.append(Launch(name, _bytes(reads), _bytes(writes)))
    if (observer := _observer.get()) is not None:
        observer(kernel, args, constants)
    # forward and backward compute z by one expression: both must contract it, whatever Triton's default
    constants["enable_fp_fusion"] = True
    device = next(t.device for t in args if isinstance(t, Tensor))
    if device.type == "meta" or 0 in grid:
        return
    if device.type != "cuda":
        kernel[grid](*args, **constants)
    elif device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _start(kernel, device.index, grid, args, constants)
    else:
        _start(kernel, device.index, grid, args, constants)


# (kernel, device, the properties of arguments that decide the machine code) -> compiled kernel, constants in order
_compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}


def _start(kernel: Any, device: int, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Starts the machine code of an earlier launch with the same key.

    Triton's own launcher binds and specialises every argument by name each time. That costs the host more than most of
    these kernels take.
    """
    key = (kernel, device, tuple(map(_special, args)), tuple(constants.items()))
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, rest = found
    compiled[(*grid, 1, 1)[:3]](*args, *rest)


def _special(a: Any) -> Any:
    """The properties of an argument on which Triton specialises.

    Of a tensor: its dtype, its alignment and whether 32 bits reach all of it. Of an integer: whether it is 1, whether
    16 divides it, and its width.
    """
    if isinstance(a, Tensor):
        return a.dtype, a.data_ptr() % 16 == 0, a.numel() * a.element_size() < 2**31
    if type(a) is int:
        return a == 1, a % 16 == 0, -(2**31) <= a < 2**31
    return None if a is None else type(a)


def wide(*tensors: Tensor | None) -> bool:
    """Whether an offset into one of the tensors can exceed 32 bits."""
    return any(t is not None and t.numel() >= _WIDE for t in tensors)


def empty_nhwc(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [N, C, H, W] tensor whose memory is NHWC for all sizes."""
    n, c, h, w = shape
    return torch.empty((n, h, w, c), dtype=dtype or like.dtype, device=like.device).permute(0, 3, 1, 2)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
