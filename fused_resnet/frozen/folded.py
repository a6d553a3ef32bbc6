"""Units and chains with BatchNorm folded into their weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fused_resnet.backends import Norm
from fused_resnet.backends.steps import Excitation
from fused_resnet.chain.packing import Weight
from fused_resnet.spec import Act, ChainSpec, ConvSpec, ShortcutSpec, UnitSpec

IDENTITY = Act("identity")


class FoldedUnit(NamedTuple):
    """act(s*conv(x, W) + b [+ residual]), with BatchNorm folded into W and b, and an excitation.

    Attributes:
        weight: W, channels_last, in x's dtype; the factors [C] in ``vector_dtype`` if there is no convolution. bias: b.
        scale: s, [out_channels] in ``vector_dtype``; None: it is folded into W. excitation: after the activation, but
            before a residual.
    """

    weight: Weight | Tensor
    bias: Tensor
    conv: ConvSpec | None
    act: Act
    scale: Tensor | None = None
    excitation: Excitation | None = None

    @property
    def norm(self) -> Norm:
        """A unit without a convolution as scale*y + shift. Inference reads neither its center nor its rstd."""
        assert isinstance(self.weight, Tensor)
        return Norm(self.weight, self.bias, self.bias, self.bias)

    def out_shape(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape) if self.conv is None else self.conv.out_shape(x.shape, self.weight.shape)


class FoldedChain(NamedTuple):
    """A chain of folded units, its projection last. ``average``: its input is x's mean per channel, [N, C, 1, 1]."""

    spec: ChainSpec
    units: list[FoldedUnit]
    average: bool = False

    @classmethod
    def head(cls, weight: Weight, bias: Tensor) -> FoldedChain:
        """A linear layer of x's means, as a 1x1 convolution with the weight [K, C, 1, 1]."""
        conv = ConvSpec.make(weight.shape, bias=True)
        spec = ChainSpec((UnitSpec(conv, IDENTITY, 0.0, batch_stats=False),), ShortcutSpec("none"))
        return cls(spec, [FoldedUnit(weight, bias, conv, IDENTITY)], average=True)
