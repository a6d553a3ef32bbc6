"""The composition of PyTorch's own operators: any device, any dtype, any case. The fallback and the yardstick.

16-bit tensors are normalised in float32 and rounded where PyTorch's own modules would round: at the convolution's
output and at the block's output. cuDNN and oneDNN work underneath.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.backends import Backend, DyCoefficients, Norm, Prologue, Sums, primitives, vector_dtype
from fused_resnet.base.activations import SELU_ALPHA, SELU_SCALE
from fused_resnet.reference import ACT, CONV
from fused_resnet.spec import ConvSpec

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
    "gelu": lambda g, z, p: _aten.gelu_backward(g, z),
    "gelu_tanh": lambda g, z, p: _aten.gelu_backward(g, z, approximate="tanh"),
    "mish": lambda g, z, p: _aten.mish_backward(g, z),
    "softplus": lambda g, z, p: _aten.softplus_backward(g, z, p, 20),
    "tanh": lambda g, z, p: _aten.tanh_backward(g, torch.tanh(z)),
    "hardsigmoid": lambda g, z, p: _aten.hardsigmoid_backward(g, z),
    "hardtanh": lambda g, z, p: _aten.hardtanh_backward(g, z, -p, p),
    "selu": lambda g, z, p: _aten.elu_backward(g, SELU_ALPHA, SELU_SCALE, 1, False, z),
    "celu": lambda g, z, p: _aten.elu_backward(g, p, 1, 1 / p, False, z),
}
_DIMS = (0, 2, 3)


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


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvSpec) -> Tensor:
    return CONV[x.dim()](x, weight.to(x.dtype), bias, *conv.geometry)


class Aten(Backend):
    """Takes every case."""

    name = "aten"

    def conv_bias_act(self, call: primitives.ConvBiasAct) -> Tensor:
        x, act = call.x, call.act
        y = _convolve(x, call.weight, call.bias.to(x.dtype) if call.bias is not None else None, call.conv)
        return ACT[act.name](y if call.residual is None else y + call.residual, act.param)

    def conv_stats(self, call: primitives.ConvStats) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y = _convolve(self._operand(call.x, call.prologue), call.weight, None, call.conv)
        return (y, *primitives.BnStats(y).on(self)) if call.stats else (y, None, None)

    def bn_stats(self, call: primitives.BnStats) -> tuple[Tensor, Tensor]:
        """Two passes, so that |mean| >> std loses no precision."""
        wide = _wide(call.y)
        mean = wide.mean(_DIMS)
        return mean, (wide - _c(mean)).square().mean(_DIMS)

    def bn_act(self, call: primitives.BnAct) -> Tensor:
        z = _z(call.y, call.norm, call.residual, call.residual_norm)
        return ACT[call.act.name](z, call.act.param).to(call.y.dtype)

    def bn_act_backward(self, call: primitives.BnActBackward) -> tuple[Tensor, Sums, Sums | None]:
        dout, y, norm, act = call.dout, call.y, call.norm, call.act
        residual, residual_norm = call.residual, call.residual_norm
        dz = _ACT_BACKWARD[act.name](_wide(dout), _z(y, norm, residual, residual_norm), act.param)
        with_residual = None
        if residual is not None and residual_norm is not None:
            with_residual = _sums(dz, residual, residual_norm)
        new = dz.to(dout.dtype)
        # for the identity this is dout itself; a later primitive might overwrite it as its ``add``
        return new.clone() if new is dout else new, _sums(dz, y, norm), with_residual

    def bn_backward(self, call: primitives.BnBackward) -> Tensor:
        y, coef = call.y, call.coef
        dy = _c(coef.a) * _wide(call.dz)
        if coef.b is not None and coef.c is not None:
            dy = dy + _c(coef.b) * (_wide(y) - _c(coef.center)) + _c(coef.c)
        return dy.to(y.dtype)

    def conv_backward(self, call: primitives.ConvBackward) -> primitives.Gradients:
        x, weight, conv = call.x, call.weight, call.conv
        da, dw, _ = _aten.convolution_backward(
            primitives.BnBackward(call.dz, call.y, call.coef).on(self),
            self._operand(x, call.prologue),
            weight.to(x.dtype),
            None, conv.stride, conv.padding, conv.dilation, False, [0] * len(conv.stride), conv.groups,
            (call.need_input, call.need_weight, False),
        )  # fmt: skip
        dw = dw.to(weight.dtype) if call.need_weight else None
        if not call.need_input:
            return None, dw, None, None
        if call.add is not None:
            da = da + call.add
        closing = call.before
        if closing is None:
            return da, dw, None, None
        dz, sums, summand_sums = primitives.BnActBackward(da, *closing).on(self)
        return dz, dw, sums, summand_sums

    def bn_act_max_pool(self, call: primitives.BnActMaxPool) -> tuple[Tensor, Tensor]:
        y, pool = call.y, call.pool
        a = self.bn_act(primitives.BnAct(y, call.norm, call.act))
        out, index = F.max_pool2d(a, *pool.window, return_indices=True)
        # PyTorch's index is into the H*W plane; ours is the position in the window
        row, col = index // a.shape[3], index % a.shape[3]
        top = torch.arange(out.shape[2], device=y.device)[:, None] * pool.stride[0] - pool.padding[0]
        left = torch.arange(out.shape[3], device=y.device) * pool.stride[1] - pool.padding[1]
        return out, ((row - top) * pool.kernel[1] + (col - left)).to(torch.uint8)

    def bn_act_max_pool_backward(self, call: primitives.BnActMaxPoolBackward) -> tuple[Tensor, Sums]:
        dout, y, pool = call.dout, call.y, call.pool
        place = call.argmax.long()
        top = torch.arange(dout.shape[2], device=y.device)[:, None] * pool.stride[0] - pool.padding[0]
        left = torch.arange(dout.shape[3], device=y.device) * pool.stride[1] - pool.padding[1]
        index = (top + place // pool.kernel[1]) * y.shape[3] + left + place % pool.kernel[1]
        da = _aten.max_pool2d_with_indices_backward(_wide(dout), _wide(y), *pool.window, (1, 1), False, index)
        dz, sums, _ = self.bn_act_backward(primitives.BnActBackward(da, y, call.norm, call.act))
        return dz.to(dout.dtype), sums

    def bn_fold(self, call: primitives.BnFold) -> Norm:
        """In float64, because a rounding error here affects every pixel of a channel."""
        mean, weight, bias, conv_bias = call.mean, call.weight, call.bias, call.conv_bias
        wide = vector_dtype(mean.dtype)
        exact = torch.float64 if mean.device.type != "mps" else wide
        center = mean.to(exact, copy=True)
        if conv_bias is not None:
            center -= conv_bias.to(exact)
        rstd = torch.rsqrt(call.var.to(exact) + call.eps)
        scale = (weight.to(exact) * rstd if weight is not None else rstd.clone()).to(wide)
        shift = (bias.to(exact) if bias is not None else 0) - center * scale
        return Norm(scale, shift.to(wide), center.to(wide), rstd.to(wide))

    def bn_coefficients(self, call: primitives.BnCoefficients) -> tuple[Tensor, DyCoefficients]:
        norm, sums, count = call.norm, call.sums, call.count
        dgamma = norm.rstd * sums.dz_y
        if count is None:
            return dgamma, DyCoefficients(norm.scale, None, None, norm.center)
        b = norm.scale * norm.rstd * dgamma / -count
        return dgamma, DyCoefficients(norm.scale, b, norm.scale * sums.dz / -count, norm.center)

    def _operand(self, x: Tensor, prologue: Prologue | None) -> Tensor:
        return x if prologue is None else primitives.BnAct(x, *prologue).on(self)


BACKEND = Aten()
