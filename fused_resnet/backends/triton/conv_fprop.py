"""fprop: the forward convolution as an implicit matrix product, one kernel for every size of kernel and stride."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends import Prologue, allow_tf32
from fused_resnet.backends.triton import configs, formulas
from fused_resnet.backends.triton.geometry import Geometry, inside_table, vectors
from fused_resnet.backends.triton.runtime import cdiv, empty_nhwc, launch, wide
from fused_resnet.spec import Act


@triton.jit(do_not_specialize=["M"])
def conv_fprop_kernel(
    x_ptr, w_ptr, y_ptr, scale_ptr, shift_ptr, inside_ptr, bias_ptr, residual_ptr, mean_ptr, m2_ptr,
    M, pre_act_param, act_param,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, POINTWISE: tl.constexpr, PRE_ACT: tl.constexpr,
    ACT: tl.constexpr, TF32: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, k] = sum over (r, s, c) of pre(x[n, p*stride - pad + r*dil, q*stride - pad + s*dil, c]) * w[k, r, s, c]

    m = (n, p, q) is an output pixel; pre(x) = act(scale*x + shift), or x; a padded pixel is 0 after it.
    Epilogue: act(y + bias + residual), as far as given, and the mean and M2 of the tile's y as stored.

    Tile: BLOCK_M pixels by BLOCK_N channels of y; the sum runs flat over R*S*C in steps of BLOCK_K. Where C is a
    multiple of BLOCK_K a step has one tap; elsewhere (the stem's 3 channels) every column of the step has its own.
    Neighbouring programs share their pixels, so all but the first read x from L2.
    Traffic: x and w once, y once (+ residual once, + 8 bytes per channel and BLOCK_M pixels of statistics).
    Source: implicit GEMM, Chetlur et al. 2014 (arXiv 1410.0759); statistics as in Chan, Golub, LeVeque 1979.
    """
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    COLUMNS: tl.constexpr = R * S * C
    OWN_TAPS: tl.constexpr = C % BLOCK_K != 0
    PADDED: tl.constexpr = PAD_H + PAD_W > 0
    pid = tl.program_id(0)
    tile_m = pid // TILES_N
    if WIDE:
        tile_m = tile_m.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    in_m = m < M
    in_k = k < K

    if POINTWISE:
        x_offsets = (m * C)[:, None]
    else:
        n = m // (OH * OW)
        p = m // OW - n * OH
        q = m % OW
        pixel = (m % (OH * OW)).to(tl.int32)
        top = (p * STRIDE_H - PAD_H).to(tl.int32)
        left = (q * STRIDE_W - PAD_W).to(tl.int32)
        x_offsets = (((n * H + top) * W + left) * C)[:, None]
    if not OWN_TAPS:
        x_offsets += lane[None, :]
    w_offsets = k[None, :] * COLUMNS + lane[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j0 in range(0, COLUMNS, BLOCK_K):
        inside = in_m[:, None]
        w_mask = in_k[None, :]
        if OWN_TAPS:
            j = j0 + lane
            tap = j // C
            c = j - tap * C
            r = tap // S * DIL_H
            s = tap % S * DIL_W
            inside &= (j < COLUMNS)[None, :]
            w_mask &= (j < COLUMNS)[:, None]
            if PADDED:
                row = top[:, None] + r[None, :]
                column = left[:, None] + s[None, :]
                inside &= (row >= 0) & (row < H) & (column >= 0) & (column < W)
            x = tl.load(x_ptr + (x_offsets + ((r * W + s) * C + c)[None, :]), mask=inside, other=0.0)
        else:
            tap = j0 // C
            c = j0 - tap * C + lane
            r = tap // S * DIL_H
            s = tap % S * DIL_W
            if PADDED:
                row = top + r
                column = left + s
                inside &= ((row >= 0) & (row < H) & (column >= 0) & (column < W))[:, None]
            x = tl.load(x_ptr + x_offsets + ((r * W + s) * C + j0 - tap * C), mask=inside, other=0.0)
        w = tl.load(w_ptr + w_offsets + j0, mask=w_mask, other=0.0)
        if scale_ptr is not None:
            # c is a valid channel in every column, even in the last ones beyond R*S*C
            a = formulas.affine(x, tl.load(scale_ptr + c), tl.load(shift_ptr + c))
            a = formulas.act(a, PRE_ACT, pre_act_param)
            if inside_ptr is not None:
                a = tl.where((tl.load(inside_ptr + (tap * (OH * OW) + pixel)) != 0)[:, None], a, 0.0)
            elif PADDED or OWN_TAPS:
                a = tl.where(inside, a, 0.0)
            x = formulas.narrow(a, w.dtype)
        acc = formulas.dot(x, w, acc, TF32)

    # adds 0: otherwise ptxas may convert y before the wait for the last wgmma, and serialize all of them (C7514)
    acc += tl.minimum(M, 0).to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
    y_offsets = (m * K)[:, None] + k[None, :]
    y_mask = in_m[:, None] & in_k[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + y_offsets, mask=y_mask, other=0.0).to(tl.float32)
    y = formulas.narrow(formulas.act(acc, ACT, act_param), y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_offsets, y, mask=y_mask)
    if mean_ptr is not None:
        count = tl.minimum(M - tile_m * BLOCK_M, BLOCK_M).to(tl.float32)
        mean, m2 = formulas.tile_moments(y.to(tl.float32), in_m, count)
        tl.store(mean_ptr + tile_m * K + k, mean, mask=in_k)
        tl.store(m2_ptr + tile_m * K + k, m2, mask=in_k)


def conv_fprop(
    x: Tensor,
    weight: Tensor,
    g: Geometry,
    prologue: Prologue | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: Act | None = None,
    stats: bool = False,
) -> tuple[Tensor, Tensor | None, int]:
    """y and, if ``stats``, its mean and M2 per tile [2, tiles, K]; and the pixels per tile (the last may have fewer).

    Args:
        x, residual: NHWC in memory. weight: KRSC in memory, in x's dtype. bias: [K].
    """
    tf32 = allow_tf32(x.dtype)
    config = configs.choose("fprop", g.m, g.k, g.taps * g.c, g.c, x, tf32=tf32, formed=prologue is not None)
    y = empty_nhwc(x, g.y_shape)
    tiles = cdiv(g.m, config.block_m)
    table = inside_table((g.axes(),), x.device) if prologue and g.padded and g.c % config.block_k == 0 else None
    moments = torch.empty((2, tiles, g.k), dtype=torch.float32, device=x.device) if stats else None
    norm, pre_act = (None, Act("identity")) if prologue is None else prologue
    act = act or Act("identity")
    launch(
        conv_fprop_kernel,
        (tiles * cdiv(g.k, config.block_n),),
        x, weight, y,
        *vectors(norm)[:2], table,
        bias, residual, *((None, None) if moments is None else moments),
        g.m, float(pre_act.param), float(act.param),
        **g.constants(),
        PRE_ACT=pre_act.index,
        ACT=act.index,
        TF32=tf32,
        WIDE=wide(x, y, weight),
        **config.constants(),
        reads=(g.x_bytes(x), weight, table, bias, residual, *vectors(norm)[:2]),
        writes=(y, moments),
    )  # fmt: skip
    return y, moments, config.block_m
