"""Backends implement some of the primitives of a chain, and give the reason where they refuse a case.

A backend is a module with ``refuse`` and any of the functions of ``Primitives``. Every tensor is [N, C, H, W], dense,
NCHW or channels_last. Per-channel vectors are [C] in ``vector_dtype``. Every function returns new tensors and changes
none of its inputs except ``add``. The planner calls ``refuse(primitive, case)`` before a primitive; a reason means no.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_resnet.spec import Act, ConvSpec, PoolSpec


class Norm(NamedTuple):
    """A unit's BatchNorm as vectors: z = scale*y + shift; ``center`` is the mean that it subtracts, ``rstd`` 1/std."""

    scale: Tensor
    shift: Tensor
    center: Tensor
    rstd: Tensor


class Prologue(NamedTuple):
    """Applied to a raw convolution output when it is loaded: act(scale*y + shift)."""

    norm: Norm
    act: Act


class Closing(NamedTuple):
    """The step of the backward that takes a gradient g into a unit, or into a chain through its add.

    dz = g*act'(z), z = scale*y + shift [+ summand, or + summand_norm of it].
    """

    y: Tensor
    norm: Norm
    act: Act
    summand: Tensor | None = None
    summand_norm: Norm | None = None

    @staticmethod
    def before(x: Tensor, prologue: Prologue | None, closing: Closing | None) -> Closing | None:
        """The closing before a convolution's input x. With a prologue it is that of the unit whose raw output x is."""
        return closing if prologue is None else Closing(x, *prologue)


class DyCoefficients(NamedTuple):
    """dy = a*dz + b*(y - center) + c, the gradient through BatchNorm; frozen BN has b = c = None (zero)."""

    a: Tensor
    b: Tensor | None
    c: Tensor | None
    center: Tensor


class Sums(NamedTuple):
    """Per channel over N, H, W: dz = sum dz; dz_y = sum dz*(y - center)."""

    dz: Tensor
    dz_y: Tensor


class Case(NamedTuple):
    """The properties of a call by which backends decide whether they take it."""

    device: str
    dtype: torch.dtype
    channels_last: bool
    conv: ConvSpec | None = None
    kernel: tuple[int, int] = (1, 1)


class Primitives(Protocol):
    """The functions that a backend may offer. Names follow ATen."""

    def refuse(self, primitive: str, case: Case) -> str | None:
        """The reason why this case is refused, or None."""

    def conv_bias_act(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvSpec, act: Act, residual: Tensor | None
    ) -> Tensor:
        """act(conv(x, W) + b [+ residual]): an inference unit, BatchNorm folded into W and b."""

    def conv_stats(
        self, x: Tensor, weight: Tensor, conv: ConvSpec, prologue: Prologue | None, stats: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y = conv(prologue(x), W), zero padding after the prologue; mean and biased variance of y if ``stats``."""

    def bn_stats(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance per channel."""

    def bn_act(
        self, y: Tensor, norm: Norm, act: Act, residual: Tensor | None = None, residual_norm: Norm | None = None
    ) -> Tensor:
        """act(scale*y + shift [+ residual, or + residual_norm of it])."""

    def bn_act_backward(
        self,
        dout: Tensor,
        y: Tensor,
        norm: Norm,
        act: Act,
        residual: Tensor | None = None,
        residual_norm: Norm | None = None,
    ) -> tuple[Tensor, Sums, Sums | None]:
        """dz = dout*act'(z), its sums with y, and its sums with the residual if that has a norm of its own."""

    def bn_backward(self, dz: Tensor, y: Tensor, coef: DyCoefficients) -> Tensor:
        """dy, for a unit whose convolution is not part of the chain."""

    def conv_backward(
        self,
        dz: Tensor,
        y: Tensor,
        coef: DyCoefficients,
        x: Tensor,
        prologue: Prologue | None,
        weight: Tensor,
        conv: ConvSpec,
        need_input: bool,
        need_weight: bool,
        add: Tensor | None,
        closing: Closing | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Sums | None, Sums | None]:
        """The gradient of the input and dW. dy is formed from (dz, y).

        With a prologue, x is the previous unit's raw y. The input's gradient is then that unit's dz = da*act'(z), with
        its sums. Without a prologue, ``add`` (the gradient of x from another path) is added to it; the result may
        overwrite ``add`` unless that is dz itself. If ``closing`` made x, the result is dz = (da + add)*act'(z), with
        the sums that ``bn_act_backward`` returns. A backend that can't do this in one pass calls its own
        ``bn_act_backward``.
        """

    def bn_act_max_pool(self, y: Tensor, norm: Norm, act: Act, pool: PoolSpec) -> tuple[Tensor, Tensor]:
        """max-pool of act(scale*y + shift), and each maximum's position in its window (uint8, row-major)."""

    def bn_act_max_pool_backward(
        self, dout: Tensor, argmax: Tensor, y: Tensor, norm: Norm, act: Act, pool: PoolSpec
    ) -> tuple[Tensor, Sums]:
        """dz = act'(z) * (dout at the positions of the maxima, else 0), and its sums with y."""

    def bn_fold(
        self,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        conv_bias: Tensor | None,
        eps: float,
    ) -> Norm:
        """BatchNorm as vectors, in ``vector_dtype`` of the mean's: scale = weight*rstd, shift = bias - center*scale.

        A convolution's bias is never added to y. With running statistics it is subtracted from the mean instead."""

    def bn_coefficients(self, norm: Norm, sums: Sums, count: int | None) -> tuple[Tensor, DyCoefficients]:
        """dgamma = rstd*sums.dz_y, and A, B, C of dy over ``count`` values per channel; None: frozen."""


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and per-channel vectors: float32, or float64 for float64 tensors."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allow_tf32(dtype: torch.dtype) -> bool:
    """Whether float32 convolutions may round their operands to tf32, by PyTorch's own setting.

    This newer setting reflects ``torch.backends.cudnn.allow_tf32``. Reading the old one raises after the newer one has
    been used.
    """
    if dtype != torch.float32:
        return False
    setting: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return setting == "tf32"
