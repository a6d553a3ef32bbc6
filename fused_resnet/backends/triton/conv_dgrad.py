"""dgrad: the gradient of a convolution's input, fused with the backward of BatchNorm and activation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends import Closing, DyCoefficients, allow_tf32
from fused_resnet.backends.triton import configs, formulas
from fused_resnet.backends.triton.geometry import Geometry, Phase, inside_table, vectors
from fused_resnet.backends.triton.runtime import cdiv, empty_nhwc, launch, wide
from fused_resnet.spec import Act


@triton.jit
def _tile(
    tile_m, tile_n, row,
    dz_ptr, y_ptr, a_ptr, b_ptr, c_ptr, center_ptr, w_ptr, inside_ptr, dx_ptr, add_ptr,
    x_ptr, scale_ptr, shift_ptr, x_center_ptr, summand_ptr, summand_scale_ptr, summand_shift_ptr, summand_center_ptr,
    sum_dz_ptr, sum_dzx_ptr, sum_dzs_ptr,
    N, act_param,
    PHASE_H: tl.constexpr, PHASE_W: tl.constexpr, MASKED: tl.constexpr, TABLE: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, POINTWISE: tl.constexpr,
    ACT: tl.constexpr, TF32: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """conv_dgrad_kernel's tile of one phase.

    PHASE_H and PHASE_W are ``Phase.constants``. TABLE is the start of the phase's taps in the table of what is inside.
    ``row`` is the row of its sums.
    """
    AT_H: tl.constexpr = PHASE_H[0]
    TAP_H: tl.constexpr = PHASE_H[1]
    TAPS_H: tl.constexpr = PHASE_H[2]
    TAP_STEP_H: tl.constexpr = PHASE_H[3]
    FIRST_H: tl.constexpr = PHASE_H[4]
    STEP_H: tl.constexpr = PHASE_H[5]
    AT_W: tl.constexpr = PHASE_W[0]
    TAP_W: tl.constexpr = PHASE_W[1]
    TAPS_W: tl.constexpr = PHASE_W[2]
    TAP_STEP_W: tl.constexpr = PHASE_W[3]
    FIRST_W: tl.constexpr = PHASE_W[4]
    STEP_W: tl.constexpr = PHASE_W[5]
    SIZE_H: tl.constexpr = (H - AT_H + STRIDE_H - 1) // STRIDE_H
    SIZE_W: tl.constexpr = (W - AT_W + STRIDE_W - 1) // STRIDE_W
    COLUMNS: tl.constexpr = TAPS_H * TAPS_W * K
    OWN_TAPS: tl.constexpr = K % BLOCK_K != 0
    M = N * (SIZE_H * SIZE_W)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    in_m = m < M
    in_c = c < C

    if POINTWISE:
        pixel = m
        dy_offsets = (m * K)[:, None]
    else:
        n = m // (SIZE_H * SIZE_W)
        i = m // SIZE_W - n * SIZE_H
        j = m % SIZE_W
        pixel = (n * H + AT_H + i * STRIDE_H) * W + AT_W + j * STRIDE_W
        place = (m % (SIZE_H * SIZE_W)).to(tl.int32)
        bottom = (i + FIRST_H).to(tl.int32)
        right = (j + FIRST_W).to(tl.int32)
        dy_offsets = (((n * OH + bottom) * OW + right) * K)[:, None]
    w_offsets = c[None, :]
    if not OWN_TAPS:
        dy_offsets += lane[None, :]
        w_offsets += (lane * (R * S * C))[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j0 in range(0, COLUMNS, BLOCK_K):
        inside = in_m[:, None]
        w_mask = in_c[None, :]
        if OWN_TAPS:
            tap = (j0 + lane) // K
            k = j0 + lane - tap * K
            u = tap // TAPS_W
            v = tap % TAPS_W
            in_columns = j0 + lane < COLUMNS
            inside &= in_columns[None, :]
            w_mask &= in_columns[:, None]
            dy_step = (k - (u * STEP_H * OW + v * STEP_W) * K)[None, :]
            w_step = (k * (R * S * C) + ((TAP_H + u * TAP_STEP_H) * S + TAP_W + v * TAP_STEP_W) * C)[:, None]
            if MASKED:
                p = bottom[:, None] - (u * STEP_H)[None, :]
                q = right[:, None] - (v * STEP_W)[None, :]
                inside &= (p >= 0) & (p < OH) & (q >= 0) & (q < OW)
        else:
            tap = j0 // K
            k0 = j0 - tap * K
            k = k0 + lane
            u = tap // TAPS_W
            v = tap % TAPS_W
            dy_step = k0 - (u * STEP_H * OW + v * STEP_W) * K
            w_step = k0 * (R * S * C) + ((TAP_H + u * TAP_STEP_H) * S + TAP_W + v * TAP_STEP_W) * C
            if MASKED:
                p = bottom - u * STEP_H
                q = right - v * STEP_W
                inside &= ((p >= 0) & (p < OH) & (q >= 0) & (q < OW))[:, None]
        offsets = dy_offsets + dy_step
        w = tl.load(w_ptr + (w_offsets + w_step), mask=w_mask, other=0.0)
        dz = tl.load(dz_ptr + offsets, mask=inside, other=0.0)
        a = tl.load(a_ptr + k)
        if b_ptr is None:
            dy = formulas.bn_backward(dz, None, a, None, None, None)
        else:
            y = tl.load(y_ptr + offsets, mask=inside, other=0.0)
            b = tl.load(b_ptr + k)
            dy = formulas.bn_backward(dz, y, a, b, tl.load(c_ptr + k), tl.load(center_ptr + k))
            if MASKED and inside_ptr is not None:
                dy = tl.where((tl.load(inside_ptr + (TABLE + tap * (SIZE_H * SIZE_W) + place)) != 0)[:, None], dy, 0.0)
            elif MASKED or OWN_TAPS:
                dy = tl.where(inside, dy, 0.0)
        acc = formulas.dot(formulas.narrow(dy, w.dtype), w, acc, TF32)

    offsets = (pixel * C)[:, None] + c[None, :]
    mask = in_m[:, None] & in_c[None, :]
    if add_ptr is not None:
        acc += tl.load(add_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if x_ptr is not None:
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        scale = formulas.load_vector(scale_ptr, c, C)
        shift = formulas.load_vector(shift_ptr, c, C)
        center = formulas.load_vector(x_center_ptr, c, C)
        summand = None if summand_ptr is None else tl.load(summand_ptr + offsets, mask=mask, other=0.0)
        summand_scale = formulas.load_vector(summand_scale_ptr, c, C)
        summand_shift = formulas.load_vector(summand_shift_ptr, c, C)
        z = formulas.closing(x, summand, scale, shift, summand_scale, summand_shift)
        # without a mask dy of rows beyond M is not 0
        acc = tl.where(in_m[:, None], formulas.act_backward(acc, z, ACT, act_param), 0.0)
        tl.store(sum_dz_ptr + row * C + c, tl.sum(acc, 0), mask=in_c)
        if sum_dzs_ptr is not None:
            # loaded again, from cache: both would not fit into registers until here
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        tl.store(sum_dzx_ptr + row * C + c, tl.sum(acc * (x.to(tl.float32) - center[None, :]), 0), mask=in_c)
        if sum_dzs_ptr is not None:
            summand = tl.load(summand_ptr + offsets, mask=mask, other=0.0)
            off = summand.to(tl.float32) - formulas.load_vector(summand_center_ptr, c, C)[None, :]
            tl.store(sum_dzs_ptr + row * C + c, tl.sum(acc * off, 0), mask=in_c)
    tl.store(dx_ptr + offsets, formulas.narrow(acc, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def conv_dgrad_kernel(
    dz_ptr, y_ptr, a_ptr, b_ptr, c_ptr, center_ptr, w_ptr, inside_ptr, dx_ptr, add_ptr,
    x_ptr, scale_ptr, shift_ptr, x_center_ptr, summand_ptr, summand_scale_ptr, summand_shift_ptr, summand_center_ptr,
    sum_dz_ptr, sum_dzx_ptr, sum_dzs_ptr,
    N, act_param,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PHASES: tl.constexpr, COUNT: tl.constexpr, POINTWISE: tl.constexpr,
    ACT: tl.constexpr, TF32: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """da[n, h, w, c] = sum over (r, s, k) of dy[n, p, q, k] * w[k, r, s, c],   p*stride - pad + r*dil = h, q as p

    dy = A dz + B (y - center) + C is formed on load, and 0 outside the image (set after it, as C is not 0).
    Epilogue: dx = da (+ add). If a closing comes before this input, x is its raw output and dx = (da + add) act'(z),
    z = scale*x + shift [+ summand, or + its own scale and shift of it], with the tile's sums of dx, dx*(x - x_center)
    [and dx*(summand - summand_center)].

    PHASES, COUNT of them (geometry.Phase): the same taps reach the pixels h = AT_H + STRIDE_H*i, w = AT_W + STRIDE_W*j
    of dx. So no tap is multiplied without use, and no sum needs atomics. Stride 1 has one phase.
    Tile: BLOCK_M pixels by BLOCK_N channels of dx in one phase; the sum runs flat over taps*K in steps of BLOCK_K. The
    phases of the same pixels run side by side and share dz and y in L2. Each phase is compiled with its own bounds.
    Traffic: dz and y once (frozen: dz alone), w once, dx once; add, x and the summand once each, if given.
    Source: implicit GEMM; strided dgrad by parity as in CUTLASS (conv2d_dgrad, Analytic iterator).
    """
    TILES_N: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0) // COUNT
    tile_m = pid // TILES_N
    if WIDE:
        tile_m = tile_m.to(tl.int64)
    for f in tl.static_range(COUNT):
        if tl.program_id(0) % COUNT == f:
            row = tile_m * COUNT + f
            _tile(
                tile_m, pid % TILES_N, row, dz_ptr, y_ptr, a_ptr, b_ptr, c_ptr, center_ptr, w_ptr,
                inside_ptr, dx_ptr, add_ptr, x_ptr, scale_ptr, shift_ptr, x_center_ptr, summand_ptr,
                summand_scale_ptr, summand_shift_ptr, summand_center_ptr, sum_dz_ptr, sum_dzx_ptr,
                sum_dzs_ptr, N, act_param, PHASES[f][0], PHASES[f][1], PHASES[f][2], PHASES[f][3],
                C, K, H, W, OH, OW, R, S, STRIDE_H, STRIDE_W, POINTWISE, ACT, TF32, WIDE,
                BLOCK_M, BLOCK_N, BLOCK_K
            )  # fmt: skip


def conv_dgrad(
    dz: Tensor,
    y: Tensor,
    coef: DyCoefficients,
    x: Tensor,
    weight: Tensor,
    g: Geometry,
    add: Tensor | None,
    closing: Closing | None,
) -> tuple[Tensor, Tensor]:
    """dx and partial sums [kinds, tiles, C]. Without a closing there are no kinds.

    With one dx is its dz, and the sums are of dz, dz*(y - center) [and dz*(summand - its center)].

    Args:
        dz, y, add, closing: NHWC in memory; ``add`` may be overwritten, unless it is dz.
        x: only its shape and dtype are used. weight: KRSC in memory, in x's dtype.
    """
    tf32 = allow_tf32(x.dtype)
    frozen = coef.b is None
    in_place = add is not None and add.dtype == x.dtype and not _same_memory(add, dz)
    dx = add if add is not None and in_place else empty_nhwc(x, x.shape)
    rows = Phase.all(g.h, g.oh, g.r, g.conv.stride[0], g.conv.padding[0], g.conv.dilation[0])
    columns = Phase.all(g.w, g.ow, g.s, g.conv.stride[1], g.conv.padding[1], g.conv.dilation[1])
    # a phase without taps only closes what is there
    phases = [(h, w) for h, w in product(rows, columns) if h.taps * w.taps or closing or not in_place]
    pixels = max((g.n * h.size * w.size for h, w in phases), default=0)
    most = max((h.taps * w.taps for h, w in phases), default=0)
    config = configs.choose("dgrad", pixels, g.c, g.k * most, g.k, x, tf32=tf32, formed=not frozen)
    tiles = cdiv(pixels, config.block_m)
    kinds = 0 if closing is None else 2 if closing.summand_norm is None else 3
    partials = torch.empty((kinds, tiles * len(phases), g.c), dtype=torch.float32, device=x.device)
    operands, act = _closing_operands(closing)
    places, table = _places(phases, g, g.k % config.block_k == 0 and not frozen, x.device)
    done = sum(g.n * h.size * w.size for h, w in phases)
    taps = sum(h.taps * w.taps for h, w in phases)
    launch(
        conv_dgrad_kernel,
        (tiles * len(phases) * cdiv(g.c, config.block_n),),
        dz, y, coef.a, coef.b, coef.c, coef.center, weight, table, dx, add,
        *operands, *partials, *[None] * (3 - kinds),
        g.n, float(act.param),
        C=g.c, K=g.k, H=g.h, W=g.w, OH=g.oh, OW=g.ow, R=g.r, S=g.s,
        STRIDE_H=g.conv.stride[0], STRIDE_W=g.conv.stride[1],
        PHASES=tuple(places), COUNT=len(places),
        POINTWISE=g.pointwise,
        ACT=act.index,
        TF32=tf32,
        WIDE=wide(dz, x, weight),
        **config.constants(),
        reads=(
            dz if taps else None,
            y if taps and not frozen else None,
            weight.numel() * weight.element_size() * taps // g.taps,
            table,
            *(done * g.c * t.element_size() for t in (add, *operands) if t is not None and t.dim() == 4),
        ),
        writes=(done * g.c * dx.element_size(), partials),
    )  # fmt: skip
    return dx, partials


def _places(
    phases: Sequence[tuple[Phase, Phase]], g: Geometry, looked_up: bool, device: torch.device
) -> tuple[list[Any], Tensor | None]:
    """The kernel's constants of each phase, with the start of its part of the table; and the table, if there is one."""
    places, axes, start = [], [], 0
    for h, w in phases:
        masked = h.masked or w.masked
        places.append((h.constants(), w.constants(), masked, start))
        if masked and looked_up:
            axes.append((h.axis(g.oh), w.axis(g.ow)))
            start += h.taps * w.taps * h.size * w.size
    return places, inside_table(tuple(axes), device) if axes else None


def _closing_operands(closing: Closing | None) -> tuple[list[Tensor | None], Act]:
    """The kernel's arguments y, its vectors, the summand, its vectors; and the activation."""
    if closing is None:
        return [None] * 8, Act("identity")
    own, others = vectors(closing.norm), vectors(closing.summand_norm)
    return [closing.y, *own, closing.summand, *others], closing.act


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.device.type != "meta" and a.data_ptr() == b.data_ptr())
