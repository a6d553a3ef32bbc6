"""Every formula of a chain for Triton kernels, once (csrc/bn_math.h has the same formulas for C++).

    z = s y + t (+ residual)       a = act(z)       dz = g act'(z)       dy = A dz + B (y - mu) + C
    (count, mean, M2) of two halves, merged by Chan's formula

Everything is float32. act and act' send NaN and the kinks where ATen's operators send them.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fused_resnet.backends.triton.runtime import INTERPRET
from fused_resnet.base.activations import ACTIVATIONS, SELU_ALPHA, SELU_SCALE

_INTERPRET = tl.constexpr(INTERPRET)
# The number that kernels take for an activation: its index in the table of fused_resnet/spec.py.
(
    _IDENTITY, _RELU, _LEAKY_RELU, _ELU, _SIGMOID, _SILU, _RELU6, _HARDSWISH,
    _GELU, _GELU_TANH, _MISH, _SOFTPLUS, _TANH, _HARDSIGMOID, _HARDTANH, _SELU, _CELU,
) = (tl.constexpr(i) for i in range(len(ACTIVATIONS)))  # fmt: skip
_SELU_NEGATIVE, _SELU_SCALE = tl.constexpr(SELU_ALPHA * SELU_SCALE), tl.constexpr(SELU_SCALE)
_GELU_SCALE = tl.constexpr(2 * (2 / math.pi) ** 0.5)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def clamp(z, low, high):
    return tl.where(z < low, low, tl.where(z > high, high, z))


@triton.jit
def clamp_backward(g, z, low, high):
    """The gradient of ``clamp``: none at either limit."""
    return tl.where(z <= low, 0.0, tl.where(z >= high, 0.0, g))


@triton.jit
def exponential_linear(z, a, b, c):
    """a (exp(z b) - 1) below 0, z c above: elu, selu, celu."""
    return tl.where(z <= 0, (tl.exp(z * b) - 1.0) * a, z * c)


@triton.jit
def exponential_linear_backward(g, z, a, b, c):
    return tl.where(z > 0, g * c, g * a * b * tl.exp(z * b))


@triton.jit
def normal_cdf(z):
    return 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476))


@triton.jit
def gelu_tanh_argument(z):
    """2 v of gelu's approximation z (1 + tanh(v))/2 = z sigmoid(2 v), v = sqrt(2/pi) (z + 0.044715 z^3)."""
    return z * _GELU_SCALE * (1.0 + 0.044715 * z * z)


@triton.jit
def mish_gate(z):
    """tanh(softplus(z)) = n / (n + 2) with n = e (e + 2), e = exp(z), and its derivative 4 e (1 + e) / (n + 2)^2.

    At z > 0 numerators and denominators are those times q^2 and q^4, q = exp(-z), so that nothing overflows.
    """
    q = tl.exp(tl.where(z > 0, -z, z))
    n = tl.where(z > 0, 1.0 + 2.0 * q, q * q + 2.0 * q)
    total = n + 2.0 * tl.where(z > 0, q * q, 1.0)
    return n / total, 4.0 * tl.where(z > 0, q * q, q) * (1.0 + q) / (total * total)


@triton.jit
def log1p(q):
    """log(1 + q) of 0 <= q <= 1: 2 artanh(s), s = q/(2 + q), s times a minimax fit in s^2, relative error 3e-7."""
    s = q / (2.0 + q)
    u = s * s
    fit = 1.0 + u * (0.333331572 + u * (0.2001246 + u * (0.139802279 + u * 0.140895174)))
    return 2.0 * s * fit


@triton.jit
def tanh(z):
    """Near 0 the polynomial of Cephes tanhf, which keeps the digits that 1 - 2/(exp(2 |z|) + 1) loses there."""
    u = z * z
    fit = 1.33314422036e-1 + u * (-5.37397155531e-2 + u * (2.06390887954e-2 - u * 5.70498872745e-3))
    near = z + z * u * (-3.33332819422e-1 + u * fit)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(z)) + 1.0)
    return tl.where(tl.abs(z) < 0.625, near, tl.where(z < 0, -far, far))


@triton.jit
def softplus(z, beta):
    """log(1 + exp(beta z)) / beta; z where beta z > 20, as in PyTorch."""
    x = z * beta
    return tl.where(x > 20, z, (tl.where(x < 0, 0.0, x) + log1p(tl.exp(-tl.abs(x)))) / beta)


@triton.jit
def act(z, ACT: tl.constexpr, act_param):
    """act(z); act_param is negative_slope, alpha, beta or limit."""
    if ACT == _RELU:
        a = tl.where(z < 0, 0.0, z)
    elif ACT == _LEAKY_RELU:
        a = tl.where(z > 0, z, z * act_param)
    elif ACT == _ELU:
        a = exponential_linear(z, act_param, 1.0, 1.0)
    elif ACT == _SIGMOID:
        a = sigmoid(z)
    elif ACT == _SILU:
        a = z * sigmoid(z)
    elif ACT == _RELU6:
        a = clamp(z, 0.0, 6.0)
    elif ACT == _HARDSWISH:
        a = z * clamp(z + 3.0, 0.0, 6.0) / 6.0
    elif ACT == _GELU:
        a = z * normal_cdf(z)
    elif ACT == _GELU_TANH:
        a = z * sigmoid(gelu_tanh_argument(z))
    elif ACT == _MISH:
        a = z * mish_gate(z)[0]
    elif ACT == _SOFTPLUS:
        a = softplus(z, act_param)
    elif ACT == _TANH:
        a = tanh(z)
    elif ACT == _HARDSIGMOID:
        a = clamp(z + 3.0, 0.0, 6.0) / 6.0
    elif ACT == _HARDTANH:
        a = clamp(z, -act_param, act_param)
    elif ACT == _SELU:
        a = exponential_linear(z, _SELU_NEGATIVE, 1.0, _SELU_SCALE)
    elif ACT == _CELU:
        a = exponential_linear(z, act_param, 1.0 / act_param, 1.0)
    else:
        a = z
    return a


