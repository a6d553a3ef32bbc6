"""BatchNorm's own passes over [M, C], M = N*H*W: statistics, the closing normalise + add + act, and their backwards.

A kernel reads and writes each tensor once, 16 bytes at a time if C is a multiple of 8 (4 in float32). Each program of a
reduction writes a row of partial results. reduce.py merges the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends import BnAct, BnActBackward, BnBackward, BnStats, Sums
from fused_resnet.backends.triton import formulas
from fused_resnet.backends.triton.configs import target_of
from fused_resnet.backends.triton.formulas import act_backward, load_vector, merge_rows, narrow
from fused_resnet.backends.triton.geometry import nhwc, vectors
from fused_resnet.backends.triton.reduce import merge_moments, sum_partials
from fused_resnet.backends.triton.runtime import cdiv, empty_nhwc, launch, wide

# Elements of a tile: 8 per thread, one 16-byte access of 16-bit elements. A reduction has fewer programs with twice as
# many elements each, unless it has a residual's norm, whose vectors and sums need the registers.
_TILE, _WIDEST = 1024, 128
# Programs of a reduction per processor: all are resident at once.
_PROGRAMS = 4


@triton.jit
def _tile_at(start, end, cols, C: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """Offsets and mask of BLOCK_M rows from ``start`` on, those before ``end``, in the columns ``cols``."""
    row = start + tl.arange(0, BLOCK_M)
    mask = (row < end)[:, None] & (cols < C)[None, :]
    if WIDE:
        row = row.to(tl.int64)
    return row[:, None] * C + cols[None, :], mask


@triton.jit(do_not_specialize=["M", "rows"])
def _bn_stats_kernel(
    y_ptr, mean_ptr, m2_ptr,
    M, rows,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mean and M2 per channel of ``rows`` rows, a partial per program.

    A lane (a row of the tile) sums d = y - k and d^2, where k is its first value. Because k is one of the values, the
    lane's number of rows bounds the cancellation in these sums, whatever the data. The lanes merge by Chan's formula.
    Tile: BLOCK_M x BLOCK_C, a loop over the rows. Traffic: y read once.
    """
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * rows
    end = tl.minimum(first + rows, M)
    lane = first + tl.arange(0, BLOCK_M)
    offsets, mask = _tile_at(first, end, cols, C, BLOCK_M, WIDE)
    origin = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(first + BLOCK_M, end, BLOCK_M):
        offsets, mask = _tile_at(start, end, cols, C, BLOCK_M, WIDE)
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, y - origin, 0.0)
        s1 += d
        s2 += d * d
    seen = tl.where(lane < end, (end - lane + BLOCK_M - 1) // BLOCK_M, 0).to(tl.float32)[:, None]
    count = seen + tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    off = s1 / tl.maximum(count, 1.0)
    m2 = s2 - s1 * off
    _, mean, m2 = merge_rows(count, origin + off, tl.where(m2 < 0, 0.0, m2))
    to = tl.program_id(1) * C + cols
    tl.store(mean_ptr + to, mean, mask=cols < C)
    tl.store(m2_ptr + to, m2, mask=cols < C)


@triton.jit(do_not_specialize=["M"])
def _bn_act_kernel(
    y_ptr, residual_ptr, scale_ptr, shift_ptr, r_scale_ptr, r_shift_ptr, out_ptr,
    M, act_param,
    C: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out = act(s y + t [+ r, or + s_d r + t_d]).

    Tile: BLOCK_M x BLOCK_C, one per program. Traffic: y (and r) read once, out written once.
    """
    c_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    cols = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets, mask = _tile_at(tl.program_id(0) // c_tiles * BLOCK_M, M, cols, C, BLOCK_M, WIDE)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
    r = None if residual_ptr is None else tl.load(residual_ptr + offsets, mask=mask, other=0.0)
    scale = load_vector(scale_ptr, cols, C)
    shift = load_vector(shift_ptr, cols, C)
    r_scale = load_vector(r_scale_ptr, cols, C)
    r_shift = load_vector(r_shift_ptr, cols, C)
    z = formulas.closing(y, r, scale, shift, r_scale, r_shift)
    tl.store(out_ptr + offsets, narrow(formulas.act(z, ACT, act_param), out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows"])
def _bn_act_backward_kernel(
    dout_ptr, y_ptr, residual_ptr, scale_ptr, shift_ptr, center_ptr, r_scale_ptr, r_shift_ptr, r_center_ptr, dz_ptr,
    sum_ptr, sum_y_ptr, sum_r_ptr,
    M, rows, act_param,
    C: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dz = dout act'(z), z recomputed; partial sums of dz, dz (y - mu) [and dz (r - mu_d)] per program.

    Tile: BLOCK_M x BLOCK_C, a loop over ``rows`` rows. Traffic: dout, y (and r) read once, dz written once.
    """
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * rows
    end = tl.minimum(first + rows, M)
    scale = load_vector(scale_ptr, cols, C)
    shift = load_vector(shift_ptr, cols, C)
    center = load_vector(center_ptr, cols, C)
    r_scale = load_vector(r_scale_ptr, cols, C)
    r_shift = load_vector(r_shift_ptr, cols, C)
    r_center = load_vector(r_center_ptr, cols, C)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    total_y = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    total_r = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(first, end, BLOCK_M):
        offsets, mask = _tile_at(start, end, cols, C, BLOCK_M, WIDE)
        dz = tl.load(dout_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        r = None if residual_ptr is None else tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        z = formulas.closing(y, r, scale, shift, r_scale, r_shift)
        dz = act_backward(dz, z, ACT, act_param)
        tl.store(dz_ptr + offsets, narrow(dz, dz_ptr.dtype.element_ty), mask=mask)
        total += dz
        total_y += dz * (y - center[None, :])
        if sum_r_ptr is not None:
            total_r += dz * (r - r_center[None, :])
    to = tl.program_id(1) * C + cols
    tl.store(sum_ptr + to, tl.sum(total, 0), mask=cols < C)
    tl.store(sum_y_ptr + to, tl.sum(total_y, 0), mask=cols < C)
    if sum_r_ptr is not None:
        tl.store(sum_r_ptr + to, tl.sum(total_r, 0), mask=cols < C)


@triton.jit(do_not_specialize=["M"])
def _bn_backward_kernel(
    dz_ptr, y_ptr, a_ptr, b_ptr, c_ptr, center_ptr, dy_ptr,
    M,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dy = A dz + B (y - mu) + C, frozen: A dz.

    Tile: BLOCK_M x BLOCK_C, one per program. Traffic: dz (and y) read once, dy written once.
    """
    c_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    cols = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets, mask = _tile_at(tl.program_id(0) // c_tiles * BLOCK_M, M, cols, C, BLOCK_M, WIDE)
    dz = tl.load(dz_ptr + offsets, mask=mask, other=0.0)
    a = load_vector(a_ptr, cols, C)
    b = load_vector(b_ptr, cols, C)
    c = load_vector(c_ptr, cols, C)
    center = load_vector(center_ptr, cols, C)
    y = None if y_ptr is None else tl.load(y_ptr + offsets, mask=mask, other=0.0)
    dy = formulas.bn_backward(dz, y, a, b, c, center)
    tl.store(dy_ptr + offsets, narrow(dy, dy_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------- launchers
def _tile(channels: int, elements: int) -> dict[str, Any]:
    block_c = min(triton.next_power_of_2(channels), _WIDEST)
    return {"BLOCK_M": elements // block_c, "BLOCK_C": block_c}


def _each(m: int, channels: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Grid and tile of a pass without a reduction: one tile per program. Tiles of the same rows run side by side."""
    tile = _tile(channels, _TILE)
    return (cdiv(m, tile["BLOCK_M"]) * cdiv(channels, tile["BLOCK_C"]),), tile


def _partials(
    m: int, channels: int, device: torch.device, elements: int = 2 * _TILE
) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Grid, rows per program and tile of a reduction: as many programs as can be resident at once."""
    tile = _tile(channels, elements)
    c_tiles, m_tiles = cdiv(channels, tile["BLOCK_C"]), cdiv(m, tile["BLOCK_M"])
    most = max(1, _PROGRAMS * target_of(device).processors // c_tiles)
    rows = max(1, cdiv(m_tiles, most)) * tile["BLOCK_M"]
    return (c_tiles, cdiv(m, rows)), rows, tile


def _size(y: Tensor) -> tuple[int, int]:
    n, channels, h, w = y.shape
    return n * h * w, channels


def bn_stats(call: BnStats) -> tuple[Tensor, Tensor]:
    y = nhwc(call.y)
    m, channels = _size(y)
    grid, rows, tile = _partials(m, channels, y.device)
    moments = torch.empty((2, grid[1], channels), dtype=torch.float32, device=y.device)
    parts = moments.unbind()
    launch(_bn_stats_kernel, grid, y, *parts, m, rows, C=channels, WIDE=wide(y), **tile, writes=parts)
    return merge_moments(moments, rows, m)


def bn_act(call: BnAct) -> Tensor:
    y, act = nhwc(call.y), call.act
    summand = None if call.residual is None else nhwc(call.residual)
    m, channels = _size(y)
    out = empty_nhwc(y, y.shape)
    grid, tile = _each(m, channels)
    own, others = vectors(call.norm)[:2], vectors(call.residual_norm)[:2]
    launch(
        _bn_act_kernel, grid, y, summand, *own, *others, out, m, float(act.param),
        C=channels, ACT=act.index, WIDE=wide(y), **tile, writes=(out,),
    )  # fmt: skip
    return out


def bn_act_backward(call: BnActBackward) -> tuple[Tensor, Sums, Sums | None]:
    dout, y, act = nhwc(call.dout), nhwc(call.y), call.act
    summand = None if call.residual is None else nhwc(call.residual)
    kinds = 2 if call.residual_norm is None else 3
    m, channels = _size(y)
    dz = empty_nhwc(y, y.shape, dout.dtype)
    grid, rows, tile = _partials(m, channels, y.device, _TILE if kinds == 3 else 2 * _TILE)
    partials = torch.empty((kinds, grid[1], channels), dtype=torch.float32, device=y.device)
    sums = partials.unbind()
    launch(
        _bn_act_backward_kernel, grid,
        dout, y, summand, *vectors(call.norm), *vectors(call.residual_norm), dz, *sums, *[None] * (3 - kinds),
        m, rows, float(act.param),
        C=channels, ACT=act.index, WIDE=wide(y), **tile, writes=(dz, *sums),
    )  # fmt: skip
    s0, *rest = sum_partials(partials)
    return dz, Sums(s0, rest[0]), Sums(s0, rest[1]) if kinds == 3 else None


def bn_backward(call: BnBackward) -> Tensor:
    dz, y, coef = nhwc(call.dz), nhwc(call.y), call.coef
    m, channels = _size(y)
    dy = empty_nhwc(y, y.shape)
    grid, tile = _each(m, channels)
    source, center = (y, coef.center) if coef.b is not None else (None, None)  # frozen: neither is read
    launch(
        _bn_backward_kernel, grid, dz, source, coef.a, coef.b, coef.c, center, dy, m,
        C=channels, WIDE=wide(y), **tile, writes=(dy,),
    )  # fmt: skip
    return dy
