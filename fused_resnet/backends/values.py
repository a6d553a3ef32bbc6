"""The types of primitives' arguments, and the properties of a call by which backends decide.

Every tensor is an image [N, C, H, W] or a volume [N, C, D, H, W], dense, contiguous or channels_last. Per-channel
vectors are [C] in ``vector_dtype``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.base.layouts import is_channels_last
from fused_resnet.spec import Act, ConvSpec, PoolSpec


# ``key``: the hashable properties on which a measurement depends; ``text``: their text in the planner's file.
class Norm(NamedTuple):
    """A unit's BatchNorm as vectors: z = scale*y + shift; ``center`` is the mean that it subtracts, ``rstd`` 1/std."""

    scale: Tensor
    shift: Tensor
    center: Tensor
    rstd: Tensor

    @property
    def key(self) -> Any:
        return True

    @property
    def text(self) -> str:
        return "norm"


def vectors_of(norm: Norm | None, count: int) -> list[Tensor]:
    """The first ``count`` of a norm's scale, shift and center, as csrc's operators take them; none without a norm."""
    return [] if norm is None else list(norm[:count])


class Prologue(NamedTuple):
    """Applied to a raw convolution output when it is loaded: act(scale*y + shift)."""

    norm: Norm
    act: Act

    @property
    def key(self) -> Any:
        return self.act

    @property
    def text(self) -> str:
        return f"prologue({self.act.text})"


class Closing(NamedTuple):
    """The step of the backward that takes a gradient g into a unit, or into a chain through its add.

    dz = g*act'(z), z = scale*y + shift [+ summand, or + summand_norm of it].
    """

    y: Tensor
    norm: Norm
    act: Act
    summand: Tensor | None = None
    summand_norm: Norm | None = None

    @property
    def key(self) -> Any:
        return self.act, self.summand is None, self.summand_norm is None

    @property
    def text(self) -> str:
        summand = "" if self.summand is None else ",summand" if self.summand_norm is None else ",norm"
        return f"closing({self.act.text}{summand})"


class DyCoefficients(NamedTuple):
    """dy = a*dz + b*(y - center) + c, the gradient through BatchNorm; frozen BN has b = c = None (zero)."""

    a: Tensor
    b: Tensor | None
    c: Tensor | None
    center: Tensor

    @property
    def vectors(self) -> list[Tensor]:
        """Those that there are, as csrc's operators take them."""
        return [self.a] if self.b is None or self.c is None else [self.a, self.b, self.c, self.center]

    @property
    def key(self) -> Any:
        return self.b is None

    @property
    def text(self) -> str:
        return "frozen" if self.b is None else "batch"


class Sums(NamedTuple):
    """Per channel over N, H, W: dz = sum dz; dz_y = sum dz*(y - center)."""

    dz: Tensor
    dz_y: Tensor

    @property
    def key(self) -> Any:
        return True

    @property
    def text(self) -> str:
        return "sums"


_TUPLES = (Norm, Prologue, Closing, DyCoefficients, Sums)


def key_of(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.is_contiguous()
    return argument.key if isinstance(argument, _TUPLES) else argument


def text_of(argument: Any) -> str:
    """The text of a primitive's argument in a signature. Batches are rounded up to a power of two."""
    if isinstance(argument, Tensor):
        shape = list(argument.shape)
        if argument.dim() >= 4 and shape[0] > 0:
            shape[0] = 1 << (shape[0] - 1).bit_length()
        layout = "nhwc" if is_channels_last(argument) else ""
        return f"{str(argument.dtype).removeprefix('torch.')}{layout}{'x'.join(map(str, shape))}"
    if isinstance(argument, (*_TUPLES, ConvSpec, Act, PoolSpec)):
        return argument.text
    return "-" if argument is None else str(argument)


class Case(NamedTuple):
    """The properties of a call by which backends decide whether they take it.

    ``volume``: its images have three dimensions.
    """

    device: str
    dtype: torch.dtype
    channels_last: bool
    conv: ConvSpec | None = None
    kernel: tuple[int, ...] = (1, 1)
    volume: bool = False

    @staticmethod
    def of(x: Tensor, conv: ConvSpec | None = None, weight: Tensor | None = None) -> Case:
        """The case of a call, from its tensors."""
        kernel = tuple(weight.shape[2:]) if weight is not None else (1, 1)
        return Case(x.device.type, x.dtype, is_channels_last(x), conv, kernel, x.dim() == 5)


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