@triton.jit
def act_backward(g, z, ACT: tl.constexpr, act_param):
    """g act'(z)."""
    if ACT == _RELU:
        dz = tl.where(z <= 0, 0.0, g)
    elif ACT == _LEAKY_RELU:
        dz = tl.where(z > 0, g, g * act_param)
    elif ACT == _ELU:
        dz = exponential_linear_backward(g, z, act_param, 1.0, 1.0)
    elif ACT == _SIGMOID:
        s = sigmoid(z)
        dz = g * s * (1.0 - s)
    elif ACT == _SILU:
        s = sigmoid(z)
        dz = g * s * (1.0 + z * (1.0 - s))
    elif ACT == _RELU6:
        dz = clamp_backward(g, z, 0.0, 6.0)
    elif ACT == _HARDSWISH:
        dz = tl.where(z <= -3, 0.0, tl.where(z >= 3, g, g * (z / 3.0 + 0.5)))
    elif ACT == _GELU:
        dz = g * (normal_cdf(z) + z * (0.3989422804014327 * tl.exp(-0.5 * z * z)))
    elif ACT == _GELU_TANH:
        s = sigmoid(gelu_tanh_argument(z))
        dz = g * (s + z * (s * (1.0 - s)) * ((1.0 + 0.134145 * z * z) * _GELU_SCALE))
    elif ACT == _MISH:
        gate, slope = mish_gate(z)
        dz = g * (gate + z * slope)
    elif ACT == _SOFTPLUS:
        dz = tl.where(z * act_param > 20, g, g * sigmoid(z * act_param))
    elif ACT == _TANH:
        t = tanh(z)
        dz = g * (1.0 - t * t)
    elif ACT == _HARDSIGMOID:
        dz = tl.where(z > -3, tl.where(z < 3, g * (1.0 / 6.0), 0.0), 0.0)
    elif ACT == _HARDTANH:
        dz = clamp_backward(g, z, -act_param, act_param)
    elif ACT == _SELU:
        dz = exponential_linear_backward(g, z, _SELU_NEGATIVE, 1.0, _SELU_SCALE)
    elif ACT == _CELU:
        dz = exponential_linear_backward(g, z, act_param, 1.0 / act_param, 1.0)
    else:
        dz = g
    return dz


@triton.jit
def load_vector(ptr, cols, C: tl.constexpr):
    """A per-channel vector in float32; None for the pointer None."""
    if ptr is None:
        vector = None
    else:
        vector = tl.load(ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    return vector


@triton.jit
def affine(y, scale, shift):
    """s y + t; y is [rows, channels], the vectors are [channels]."""
    return y.to(tl.float32) * scale[None, :] + shift[None, :]


@triton.jit
def closing(y, r, scale, shift, r_scale, r_shift):
    """z = s y + t [+ r, or + s_d r + t_d]; what there is none of is None.

    Forward and backward use this one expression, so both see the same sign.
    """
    z = affine(y, scale, shift)
    if r_scale is not None:
        z += affine(r, r_scale, r_shift)
    elif r is not None:
        z += r.to(tl.float32)
    return z


@triton.jit
def bn_backward(dz, y, a, b, c, center):
    """dy = A dz + B (y - mu) + C; A dz if BatchNorm is frozen: B is None."""
    if b is None:
        dy = a[None, :] * dz.to(tl.float32)
    else:
        dy = a[None, :] * dz.to(tl.float32) + b[None, :] * (y.to(tl.float32) - center[None, :]) + c[None, :]
    return dy


@triton.jit
def tile_moments(value, mask, count):
    """Mean and M2 per channel of the masked rows of a tile [rows, channels]."""
    mean = tl.sum(tl.where(mask[:, None], value, 0.0), 0) / count
    off = tl.where(mask[:, None], value - mean[None, :], 0.0)
    return mean, tl.sum(off * off, 0)


@triton.jit
def merge_moments(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """The moments of the union (Chan, Golub, LeVeque 1979). An empty half changes nothing."""
    count = count_a + count_b
    share = tl.where(count > 0, count_b / tl.maximum(count, 1.0), 0.0)
    delta = mean_b - mean_a
    return count, mean_a + delta * share, m2_a + m2_b + delta * delta * count_a * share


@triton.jit
def merge_rows(count, mean, m2):
    """The moments of the union of all rows, each [rows, channels]. An empty row is all zeros; the first is not empty.

    Chan's formula for any number of pieces, relative to the first one's mean: |mean| >> std loses no precision.
    """
    row = tl.arange(0, mean.shape[0])[:, None]
    origin = tl.sum(tl.where(row == 0, mean, 0.0), 0)
    total = tl.sum(count, 0)
    center = origin + tl.sum(count * (mean - origin[None, :]), 0) / total
    off = mean - center[None, :]
    return total, center, tl.sum(m2 + count * off * off, 0)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """float32 rounded to nearest even, as it is stored. The interpreter's own cast to bfloat16 truncates."""
    if _INTERPRET and DTYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(DTYPE)


@triton.jit
def dot(a, b, acc, TF32: tl.constexpr):
    """acc + a @ b, summed in float32. The interpreter would multiply bfloat16's raw bits, so there both are widened."""
    if _INTERPRET:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif TF32:
        acc = tl.dot(a, b, acc, input_precision="tf32")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc
