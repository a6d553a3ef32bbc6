"""The convolution primitives of the Triton backend: prepare operands, start kernels in order, merge partial sums."""

from __future__ import annotations

from torch import Tensor

from fused_resnet.backends import Closing, DyCoefficients, Prologue, Sums
from fused_resnet.backends.triton.conv_dgrad import conv_dgrad
from fused_resnet.backends.triton.conv_fprop import conv_fprop
from fused_resnet.backends.triton.conv_wgrad import conv_wgrad
from fused_resnet.backends.triton.geometry import Geometry, krsc, nhwc
from fused_resnet.backends.triton.pad import pad_channels
from fused_resnet.backends.triton.reduce import merge_moments, sum_partials
from fused_resnet.spec import Act, ConvSpec


def conv_bias_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvSpec, act: Act, residual: Tensor | None
) -> Tensor:
    """See ``Primitives.conv_bias_act``."""
    x, weight = pad_channels(nhwc(x), weight)
    residual = None if residual is None else nhwc(residual)
    g = Geometry.of(x, weight, conv)
    return conv_fprop(x, krsc(weight, x.dtype), g, bias=bias, residual=residual, act=act)[0]


def conv_stats(
    x: Tensor, weight: Tensor, conv: ConvSpec, prologue: Prologue | None, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``Primitives.conv_stats``."""
    x = nhwc(x)
    if prologue is None:
        x, weight = pad_channels(x, weight)
    g = Geometry.of(x, weight, conv)
    y, means, m2s, rows = conv_fprop(x, krsc(weight, x.dtype), g, prologue, stats=stats)
    if means is None or m2s is None:
        return y, None, None
    return y, *merge_moments(means, m2s, rows, g.m)


def conv_backward(
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
    """See ``Primitives.conv_backward``."""
    dz, y, x = nhwc(dz), nhwc(y), nhwc(x)
    # runs before dgrad, which may overwrite ``add``
    dw = _weight_gradient(dz, y, coef, x, prologue, weight, conv) if need_weight else None
    if not need_input:
        return None, dw, None, None
    closing = Closing.before(x, prologue, closing)
    if closing is not None:
        summand = None if closing.summand is None else nhwc(closing.summand)
        closing = closing._replace(y=nhwc(closing.y), summand=summand)
    add = None if add is None else nhwc(add)
    g = Geometry.of(x, weight, conv)
    dx, sums = conv_dgrad(dz, y, coef, x, krsc(weight, x.dtype), g, add, closing)
    if not sums:
        return dx, dw, None, None
    total, *others = sum_partials(*sums)
    return dx, dw, Sums(total, others[0]), Sums(total, others[1]) if len(others) > 1 else None


def _weight_gradient(
    dz: Tensor, y: Tensor, coef: DyCoefficients, x: Tensor, prologue: Prologue | None, weight: Tensor, conv: ConvSpec
) -> Tensor:
    channels = x.shape[1]
    if prologue is None:
        x, weight = pad_channels(x, weight)
    dw = conv_wgrad(dz, y, coef, x, prologue, weight, Geometry.of(x, weight, conv))
    return dw if dw.shape[1] == channels else nhwc(dw[:, :channels])
