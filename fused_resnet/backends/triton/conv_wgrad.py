"""wgrad: the gradient of a convolution's weight, with BatchNorm's backward and the prologue recomputed on load."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends import DyCoefficients, Prologue, allow_tf32
from fused_resnet.backends.triton import configs, formulas
from fused_resnet.backends.triton.geometry import Geometry, vectors
from fused_resnet.backends.triton.runtime import cdiv, empty_nhwc, launch, wide
from fused_resnet.spec import Act


@triton.jit(do_not_specialize=["M", "steps"])
def conv_wgrad_kernel(
    dz_ptr, y_ptr, a_ptr, b_ptr, c_ptr, center_ptr, x_ptr, scale_ptr, shift_ptr, dw_ptr,
    M, steps, pre_act_param,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, POINTWISE: tl.constexpr, PRE_ACT: tl.constexpr,
    TF32: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[split, k, r, s, c] = sum over the split's m of dy[m, k] * pre(x[n, p*stride - pad + r*dil, q.., c])

    m = (n, p, q) is an output pixel. dy = A dz + B (y - center) + C and pre(x) = act(scale*x + shift) are formed on
    load; a padded pixel is 0 after pre. Beyond the last m dy or pre(x) is 0.

    Tile: BLOCK_M output channels by BLOCK_N of the R*S*C columns of dw; the sum runs over `steps` times BLOCK_K pixels.
    If C is a multiple of BLOCK_N all columns of a tile have one tap, otherwise each column has its own.
    Traffic: dz, y (frozen: dz alone) and x once, because the tiles of a split run side by side and share them in L2; dw
    in float32 once per split.
    Source: implicit GEMM with split-K, as CUTLASS's conv2d_wgrad.
    """
    COLUMNS: tl.constexpr = R * S * C
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (K + BLOCK_M - 1) // BLOCK_M * TILES_N
    OWN_TAPS: tl.constexpr = C % BLOCK_N != 0
    PADDED: tl.constexpr = PAD_H + PAD_W > 0
    pid = tl.program_id(0)
    split = pid // TILES
    if WIDE:
        split = split.to(tl.int64)
    tile = pid % TILES
    k = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    j0 = tile % TILES_N * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    in_k = k < K
    in_j = j < COLUMNS
    tap = j // C if OWN_TAPS else j0 // C
    c = j - tap * C
    r = tap // S * DIL_H
    s = tap % S * DIL_W
    m = split * steps * BLOCK_K + tl.arange(0, BLOCK_K)

    a = formulas.load_vector(a_ptr, k, K)
    b = formulas.load_vector(b_ptr, k, K)
    constant = formulas.load_vector(c_ptr, k, K)
    center = formulas.load_vector(center_ptr, k, K)
    if scale_ptr is not None:
        # c is a valid channel in every column, even in the last ones beyond R*S*C
        scale = tl.load(scale_ptr + c)
        shift = tl.load(shift_ptr + c)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(steps > 0)
    for _ in range(0, steps):
        in_m = m < M
        dz_offsets = (m * K)[:, None] + k[None, :]
        dz_mask = in_m[:, None] & in_k[None, :]
        dz = tl.load(dz_ptr + dz_offsets, mask=dz_mask, other=0.0)
        y = None if b is None else tl.load(y_ptr + dz_offsets, mask=dz_mask, other=0.0)
        dy = formulas.bn_backward(dz, y, a, b, constant, center)
        if POINTWISE:
            x_offsets = (m * C)[:, None] + j[None, :]
            inside = in_m[:, None] & in_j[None, :]
        else:
            n = m // (OH * OW)
            row = ((m // OW - n * OH) * STRIDE_H - PAD_H).to(tl.int32)
            column = (m % OW * STRIDE_W - PAD_W).to(tl.int32)
            x_offsets = (((n * H + row) * W + column) * C)[:, None] + ((r * W + s) * C + c)[None, :]
            inside = in_m[:, None] & in_j[None, :]
            if PADDED and OWN_TAPS:
                rows = row[:, None] + r[None, :]
                columns = column[:, None] + s[None, :]
                inside &= (rows >= 0) & (rows < H) & (columns >= 0) & (columns < W)
            elif PADDED:
                row += r
                column += s
                inside &= ((row >= 0) & (row < H) & (column >= 0) & (column < W))[:, None]
        x = tl.load(x_ptr + x_offsets, mask=inside, other=0.0)
        if scale_ptr is not None:
            x_pre = formulas.act(formulas.affine(x, scale, shift), PRE_ACT, pre_act_param)
            if PADDED:
                x_pre = tl.where(inside, x_pre, 0.0)
            x = formulas.narrow(x_pre, x_ptr.dtype.element_ty)
        if scale_ptr is not None and not PADDED and b is not None:
            # in every other case x or dy is 0 beyond the last m
            dy = tl.where(in_m[:, None], dy, 0.0)
        acc = formulas.dot(tl.trans(formulas.narrow(dy, x.dtype)), x, acc, TF32)
        m += BLOCK_K

    dw_offsets = (split * K + k)[:, None] * COLUMNS + j[None, :]
    tl.store(dw_ptr + dw_offsets, formulas.narrow(acc, dw_ptr.dtype.element_ty), mask=in_k[:, None] & in_j[None, :])


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(part_ptr, dw_ptr, N, splits, WIDE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """dw[i] = sum over s of part[s, i], in float32. BLOCK_S alone determines the order.

    Tile: BLOCK_S splits by BLOCK_N elements of dw, a loop over the splits.
    Traffic: 4 bytes per element and split read, dw written once.
    """
    start = tl.program_id(0)
    if WIDE:
        start = start.to(tl.int64)
    i = start * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    if WIDE:
        s = s.to(tl.int64)
    acc = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for first in range(0, splits, BLOCK_S):
        mask = (first + s < splits)[:, None] & (i < N)[None, :]
        acc += tl.load(part_ptr + ((first + s) * N)[:, None] + i[None, :], mask=mask, other=0.0)
    tl.store(dw_ptr + i, formulas.narrow(tl.sum(acc, 0), dw_ptr.dtype.element_ty), mask=i < N)


def conv_wgrad(
    dz: Tensor, y: Tensor, coef: DyCoefficients, x: Tensor, prologue: Prologue | None, weight: Tensor, g: Geometry
) -> Tensor:
    """dW in the dtype of ``weight``, KRSC in memory.

    Args:
        dz, y, x: NHWC in memory. weight: only its shape and dtype are used.
    """
    dw = empty_nhwc(weight, weight.shape)
    if g.m == 0:
        return dw.zero_()
    tf32 = allow_tf32(x.dtype)
    frozen = coef.b is None
    columns = g.taps * g.c
    config = configs.choose("wgrad", g.k, columns, g.m, g.c, x, tf32=tf32, formed=not frozen)
    steps = cdiv(cdiv(g.m, config.block_k), config.splits)
    splits = cdiv(cdiv(g.m, config.block_k), steps)
    part = dw if splits == 1 else torch.empty((splits, dw.numel()), dtype=torch.float32, device=x.device)
    norm, pre_act = (None, Act("identity")) if prologue is None else prologue
    launch(
        conv_wgrad_kernel,
        (splits * cdiv(g.k, config.block_m) * cdiv(columns, config.block_n),),
        dz, y, coef.a, coef.b, coef.c, coef.center,
        x, *vectors(norm)[:2], part,
        g.m, steps, float(pre_act.param),
        **g.constants(),
        PRE_ACT=pre_act.index,
        TF32=tf32,
        WIDE=wide(dz, x, part),
        **config.constants(),
        reads=(dz, None if frozen else y, g.x_bytes(x)),
        writes=(part,),
    )  # fmt: skip
    if splits > 1:
        block_s = min(64, triton.next_power_of_2(splits))
        block_n = max(32, 1024 // block_s)
        launch(
            sum_splits_kernel, (cdiv(dw.numel(), block_n),), part, dw, dw.numel(), splits,
            WIDE=wide(part), BLOCK_S=block_s, BLOCK_N=block_n, writes=(dw,),
        )  # fmt: skip
    return dw
