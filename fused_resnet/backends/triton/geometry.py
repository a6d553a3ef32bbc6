"""A convolution's sizes and operands in the form that kernels take.

Memory is NHWC, weights are KRSC (a channels_last [K, C, R, S] tensor). A kernel is
compiled for every size except the batch: networks have few shapes, and with known loop bounds the compiler keeps the
matrix instructions in flight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends import Norm
from fused_resnet.backends.triton.runtime import cdiv
from fused_resnet.spec import ConvSpec


@dataclass(frozen=True)
class Geometry:
    """y [N, OH, OW, K] = conv(x [N, H, W, C], weight [K, R, S, C])."""

    n: int
    c: int
    h: int
    w: int
    k: int
    oh: int
    ow: int
    r: int
    s: int
    conv: ConvSpec

    @staticmethod
    def of(x: Tensor, weight: Tensor, conv: ConvSpec) -> Geometry:
        """The sizes of these tensors."""
        n, c, h, w = x.shape
        k, _, r, s = weight.shape
        p, q = conv.out_size((h, w), (r, s))
        return Geometry(n, c, h, w, k, p, q, r, s, conv)

    @property
    def m(self) -> int:
        """The number of output pixels."""
        return self.n * self.oh * self.ow

    @property
    def taps(self) -> int:
        return self.r * self.s

    @property
    def pointwise(self) -> bool:
        """Whether it is a plain matrix product: pixel m of y depends only on pixel m of x."""
        return self.taps == 1 and self.conv.stride == (1, 1) and not self.padded

    @property
    def padded(self) -> bool:
        """Whether a tap can lie outside the image."""
        return self.conv.padding != (0, 0)

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.k, self.oh, self.ow

    def x_bytes(self, x: Tensor) -> int:
        """The bytes of x that the taps read, each counted once: a 1x1 of stride 2 reads a quarter."""
        rows, columns = (min(a.limit, a.size * min(a.taps, a.step)) for a in self.axes())
        return self.n * rows * columns * self.c * x.element_size()

    def axes(self) -> tuple[Axis, Axis]:
        """The places of the taps of y's rows and columns in x."""
        (top, left), (dil_h, dil_w), (stride_h, stride_w) = self.conv.padding, self.conv.dilation, self.conv.stride
        rows = Axis(-top, dil_h, self.r, stride_h, self.oh, self.h)
        return rows, Axis(-left, dil_w, self.s, stride_w, self.ow, self.w)

    def constants(self) -> dict[str, int | bool]:
        """The compile-time arguments of the kernels that iterate over the pixels of y."""
        (stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w) = self.conv.stride, self.conv.padding, self.conv.dilation
        return dict(
            C=self.c, K=self.k, H=self.h, W=self.w, OH=self.oh, OW=self.ow, R=self.r, S=self.s,
            STRIDE_H=stride_h, STRIDE_W=stride_w, PAD_H=pad_h, PAD_W=pad_w, DIL_H=dil_h, DIL_W=dil_w,
            POINTWISE=self.pointwise,
        )  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """The input's rows (or columns) h = phase + stride*i, i < size, and the taps that reach them.

    Tap r of output row p reads h = p*stride - padding + r*dilation. In one phase these taps are r = tap + j*tap_step,
    j < taps, and the output row is p = i + first - j*step: a convolution of stride 1. A phase may have no tap.
    """

    phase: int
    size: int
    tap: int
    taps: int
    tap_step: int
    first: int
    step: int
    masked: bool

    @staticmethod
    def all(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> list[Phase]:
        """The phases of one axis with an input of ``size`` and an output of ``out``."""
        phases = []
        for phase in range(min(stride, size)):
            rows = cdiv(size - phase, stride)
            taps = [r for r in range(kernel) if (phase + padding - r * dilation) % stride == 0]
            if not taps:
                phases.append(Phase(phase, rows, 0, 0, 1, 0, 0, False))
                continue
            tap_step = taps[1] - taps[0] if len(taps) > 1 else 1
            first = (phase + padding - taps[0] * dilation) // stride
            step = tap_step * dilation // stride if len(taps) > 1 else 0
            masked = first - (len(taps) - 1) * step < 0 or rows - 1 + first >= out
            phases.append(Phase(phase, rows, taps[0], len(taps), tap_step, first, step, masked))
        return phases

    def axis(self, out: int) -> Axis:
        """The places of its taps in an output of ``out`` rows."""
        return Axis(self.first, -self.step, self.taps, 1, self.size, out)

    def constants(self) -> tuple[int, ...]:
        """The compile-time arguments of the dgrad kernel."""
        return self.phase, self.tap, self.taps, self.tap_step, self.first, self.step


class Axis(NamedTuple):
    """The places of one axis's taps: tap j of position i is at start + j*tap_step + i*step, inside if in [0, limit)."""

    start: int
    tap_step: int
    taps: int
    step: int
    size: int
    limit: int

    def inside(self, device: torch.device) -> Tensor:
        """[taps, size], bool."""
        taps = self.start + self.tap_step * torch.arange(self.taps, device=device)
        at = taps[:, None] + self.step * torch.arange(self.size, device=device)
        return (at >= 0) & (at < self.limit)


def inside_table(places: tuple[tuple[Axis, Axis], ...], device: torch.device) -> Tensor:
    """int32 [taps * pixels of an image] of each (rows, columns): 1 if the tap of the pixel lies in the image.

    The mask is loaded, not computed: then the compiler moves the masked operand from shared memory straight to the
    matrix unit. On sm_90 this saves a sixth of the registers and shared memory in 3x3 convolutions.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _inside_table(places, device)  # a CUDA graph owns the memory
    return _kept_table(places, device)


@lru_cache(maxsize=512)
def _kept_table(places: tuple[tuple[Axis, Axis], ...], device: torch.device) -> Tensor:
    table = _inside_table(places, device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # another stream may use the table next
    return table


def _inside_table(places: tuple[tuple[Axis, Axis], ...], device: torch.device) -> Tensor:
    tables = (r.inside(device)[:, None, :, None] & c.inside(device)[None, :, None, :] for r, c in places)
    return torch.cat([table.flatten() for table in tables]).to(torch.int32)


def vectors(norm: Norm | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A norm's scale, shift and center, as kernels take them."""
    return (norm.scale, norm.shift, norm.center) if norm is not None else (None, None, None)


def nhwc(t: Tensor) -> Tensor:
    """The tensor itself if its memory is NHWC, otherwise an NHWC copy."""
    return t.contiguous(memory_format=torch.channels_last)


def krsc(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the activations' dtype, channels_last, as kernels read it. A copy if it is not (fp32 masters)."""
    return nhwc(weight.to(dtype))
