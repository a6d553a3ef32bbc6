"""``Backend``: everything that a backend may offer, with what holds if it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends import primitives
from fused_resnet.backends.primitives import Call, ConvBiasAct
from fused_resnet.backends.values import Case, DyCoefficients, Norm, Sums
from fused_resnet.spec import ConvSpec, PoolSpec

if TYPE_CHECKING:
    from fused_resnet.backends.steps import Recorded

Config = tuple[Any, ...]


class Packed(NamedTuple):
    """A weight in the layout of the convolution that uses it, and that convolution's name.

    ``part``: the slices of a kernel of three dimensions that it has.
    """

    weight: Tensor
    kind: str
    part: slice | None = None


class Backend:
    """The base of all backends. A backend overrides the primitives that it offers, and gives its limits.

    Attributes:
        name: its name for ``use_backend``. companions: the backends that serve what it does not offer, if it is
            requested by name. packs: inference keeps weights packed for it, see ``prepack``.
    """

    name: ClassVar[str]
    companions: ClassVar[tuple[str, ...]] = ()
    packs: ClassVar[bool] = False

    # ------------------------------------------------------------------------------------------------ limits
    def unavailable(self) -> str | None:
        """The reason why this machine can't use it, or None."""
        return None

    def refuse(self, primitive: type[Call[Any]], case: Case) -> str | None:
        """The reason why it does not take this case of a primitive that it offers, or None: a sentence for a user."""
        return None

    @classmethod
    def offers(cls, primitive: type[Call[Any]]) -> bool:
        """Whether it has the primitive."""
        return getattr(cls, primitive.name) is not getattr(Backend, primitive.name)

    def declines(self, primitive: type[Call[Any]], case: Case) -> str | None:
        """The reason why it can't serve a call, or None."""
        return self.refuse(primitive, case) if self.offers(primitive) else f"does not implement {primitive.name}"

    def algorithm(
        self, primitive: type[Call[Any]], x: Tensor, weight: Tensor, conv: ConvSpec, prologue: bool
    ) -> str | None:
        """The name of the algorithm that runs a convolution, for ``explain``; None: it has no name.

        Of x and the weight only the sizes, the dtypes and the layouts count. ``prologue``: x is a raw output.
        """
        return None

    # ------------------------------------------------------------------------------------------------ configurations
    def configurations(self, call: Call[Any]) -> Sequence[Config]:
        """The configurations beside the default that the planner may try for a call. May run the call."""
        return ()

    def configured(self, config: Config) -> AbstractContextManager[Any]:
        """Within this context (and thread) its calls run with one of ``configurations``."""
        return nullcontext()

    # ------------------------------------------------------------------------------------------------ frozen weights
    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which it computes convolutions of ``dtype``."""
        return dtype

    def algorithms(self, call: ConvBiasAct) -> Sequence[str]:
        """The algorithms for which ``prepack`` can pack the call's weight. Which is fastest is measured."""
        return ()

    def prepack(self, call: ConvBiasAct, known: Sequence[Any] = (), algorithm: str = "") -> Packed | None:
        """The call's weight, packed for inputs like its x; None: the weight is used as it is.

        ``algorithm``: one of ``algorithms``; "": the backend chooses. If one of ``known`` (packed earlier, for other
        inputs) has the same layout, that one is returned.
        """
        return None

    def conv_packed(self, call: ConvBiasAct, packed: Packed, owned: bool) -> Tensor:
        """``conv_bias_act`` with a weight packed for this or another x. ``owned``: may overwrite the residual."""
        raise NotImplementedError

    def prepack_pooled(self, call: ConvBiasAct, pool: PoolSpec) -> Packed | None:
        """The weight of a stem, packed for ``conv_pooled``; None if a separate pass for the pool is faster."""
        return None

    def conv_pooled(self, call: ConvBiasAct, packed: Packed, pool: PoolSpec) -> Tensor:
        """A stem in inference: max-pool(act(conv(x, W) + b)), W packed by ``prepack_pooled`` for an input like x."""
        raise NotImplementedError

    def in_bands(self, x: Tensor, weights: Sequence[Tensor], convs: Sequence[ConvSpec]) -> Sequence[str]:
        """The algorithms of the first of these convolutions in a recorded row, if it passes through x together with
        those after it. ``weights``: without values. Empty: each has an algorithm of its own."""
        return ()

    def frozen_row(self, recorded: Sequence[Recorded]) -> Callable[..., Tensor] | None:
        """The steps of a frozen row as one call: (x, summand or None) -> the last result.

        None: the steps run one by one.
        """
        return None

    # ------------------------------------------------------------------------------------------------ primitives
    # Their calls say what they do (primitives.py).
    def conv_bias_act(self, call: primitives.ConvBiasAct) -> Tensor:
        raise NotImplementedError

    def conv_bn_act(self, call: primitives.ConvBnAct) -> Tensor:
        raise NotImplementedError

    def conv_stats(self, call: primitives.ConvStats) -> tuple[Tensor, Tensor | None, Tensor | None]:
        raise NotImplementedError

    def conv_backward(self, call: primitives.ConvBackward) -> primitives.Gradients:
        raise NotImplementedError

    def bn_stats(self, call: primitives.BnStats) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def bn_act(self, call: primitives.BnAct) -> Tensor:
        raise NotImplementedError

    def bn_act_backward(self, call: primitives.BnActBackward) -> tuple[Tensor, Sums, Sums | None]:
        raise NotImplementedError

    def bn_backward(self, call: primitives.BnBackward) -> Tensor:
        raise NotImplementedError

    def bn_act_max_pool(self, call: primitives.BnActMaxPool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def bn_act_max_pool_backward(self, call: primitives.BnActMaxPoolBackward) -> tuple[Tensor, Sums]:
        raise NotImplementedError

    def bn_fold(self, call: primitives.BnFold) -> Norm:
        raise NotImplementedError

    def bn_coefficients(self, call: primitives.BnCoefficients) -> tuple[Tensor, DyCoefficients]:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ whole rows
    def row_forward(self, call: primitives.RowForward) -> list[Tensor]:
        raise NotImplementedError

    def row_backward(self, call: primitives.RowBackward) -> list[Tensor]:
        raise NotImplementedError

    def row_inference(self, call: primitives.RowInference) -> Tensor:
        raise NotImplementedError
