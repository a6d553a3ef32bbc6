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

from fused_resnet.backends import BnAct, BnActBackward, BnBackward, BnStats, Norm, Sums
from fused_resnet.backends.triton import formulas
from fused_resnet.backends.triton.configs import target_of
from fused_resnet.backends.triton.formulas import act_backward, load_vector, merge_rows, narrow
from fused_resnet.backends.triton.geometry import nhwc
from fused_resnet.backends.triton.reduce import merge_moments, sum_partials
from fused_resnet.backends.triton.runtime import cdiv, empty_nhwc, launch, wide

__all__ = ["bn_act", "bn_act_backward", "bn_backward", "bn_stats", "merge_moments", "sum_partials"]
# Elements of a tile: 8 per thread, one 16-byte access of 16-bit elements. A reduction has fewer programs with twice as
# many elements each, unless it has a residual's norm, whose vectors and sums need the registers.
_TILE, _WIDEST, _WARPS = 1024, 128, 4
# Programs of a reduction per processor: all are resident at once.
_PROGRAMS = 4


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
    if WIDE:
        lane = lane.to(tl.int64)
    origin = tl.load(
        y_ptr + lane[:, None] * C + cols[None, :], mask=(lane < end)[:, None] & (cols < C)[None, :], other=0.0
    ).to(tl.float32)
    s1 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(first + BLOCK_M, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        if WIDE:
            row = row.to(tl.int64)
        mask = (row < end)[:, None] & (cols < C)[None, :]
        y = tl.load(y_ptr + row[:, None] * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
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
    C: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out = act(s y + t [+ r, or + s_d r + t_d]).

    Tile: BLOCK_M x BLOCK_C, one per program. Traffic: y (and r) read once, out written once.
    """
    c_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    cols = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(0) // c_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (row < M)[:, None] & (cols < C)[None, :]
    if WIDE:
        row = row.to(tl.int64)
    offsets = row[:, None] * C + cols[None, :]
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
    r = y
    if RESIDUAL > 0:
        r = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
    scale = load_vector(scale_ptr, cols, C)
    shift = load_vector(shift_ptr, cols, C)
    r_scale = scale
    r_shift = shift
    if RESIDUAL == 2:
        r_scale = load_vector(r_scale_ptr, cols, C)
        r_shift = load_vector(r_shift_ptr, cols, C)
    z = formulas.closing(y, r, scale, shift, r_scale, r_shift, RESIDUAL)
    tl.store(out_ptr + offsets, narrow(formulas.act(z, ACT, act_param), out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows"])
def _bn_act_backward_kernel(
    dout_ptr, y_ptr, residual_ptr, scale_ptr, shift_ptr, center_ptr, r_scale_ptr, r_shift_ptr, r_center_ptr, dz_ptr,
    sum_ptr, sum_y_ptr, sum_r_ptr,
    M, rows, act_param,
    C: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
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
    r_scale = scale
    r_shift = shift
    r_center = center
    if RESIDUAL == 2:
        r_scale = load_vector(r_scale_ptr, cols, C)
        r_shift = load_vector(r_shift_ptr, cols, C)
        r_center = load_vector(r_center_ptr, cols, C)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    total_y = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    total_r = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(first, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        mask = (row < end)[:, None] & (cols < C)[None, :]
        if WIDE:
            row = row.to(tl.int64)
        offsets = row[:, None] * C + cols[None, :]
        dz = tl.load(dout_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        r = y
        if RESIDUAL > 0:
            r = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        z = formulas.closing(y, r, scale, shift, r_scale, r_shift, RESIDUAL)
        dz = act_backward(dz, z, ACT, act_param)
        tl.store(dz_ptr + offsets, narrow(dz, dz_ptr.dtype.element_ty), mask=mask)
        total += dz
        total_y += dz * (y - center[None, :])
        if RESIDUAL == 2:
            total_r += dz * (r - r_center[None, :])
    to = tl.program_id(1) * C + cols
    tl.store(sum_ptr + to, tl.sum(total, 0), mask=cols < C)
    tl.store(sum_y_ptr + to, tl.sum(total_y, 0), mask=cols < C)
    if RESIDUAL == 2:
        tl.store(sum_r_ptr + to, tl.sum(total_r, 0), mask=cols < C)


@triton.jit(do_not_specialize=["M"])
def _bn_backward_kernel(
    dz_ptr, y_ptr, a_ptr, b_ptr, c_ptr, center_ptr, dy_ptr,
    M,
    C: tl.constexpr, FROZEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dy = A dz + B (y - mu) + C, frozen: A dz.

    Tile: BLOCK_M x BLOCK_C, one per program. Traffic: dz (and y) read once, dy written once.
    """
    c_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    cols = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(0) // c_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (row < M)[:, None] & (cols < C)[None, :]
    if WIDE:
        row = row.to(tl.int64)
    offsets = row[:, None] * C + cols[None, :]
    dz = tl.load(dz_ptr + offsets, mask=mask, other=0.0)
    a = load_vector(a_ptr, cols, C)
    y = dz
    b = a
    c = a
    center = a
    if not FROZEN:
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
        b = load_vector(b_ptr, cols, C)
        c = load_vector(c_ptr, cols, C)
        center = load_vector(center_ptr, cols, C)
    dy = formulas.bn_backward(dz, y, a, b, c, center, FROZEN)
    tl.store(dy_ptr + offsets, narrow(dy, dy_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------- launchers
def _tile(channels: int, elements: int) -> dict[str, int]:
    block_c = min(triton.next_power_of_2(channels), _WIDEST)
    return {"BLOCK_M": elements // block_c, "BLOCK_C": block_c}


def _each(m: int, channels: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """Grid and tile of a pass without a reduction: one tile per program. Tiles of the same rows run side by side."""
    tile = _tile(channels, _TILE)
    return (cdiv(m, tile["BLOCK_M"]) * cdiv(channels, tile["BLOCK_C"]),), tile


def _partials(
    m: int, channels: int, device: torch.device, elements: int = 2 * _TILE
) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid, rows per program and tile of a reduction: as many programs as can be resident at once."""
    tile = _tile(channels, elements)
    c_tiles, m_tiles = cdiv(channels, tile["BLOCK_C"]), cdiv(m, tile["BLOCK_M"])
    most = max(1, _PROGRAMS * target_of(device).processors // c_tiles)
    rows = max(1, cdiv(m_tiles, most)) * tile["BLOCK_M"]
    return (c_tiles, cdiv(m, rows)), rows, tile


def _size(y: Tensor) -> tuple[int, int]:
    n, channels, h, w = y.shape
    return n * h * w, channels


def _residual(residual: Tensor | None, residual_norm: Norm | None) -> tuple[Tensor | None, int]:
    if residual is None:
        return None, 0
    return nhwc(residual), 1 if residual_norm is None else 2


def bn_stats(call: BnStats) -> tuple[Tensor, Tensor]:
    y = nhwc(call.y)
    m, channels = _size(y)
    grid, rows, tile = _partials(m, channels, y.device)
    mean, m2 = (torch.empty((grid[1], channels), dtype=torch.float32, device=y.device) for _ in range(2))
    launch(
        _bn_stats_kernel, grid, y, mean, m2, m, rows,
        C=channels, WIDE=wide(y), **tile, num_warps=_WARPS,
        reads=(y,), writes=(mean, m2),
    )  # fmt: skip
    return merge_moments(mean, m2, rows, m)


def bn_act(call: BnAct) -> Tensor:
    y, norm, act, other = nhwc(call.y), call.norm, call.act, call.residual_norm
    summand, kind = _residual(call.residual, other)
    m, channels = _size(y)
    out = empty_nhwc(y, y.shape)
    grid, tile = _each(m, channels)
    r_scale, r_shift = (other.scale, other.shift) if other is not None else (None, None)
    vectors = (norm.scale, norm.shift, r_scale, r_shift)
    launch(
        _bn_act_kernel, grid, y, summand, *vectors, out, m, float(act.param),
        C=channels, ACT=act.index, RESIDUAL=kind, WIDE=wide(y), **tile, num_warps=_WARPS,
        reads=(y, summand, *vectors), writes=(out,),
    )  # fmt: skip
    return out


def bn_act_backward(call: BnActBackward) -> tuple[Tensor, Sums, Sums | None]:
    dout, y, norm, act, other = nhwc(call.dout), nhwc(call.y), call.norm, call.act, call.residual_norm
    summand, kind = _residual(call.residual, other)
    m, channels = _size(y)
    dz = empty_nhwc(y, y.shape, dout.dtype)
    grid, rows, tile = _partials(m, channels, y.device, _TILE if kind == 2 else 2 * _TILE)
    sums = [torch.empty((grid[1], channels), dtype=torch.float32, device=y.device) for _ in range(2 + (kind == 2))]
    vectors: list[Any] = [norm.scale, norm.shift, norm.center]
    if other is not None:
        vectors += [other.scale, other.shift, other.center]
    launch(
        _bn_act_backward_kernel, grid,
        dout, y, summand, *vectors, *[None] * (6 - len(vectors)), dz, *sums, *[None] * (3 - len(sums)),
        m, rows, float(act.param),
        C=channels, ACT=act.index, RESIDUAL=kind, WIDE=wide(y), **tile, num_warps=_WARPS,
        reads=(dout, y, summand, *vectors), writes=(dz, *sums),
    )  # fmt: skip
    s0, *rest = sum_partials(*sums)
    return dz, Sums(s0, rest[0]), Sums(s0, rest[1]) if kind == 2 else None


def bn_backward(call: BnBackward) -> Tensor:
    dz, y, coef = nhwc(call.dz), nhwc(call.y), call.coef
    frozen = coef.b is None
    m, channels = _size(y)
    dy = empty_nhwc(y, y.shape)
    grid, tile = _each(m, channels)
    vectors = (coef.a, coef.b, coef.c, None if frozen else coef.center)
    source = None if frozen else y
    launch(
        _bn_backward_kernel, grid, dz, source, *vectors, dy, m,
        C=channels, FROZEN=frozen, WIDE=wide(y), **tile, num_warps=_WARPS,
        reads=(dz, source, *vectors), writes=(dy,),
    )  # fmt: skip
    return dy
