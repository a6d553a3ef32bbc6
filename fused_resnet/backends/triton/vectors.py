"""BatchNorm's vectors of C elements: one small launch each; composed operators would take a dozen."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends import BnCoefficients, BnFold, DyCoefficients, Norm
from fused_resnet.backends.triton.formulas import load_vector
from fused_resnet.backends.triton.runtime import cdiv, launch

_BLOCK = 256


@triton.jit
def _bn_fold_kernel(
    mean_ptr, var_ptr, weight_ptr, bias_ptr, conv_bias_ptr, scale_ptr, shift_ptr, center_ptr, rstd_ptr,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """rstd = 1/sqrt(var + eps), scale = weight rstd, center = mean - conv_bias, shift = bias - center scale.

    Tile: BLOCK channels. Traffic: at most 36 bytes per channel.
    """
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < C
    center = load_vector(mean_ptr, cols, C)
    if conv_bias_ptr is not None:
        center -= load_vector(conv_bias_ptr, cols, C)
    rstd = 1.0 / tl.sqrt_rn(load_vector(var_ptr, cols, C) + eps)
    scale = rstd
    if weight_ptr is not None:
        scale = load_vector(weight_ptr, cols, C) * rstd
    shift = -center * scale
    if bias_ptr is not None:
        shift += load_vector(bias_ptr, cols, C)
    tl.store(scale_ptr + cols, scale, mask=mask)
    tl.store(shift_ptr + cols, shift, mask=mask)
    tl.store(center_ptr + cols, center, mask=mask)
    tl.store(rstd_ptr + cols, rstd, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _bn_coefficients_kernel(
    scale_ptr, rstd_ptr, sum_ptr, sum_y_ptr, dgamma_ptr, b_ptr, c_ptr,
    count,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dgamma = rstd sum dz (y - mu);  B = -scale rstd dgamma / M,  C = -scale sum dz / M (neither if frozen).

    Tile: BLOCK channels. Traffic: at most 28 bytes per channel.
    """
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < C
    rstd = load_vector(rstd_ptr, cols, C)
    dgamma = rstd * load_vector(sum_y_ptr, cols, C)
    tl.store(dgamma_ptr + cols, dgamma, mask=mask)
    if b_ptr is not None:
        share = load_vector(scale_ptr, cols, C) / -count.to(tl.float32)
        tl.store(b_ptr + cols, share * rstd * dgamma, mask=mask)
        tl.store(c_ptr + cols, share * load_vector(sum_ptr, cols, C), mask=mask)


def bn_fold(call: BnFold) -> Norm:
    channels = call.mean.numel()
    norm = Norm(*(torch.empty(channels, dtype=torch.float32, device=call.mean.device) for _ in range(4)))
    launch(
        _bn_fold_kernel, (cdiv(channels, _BLOCK),),
        call.mean, call.var, call.weight, call.bias, call.conv_bias, *norm, float(call.eps),
        C=channels, BLOCK=_BLOCK, writes=norm,
    )  # fmt: skip
    return norm


def bn_coefficients(call: BnCoefficients) -> tuple[Tensor, DyCoefficients]:
    norm, sums, count = call.norm, call.sums, call.count
    channels, frozen = norm.scale.numel(), count is None
    dgamma, *bc = (
        torch.empty(channels, dtype=torch.float32, device=norm.scale.device) for _ in range(1 if frozen else 3)
    )
    b, c = bc if bc else (None, None)
    launch(
        _bn_coefficients_kernel, (cdiv(channels, _BLOCK),), norm.scale, norm.rstd, *sums, dgamma, b, c, count or 0,
        C=channels, BLOCK=_BLOCK, writes=(dgamma, b, c),
    )  # fmt: skip
    return dgamma, DyCoefficients(norm.scale, b, c, norm.center)
