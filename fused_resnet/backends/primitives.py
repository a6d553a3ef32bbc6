"""The primitives of a chain: one class of calls for each (the types of their arguments: ``values.py``).

A call is a value: ``BnAct(y, norm, act)``. A backend's method of the same name takes it (``backend.py``).
Every tensor is an image [N, C, H, W] or a volume [N, C, D, H, W], dense, contiguous or channels_last. Backends get
volumes in convolutions only (``_Pass``). Per-channel vectors are [C] in ``vector_dtype``. Every primitive returns new
tensors and changes none of its arguments except ``add``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast, dataclass_transform

import torch
from torch import Tensor

from fused_resnet.backends.values import (
    Case,
    Closing,
    DyCoefficients,
    Norm,
    Prologue,
    Sums,
    allow_tf32,
    key_of,
    text_of,
)
from fused_resnet.spec import Act, ConvSpec, PoolSpec

if TYPE_CHECKING:
    from fused_resnet.backends.backend import Backend

C = TypeVar("C")
R = TypeVar("R")
# The gradient of the input and dW, and the sums of dz with y and with the summand, see ``ConvBackward``.
Gradients = tuple[Tensor | None, Tensor | None, Sums | None, Sums | None]


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
        return next(iter(vars(self).values()))

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
        return self.name, self.like.device, self.tf32, *map(key_of, self.arguments)

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


class _Pass(Call[R]):
    """A call that treats all pixels of a channel alike. Backends get volumes [N, C, D, H, W] as [N, C, D*H, W]."""

    def on(self, backend: Backend) -> R:
        like = self.like
        if like.dim() != 5:
            return super().on(backend)
        return cast(R, _as_volumes(self.replace(**{k: _as_image(v) for k, v in vars(self).items()}).on(backend), like))


def _as_image(value: Any) -> Any:
    return value.flatten(2, 3) if isinstance(value, Tensor) and value.dim() == 5 else value


def _as_volumes(result: Any, like: Tensor) -> Any:
    """A result with its images as volumes of ``like``'s depth. Vectors and sums stay as they are."""
    if isinstance(result, Tensor):
        return result.unflatten(2, like.shape[2:4]) if result.dim() == 4 else result
    return tuple(_as_volumes(r, like) if isinstance(r, Tensor) else r for r in result)


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
class BnStats(_Pass[tuple[Tensor, Tensor]]):
    """Mean and biased variance per channel."""

    name: ClassVar[str] = "bn_stats"
    y: Tensor


@_call
class BnAct(_Pass[Tensor]):
    """act(scale*y + shift [+ residual, or + residual_norm of it])."""

    name: ClassVar[str] = "bn_act"
    y: Tensor
    norm: Norm
    act: Act
    residual: Tensor | None = None
    residual_norm: Norm | None = None


@_call
class BnActBackward(_Pass[tuple[Tensor, Sums, Sums | None]]):
    """dz = dout*act'(z), its sums with y, and its sums with the residual if that has a norm of its own."""

    name: ClassVar[str] = "bn_act_backward"
    dout: Tensor
    y: Tensor
    norm: Norm
    act: Act
    residual: Tensor | None = None
    residual_norm: Norm | None = None


@_call
class BnBackward(_Pass[Tensor]):
    """dy, for a unit whose convolution is not part of the chain."""

    name: ClassVar[str] = "bn_backward"
    dz: Tensor
    y: Tensor
    coef: DyCoefficients


@_call
class ConvBackward(_Convolution[Gradients]):
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


# ---------------------------------------------------------------------------------------------------- whole rows
class WholeRow(Call[R]):
    """The work of an operator of ``chain/operators.py`` in one call. ``spec``: the row's, as text.

    A row is not measured beside other backends. Without a backend that offers it, ``chain`` composes it of the
    primitives above.
    """

    x: Tensor
    spec: str

    @property
    def like(self) -> Tensor:
        return self.x


@_call
class RowForward(WholeRow[list[Tensor]]):
    """The operator ``fused_resnet::chain``."""

    name: ClassVar[str] = "row_forward"
    x: Tensor
    residual: Tensor | None
    params: Sequence[Tensor]
    spec: str


@_call
class RowBackward(WholeRow[list[Tensor]]):
    """The operator ``fused_resnet::chain_backward``."""

    name: ClassVar[str] = "row_backward"
    dout: Tensor
    x: Tensor
    residual: Tensor | None
    weights: Sequence[Tensor]
    saved: Sequence[Tensor]
    spec: str
    needs: Sequence[bool]


@_call
class RowInference(WholeRow[Tensor]):
    """The operator ``fused_resnet::chain_inference``."""

    name: ClassVar[str] = "row_inference"
    x: Tensor
    residual: Tensor | None
    params: Sequence[Tensor]
    spec: str
