"""The primitives of a chain: the types of their arguments, and one class of calls for each.

A call is a value: ``BnAct(y, norm, act)``. A backend's method of the same name takes it (``backend.py``).
Every tensor is [N, C, H, W], dense, NCHW or channels_last. Per-channel vectors are [C] in ``vector_dtype``. Every
primitive returns new tensors and changes none of its arguments except ``add``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar, cast, dataclass_transform

import torch
from torch import Tensor

from fused_resnet.spec import Act, ConvSpec, PoolSpec

if TYPE_CHECKING:
    from fused_resnet.backends.backend import Backend

C = TypeVar("C")
R = TypeVar("R")


# ---------------------------------------------------------------------------------------------------- arguments
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


def _key_of(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.is_contiguous()
    return argument.key if isinstance(argument, _TUPLES) else argument


def text_of(argument: Any) -> str:
    """The text of a primitive's argument in a signature. Batches are rounded up to a power of two."""
    if isinstance(argument, Tensor):
        shape = list(argument.shape)
        if argument.dim() == 4 and shape[0] > 0:
            shape[0] = 1 << (shape[0] - 1).bit_length()
        layout = "nhwc" if argument.dim() == 4 and argument.is_contiguous(memory_format=torch.channels_last) else ""
        return f"{str(argument.dtype).removeprefix('torch.')}{layout}{'x'.join(map(str, shape))}"
    if isinstance(argument, (*_TUPLES, ConvSpec, Act, PoolSpec)):
        text: str = argument.text
        return text
    return "-" if argument is None else str(argument)


class Case(NamedTuple):
    """The properties of a call by which backends decide whether they take it."""

    device: str
    dtype: torch.dtype
    channels_last: bool
    conv: ConvSpec | None = None
    kernel: tuple[int, int] = (1, 1)

    @staticmethod
    def of(x: Tensor, conv: ConvSpec | None = None, weight: Tensor | None = None) -> Case:
        """The case of a call, from its tensors."""
        kernel = (weight.shape[2], weight.shape[3]) if weight is not None else (1, 1)
        return Case(x.device.type, x.dtype, x.is_contiguous(memory_format=torch.channels_last), conv, kernel)


# ---------------------------------------------------------------------------------------------------- calls
@dataclass_transform(eq_default=False, frozen_default=True)
def _call(cls: type[C]) -> type[C]:
    """A dataclass that is frozen for type checkers alone: to make a frozen one takes seven times as long."""
    return dataclass(eq=False, repr=False)(cls)


class Call(Generic[R]):
    """A call of a primitive, with a result of type R.

    Attributes:
        name: the primitive, and the backends' method. vector: it works on vectors of C elements only. A backend that
            lacks such a primitive, or refuses the case, uses aten's, under ``use_backend`` too.
    """

    name: ClassVar[str]
    vector: ClassVar[bool] = False

    def on(self, backend: Backend) -> R:
        """Runs the call on a backend."""
        return cast(R, getattr(backend, self.name)(self))

    @property
    def like(self) -> Tensor:
        """The tensor whose device, dtype and layout decide who takes the call: the first argument."""
        first: Tensor = next(iter(vars(self).values()))
        return first

    @property
    def case(self) -> Case:
        """The properties by which backends decide."""
        return Case.of(self.like)

    @property
    def tf32(self) -> bool:
        """Whether float32 products run in tf32, with another kernel and other times."""
        return False

    @property
    def about(self) -> tuple[ConvSpec | None, Any]:
        """What ``explain`` knows a call by: the convolution and its weight's shape, or None and the channels."""
        return None, self.like.shape[1]

    @property
    def arguments(self) -> list[Any]:
        """The arguments in order."""
        return [*vars(self).values()]

    @property
    def key(self) -> Any:
        """The key of a choice in this process."""
        return self.name, self.like.device, self.tf32, *map(_key_of, self.arguments)

    @property
    def signature(self) -> str:
        """The key of a measurement in the planner's file."""
        return " ".join([self.name, *map(text_of, self.arguments), *(["tf32"] if self.tf32 else [])])

    @property
    def parts(self) -> tuple[Call[R], Call[R]] | None:
        """Two calls that together do the same, if there are such: for the input's gradient, and for the weight's."""
        return None

    def replace(self: C, **changes: Any) -> C:
        """The same call, but for some arguments."""
        return type(self)(**vars(self) | changes)

    def again(self) -> Call[R]:
        """The same call, with copies of the arguments that a backend may overwrite."""
        return self


class _Convolution(Call[R]):
    """A call with a convolution of x, or its gradients."""

    x: Tensor
    weight: Tensor
    conv: ConvSpec

    @property
    def like(self) -> Tensor:
        return self.x

    @property
    def case(self) -> Case:
        return Case.of(self.x, self.conv, self.weight)

    @property
    def tf32(self) -> bool:
        return self.x.device.type == "cuda" and allow_tf32(self.x.dtype)

    @property
    def about(self) -> tuple[ConvSpec | None, Any]:
        return self.conv, tuple(self.weight.shape)


@_call
class ConvBiasAct(_Convolution[Tensor]):
    """act(conv(x, W) + b [+ residual]): an inference unit, BatchNorm folded into W and b."""

    name: ClassVar[str] = "conv_bias_act"
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    conv: ConvSpec
    act: Act
    residual: Tensor | None


@_call
class ConvBnAct(_Convolution[Tensor]):
    """act(scale*conv(x, W) + shift [+ residual]): an inference unit that is not frozen, BatchNorm not folded into W.

    W may change before the next call. On a CPU folding and packing it costs more than the pass that they save, over an
    output still in cache. Where no backend offers this, W is folded in every call.
    """

    name: ClassVar[str] = "conv_bn_act"
    x: Tensor
    weight: Tensor
    norm: Norm
    conv: ConvSpec
    act: Act
    residual: Tensor | None


@_call
class ConvStats(_Convolution[tuple[Tensor, Tensor | None, Tensor | None]]):
    """y = conv(prologue(x), W), zero padding after the prologue; mean and biased variance of y if ``stats``."""

    name: ClassVar[str] = "conv_stats"
    x: Tensor
    weight: Tensor
    conv: ConvSpec
    prologue: Prologue | None
    stats: bool


@_call
class BnStats(Call[tuple[Tensor, Tensor]]):
    """Mean and biased variance per channel."""

    name: ClassVar[str] = "bn_stats"
    y: Tensor


@_call
class BnAct(Call[Tensor]):
    """act(scale*y + shift [+ residual, or + residual_norm of it])."""

    name: ClassVar[str] = "bn_act"
    y: Tensor
    norm: Norm
    act: Act
    residual: Tensor | None = None
    residual_norm: Norm | None = None


@_call
class BnActBackward(Call[tuple[Tensor, Sums, Sums | None]]):
    """dz = dout*act'(z), its sums with y, and its sums with the residual if that has a norm of its own."""

    name: ClassVar[str] = "bn_act_backward"
    dout: Tensor
    y: Tensor
    norm: Norm
    act: Act
    residual: Tensor | None = None
    residual_norm: Norm | None = None


@_call
class BnBackward(Call[Tensor]):
    """dy, for a unit whose convolution is not part of the chain."""

    name: ClassVar[str] = "bn_backward"
    dz: Tensor
    y: Tensor
    coef: DyCoefficients


@_call
class ConvBackward(_Convolution[tuple[Tensor | None, Tensor | None, Sums | None, Sums | None]]):
    """The gradient of the input and dW. dy is formed from (dz, y).

    With a prologue, x is the previous unit's raw y. The input's gradient is then that unit's dz = da*act'(z), with its
    sums. Without a prologue, ``add`` (the gradient of x from another path) is added to it; the result may overwrite
    ``add`` unless that is dz itself. If ``closing`` made x, the result is dz = (da + add)*act'(z), with the sums that
    ``BnActBackward`` returns. A backend that can't do this in one pass calls its own ``bn_act_backward``.
    """

    name: ClassVar[str] = "conv_backward"
    dz: Tensor
    y: Tensor
    coef: DyCoefficients
    x: Tensor
    prologue: Prologue | None
    weight: Tensor
    conv: ConvSpec
    need_input: bool
    need_weight: bool
    add: Tensor | None
    closing: Closing | None = None

    @property
    def before(self) -> Closing | None:
        """The closing before x. With a prologue it is that of the unit whose raw output x is."""
        return self.closing if self.prologue is None else Closing(self.x, *self.prologue)

    @property
    def parts(self) -> tuple[ConvBackward, ConvBackward] | None:
        if not (self.need_input and self.need_weight):
            return None
        return self.replace(need_weight=False), self.replace(need_input=False, add=None, closing=None)

    def again(self) -> ConvBackward:
        if self.add is None:
            return self
        return self.replace(add=self.add.clone(memory_format=torch.preserve_format))


@_call
class BnActMaxPool(Call[tuple[Tensor, Tensor]]):
    """max-pool of act(scale*y + shift), and each maximum's position in its window (uint8, row-major)."""

    name: ClassVar[str] = "bn_act_max_pool"
    y: Tensor
    norm: Norm
    act: Act
    pool: PoolSpec


@_call
class BnActMaxPoolBackward(Call[tuple[Tensor, Sums]]):
    """dz = act'(z) * (dout at the positions of the maxima, else 0), and its sums with y."""

    name: ClassVar[str] = "bn_act_max_pool_backward"
    dout: Tensor
    argmax: Tensor
    y: Tensor
    norm: Norm
    act: Act
    pool: PoolSpec


@_call
class BnFold(Call[Norm]):
    """BatchNorm as vectors, in ``vector_dtype`` of the mean's: scale = weight*rstd, shift = bias - center*scale.

    A convolution's bias is never added to y. With running statistics it is subtracted from the mean instead.
    """

    name: ClassVar[str] = "bn_fold"
    vector: ClassVar[bool] = True
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    conv_bias: Tensor | None
    eps: float


@_call
class BnCoefficients(Call[tuple[Tensor, DyCoefficients]]):
    """dgamma = rstd*sums.dz_y, and A, B, C of dy over ``count`` values per channel; None: frozen."""

    name: ClassVar[str] = "bn_coefficients"
    vector: ClassVar[bool] = True
    norm: Norm
    sums: Sums
    count: int | None


# ---------------------------------------------------------------------------------------------------- dtypes
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
