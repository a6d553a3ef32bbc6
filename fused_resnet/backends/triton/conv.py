"""The convolution primitives of the Triton backend: prepare operands, start kernels in order, merge partial sums."""

from __future__ import annotations

from torch import Tensor

from fused_resnet.backends import ConvBackward, ConvBiasAct, ConvStats, Sums
from fused_resnet.backends.triton.conv_dgrad import conv_dgrad
from fused_resnet.backends.triton.conv_fprop import conv_fprop
from fused_resnet.backends.triton.conv_wgrad import conv_wgrad
from fused_resnet.backends.triton.geometry import Geometry, krsc, nhwc
from fused_resnet.backends.triton.pad import pad_channels
from fused_resnet.backends.triton.reduce import merge_moments, sum_partials


def conv_bias_act(call: ConvBiasAct) -> Tensor:
    x, weight = pad_channels(nhwc(call.x), call.weight)
    residual = None if call.residual is None else nhwc(call.residual)
    g = Geometry.of(x, weight, call.conv)
    return conv_fprop(x, krsc(weight, x.dtype), g, bias=call.bias, residual=residual, act=call.act)[0]


def conv_stats(call: ConvStats) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, weight = nhwc(call.x), call.weight
    if call.prologue is None:
        x, weight = pad_channels(x, weight)
    g = Geometry.of(x, weight, call.conv)
    y, moments, rows = conv_fprop(x, krsc(weight, x.dtype), g, call.prologue, stats=call.stats)
    return (y, None, None) if moments is None else (y, *merge_moments(moments, rows, g.m))


def conv_backward(call: ConvBackward) -> tuple[Tensor | None, Tensor | None, Sums | None, Sums | None]:
    call = call.replace(dz=nhwc(call.dz), y=nhwc(call.y), x=nhwc(call.x))
    # runs before dgrad, which may overwrite ``add``
    dw = _weight_gradient(call) if call.need_weight else None
    if not call.need_input:
        return None, dw, None, None
    closing = call.before
    if closing is not None:
        summand = None if closing.summand is None else nhwc(closing.summand)
        closing = closing._replace(y=nhwc(closing.y), summand=summand)
    add = None if call.add is None else nhwc(call.add)
    g = Geometry.of(call.x, call.weight, call.conv)
    dx, sums = conv_dgrad(call.dz, call.y, call.coef, call.x, krsc(call.weight, call.x.dtype), g, add, closing)
    if closing is None:
        return dx, dw, None, None
    total, *others = sum_partials(sums)
    return dx, dw, Sums(total, others[0]), Sums(total, others[1]) if len(others) > 1 else None


def _weight_gradient(call: ConvBackward) -> Tensor:
    """dW, for NHWC tensors."""
    x, weight, channels = call.x, call.weight, call.x.shape[1]
    if call.prologue is None:
        x, weight = pad_channels(x, weight)
    dw = conv_wgrad(call.dz, call.y, call.coef, x, call.prologue, weight, Geometry.of(x, weight, call.conv))
    return dw if dw.shape[1] == channels else nhwc(dw[:, :channels])
