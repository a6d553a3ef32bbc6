"""Every formula of a chain for Triton kernels, once (csrc/bn_math.h has the same formulas for C++).

    z = s y + t (+ residual)       a = act(z)       dz = g act'(z)       dy = A dz + B (y - mu) + C
    (count, mean, M2) of two halves, merged by Chan's formula

Everything is float32. act and act' send NaN and the kinks where ATen's operators send them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_resnet.backends.triton.runtime import INTERPRET
from fused_resnet.spec import ACTIVATIONS

_INTERPRET = tl.constexpr(INTERPRET)
# The number that kernels take for an activation: its index in the table of fused_resnet/spec.py.
_IDENTITY, _RELU, _LEAKY_RELU, _ELU, _SIGMOID, _SILU, _RELU6, _HARDSWISH = (
    tl.constexpr(i) for i in range(len(ACTIVATIONS))
)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def act(z, ACT: tl.constexpr, act_param):
    """act(z); act_param is negative_slope or alpha."""
    if ACT == _RELU:
        a = tl.where(z < 0, 0.0, z)
    elif ACT == _LEAKY_RELU:
        a = tl.where(z > 0, z, z * act_param)
    elif ACT == _ELU:
        a = tl.where(z <= 0, act_param * (tl.exp(z) - 1.0), z)
    elif ACT == _SIGMOID:
        a = sigmoid(z)
    elif ACT == _SILU:
        a = z * sigmoid(z)
    elif ACT == _RELU6:
        a = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACT == _HARDSWISH:
        u = z + 3.0
        a = z * tl.where(u < 0, 0.0, tl.where(u > 6, 6.0, u)) / 6.0
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
        dz = tl.where(z > 0, g, g * act_param * tl.exp(z))
    elif ACT == _SIGMOID:
        s = sigmoid(z)
        dz = g * s * (1.0 - s)
    elif ACT == _SILU:
        s = sigmoid(z)
        dz = g * s * (1.0 + z * (1.0 - s))
    elif ACT == _RELU6:
        dz = tl.where(z <= 0, 0.0, tl.where(z >= 6, 0.0, g))
    elif ACT == _HARDSWISH:
        dz = tl.where(z <= -3, 0.0, tl.where(z >= 3, g, g * (z / 3.0 + 0.5)))
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
