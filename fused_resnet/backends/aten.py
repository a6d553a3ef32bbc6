"""The composition of PyTorch's own operators: any device, any dtype, any case. The fallback and the yardstick.

16-bit tensors are normalised in float32 and rounded where PyTorch's own modules would round: at the convolution's
output and at the block's output. cuDNN and oneDNN work underneath.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.backends import Case, Closing, DyCoefficients, Norm, Prologue, Sums, vector_dtype
from fused_resnet.reference import ACT
from fused_resnet.spec import Act, ConvSpec, PoolSpec

_aten = torch.ops.aten
# act'(z)*g by ATen's own backward operators: NaN and the kinks go where PyTorch sends them.
_ACT_BACKWARD: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "identity": lambda g, z, p: g,
    "relu": lambda g, z, p: _aten.threshold_backward(g, z, 0),
    "leaky_relu": lambda g, z, p: _aten.leaky_relu_backward(g, z, p, False),
    "elu": lambda g, z, p: _aten.elu_backward(g, p, 1, 1, False, z),
    "sigmoid": lambda g, z, p: _aten.sigmoid_backward(g, torch.sigmoid(z)),
    "silu": lambda g, z, p: _aten.silu_backward(g, z),
    "relu6": lambda g, z, p: _aten.hardtanh_backward(g, z, 0, 6),
    "hardswish": lambda g, z, p: _aten.hardswish_backward(g, z),
}
_DIMS = (0, 2, 3)


def unavailable() -> str | None:
    """None: it is always available."""
    return None


def refuse(primitive: str, case: Case) -> str | None:
    """None: it takes every case."""
    return None


def _wide(t: Tensor) -> Tensor:
    return t.to(vector_dtype(t.dtype))


def _c(v: Tensor) -> Tensor:
    return v[:, None, None]


def _z(y: Tensor, norm: Norm, residual: Tensor | None = None, residual_norm: Norm | None = None) -> Tensor:
    z = torch.addcmul(_c(norm.shift), _wide(y), _c(norm.scale))
    if residual is None:
        return z
    return z + (_wide(residual) if residual_norm is None else _z(residual, residual_norm))


def _sums(dz: Tensor, y: Tensor, norm: Norm) -> Sums:
    return Sums(dz.sum(_DIMS), (dz * (_wide(y) - _c(norm.center))).sum(_DIMS))


def _prologue(x: Tensor, prologue: Prologue | None) -> Tensor:
    return x if prologue is None else bn_act(x, prologue.norm, prologue.act)


def conv_bias_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvSpec, act: Act, residual: Tensor | None
) -> Tensor:
    """See ``Primitives.conv_bias_act``."""
    b = bias.to(x.dtype) if bias is not None else None
    y = F.conv2d(x, weight.to(x.dtype), b, conv.stride, conv.padding, conv.dilation, conv.groups)
    return ACT[act.name](y if residual is None else y + residual, act.param)


def conv_stats(
    x: Tensor, weight: Tensor, conv: ConvSpec, prologue: Prologue | None, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``Primitives.conv_stats``."""
    a = _prologue(x, prologue)
    y = F.conv2d(a, weight.to(x.dtype), None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return (y, *bn_stats(y)) if stats else (y, None, None)


def bn_stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """See ``Primitives.bn_stats``. Two passes, so that |mean| >> std loses no precision."""
    wide = _wide(y)
    mean = wide.mean(_DIMS)
    return mean, (wide - _c(mean)).square().mean(_DIMS)


def bn_act(
    y: Tensor, norm: Norm, act: Act, residual: Tensor | None = None, residual_norm: Norm | None = None
) -> Tensor:
    """See ``Primitives.bn_act``."""
    return ACT[act.name](_z(y, norm, residual, residual_norm), act.param).to(y.dtype)


def bn_act_backward(
    dout: Tensor, y: Tensor, norm: Norm, act: Act, residual: Tensor | None = None, residual_norm: Norm | None = None
) -> tuple[Tensor, Sums, Sums | None]:
    """See ``Primitives.bn_act_backward``."""
    dz = _ACT_BACKWARD[act.name](_wide(dout), _z(y, norm, residual, residual_norm), act.param)
    with_residual = _sums(dz, residual, residual_norm) if residual is not None and residual_norm is not None else None
    new = dz.to(dout.dtype)
    # for the identity this is dout itself; a later primitive might overwrite it as its ``add``
    return new.clone() if new is dout else new, _sums(dz, y, norm), with_residual


def bn_backward(dz: Tensor, y: Tensor, coef: DyCoefficients) -> Tensor:
    """See ``Primitives.bn_backward``."""
    dy = _c(coef.a) * _wide(dz)
    if coef.b is not None and coef.c is not None:
        dy = dy + _c(coef.b) * (_wide(y) - _c(coef.center)) + _c(coef.c)
    return dy.to(y.dtype)


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
    da, dw, _ = _aten.convolution_backward(
        bn_backward(dz, y, coef),
        _prologue(x, prologue),
        weight.to(x.dtype),
        None,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        (0, 0),
        conv.groups,
        (need_input, need_weight, False),
    )
    dw = dw.to(weight.dtype) if need_weight else None
    if not need_input:
        return None, dw, None, None
    if add is not None:
        da = da + add
    closing = Closing.before(x, prologue, closing)
    if closing is None:
        return da, dw, None, None
    dz, sums, summand_sums = bn_act_backward(da, *closing)
    return dz, dw, sums, summand_sums


def bn_act_max_pool(y: Tensor, norm: Norm, act: Act, pool: PoolSpec) -> tuple[Tensor, Tensor]:
    """See ``Primitives.bn_act_max_pool``."""
    a = bn_act(y, norm, act)
    out, index = F.max_pool2d(a, pool.kernel, pool.stride, pool.padding, return_indices=True)
    # PyTorch's index is into the H*W plane; ours is the position in the window
    row, col = index // a.shape[3], index % a.shape[3]
    top = torch.arange(out.shape[2], device=y.device)[:, None] * pool.stride[0] - pool.padding[0]
    left = torch.arange(out.shape[3], device=y.device) * pool.stride[1] - pool.padding[1]
    return out, ((row - top) * pool.kernel[1] + (col - left)).to(torch.uint8)


def bn_act_max_pool_backward(
    dout: Tensor, argmax: Tensor, y: Tensor, norm: Norm, act: Act, pool: PoolSpec
) -> tuple[Tensor, Sums]:
    """See ``Primitives.bn_act_max_pool_backward``."""
    place = argmax.long()
    top = torch.arange(dout.shape[2], device=y.device)[:, None] * pool.stride[0] - pool.padding[0]
    left = torch.arange(dout.shape[3], device=y.device) * pool.stride[1] - pool.padding[1]
    index = (top + place // pool.kernel[1]) * y.shape[3] + left + place % pool.kernel[1]
    da = _aten.max_pool2d_with_indices_backward(
        _wide(dout), _wide(y), pool.kernel, pool.stride, pool.padding, (1, 1), False, index
    )
    dz, sums, _ = bn_act_backward(da, y, norm, act)
    return dz.to(dout.dtype), sums


def bn_fold(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, conv_bias: Tensor | None, eps: float
) -> Norm:
    """See ``Primitives.bn_fold``. In float64, because a rounding error here affects every pixel of a channel."""
    wide = vector_dtype(mean.dtype)
    exact = torch.float64 if mean.device.type != "mps" else wide
    center = mean.to(exact, copy=True)
    if conv_bias is not None:
        center -= conv_bias.to(exact)
    rstd = torch.rsqrt(var.to(exact) + eps)
    scale = (weight.to(exact) * rstd if weight is not None else rstd.clone()).to(wide)
    shift = (bias.to(exact) if bias is not None else 0) - center * scale
    return Norm(scale, shift.to(wide), center.to(wide), rstd.to(wide))


def bn_coefficients(norm: Norm, sums: Sums, count: int | None) -> tuple[Tensor, DyCoefficients]:
    """See ``Primitives.bn_coefficients``."""
    dgamma = norm.rstd * sums.dz_y
    if count is None:
        return dgamma, DyCoefficients(norm.scale, None, None, norm.center)
    b = norm.scale * norm.rstd * dgamma / -count
    return dgamma, DyCoefficients(norm.scale, b, norm.scale * sums.dz / -count, norm.center)
