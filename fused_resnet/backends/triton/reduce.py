"""The last step of every reduction: merges the partial results of one launch's programs in a fixed order.

There are no atomics. A program writes its row of each [P, C] of the partial results [kinds, P, C], and these kernels
merge the rows: the same input gives the same bits.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends.triton.formulas import merge_moments as merge
from fused_resnet.backends.triton.formulas import merge_rows
from fused_resnet.backends.triton.runtime import cdiv, launch

_BLOCK_P, _BLOCK_C = 128, 16
# One launch merges this many rows. More rows are first merged to this many, which spreads the work over the device.
_ROWS = 640


@triton.jit(do_not_specialize=["partials", "group", "rows", "total"])
def _merge_moments_kernel(
    moments_ptr, out_ptr,
    partials, group, rows, total,
    C: tl.constexpr, VARIANCE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(count, mean, M2) of the union of ``group`` partials; the last launch writes M2 / total, the biased variance.

    Tile: BLOCK_P partials x BLOCK_C channels, a loop over the group: lane p merges p, p + BLOCK_P, ..., then the lanes
    merge. Traffic: 8 bytes read per partial and channel, 8 written per group and channel.
    Source: Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    m2_ptr = moments_ptr + partials.to(tl.int64) * C
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * group
    end = tl.minimum(first + group, partials)
    count = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        there = p < end
        mask = there[:, None] & (cols < C)[None, :]
        offsets = p[:, None] * C + cols[None, :]
        covered = tl.minimum(total - p.to(tl.int64) * rows, rows).to(tl.float32)
        part = tl.where(there, covered, 0.0)[:, None] + tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        part_mean = tl.load(moments_ptr + offsets, mask=mask, other=0.0)
        part_m2 = tl.load(m2_ptr + offsets, mask=mask, other=0.0)
        count, mean, m2 = merge(count, mean, m2, part, part_mean, part_m2)
    count, mean, m2 = merge_rows(count, mean, m2)
    if VARIANCE:
        m2 = m2 / count
    to = tl.program_id(1) * C + cols
    tl.store(out_ptr + to, mean, mask=cols < C)
    tl.store(out_ptr + tl.num_programs(1) * C + to, m2, mask=cols < C)


@triton.jit(do_not_specialize=["partials", "group"])
def _sum_partials_kernel(
    part_ptr, out_ptr,
    partials, group,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over ``group`` rows of each of the [P, C]; the grid's last axis numbers them.

    Tile: BLOCK_P x BLOCK_C, a loop over the group. Traffic: 4 bytes read per row and channel of each.
    """
    part_ptr += tl.program_id(2).to(tl.int64) * partials * C
    out_ptr += tl.program_id(2) * tl.num_programs(1) * C
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * group
    end = tl.minimum(first + group, partials)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & (cols < C)[None, :]
        total += tl.load(part_ptr + p[:, None] * C + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + tl.program_id(1) * C + cols, tl.sum(total, 0), mask=cols < C)


def _groups(partials: int) -> tuple[int, int]:
    """The rows that each program merges, and the rows that result."""
    group = partials if partials <= _ROWS else max(_BLOCK_P, cdiv(partials, _ROWS))
    return group, cdiv(partials, group)


def merge_moments(moments: Tensor, rows: int, total: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel from the moments of pieces.

    Args:
        moments: mean and M2, float32 [2, P, C], contiguous. Partial p covers rows p*rows .. min((p + 1)*rows, total)
            - 1; the P partials cover all rows.
        rows, total: rows per partial, and all rows.

    Returns:
        mean [C] and biased variance [C], float32; NaN without rows, as in PyTorch.
    """
    _, partials, channels = moments.shape
    if partials == 0:
        return moments.new_full((channels,), math.nan), moments.new_full((channels,), math.nan)
    while True:
        group, out = _groups(partials)
        merged = moments.new_empty(2, out, channels)
        launch(
            _merge_moments_kernel, (cdiv(channels, _BLOCK_C), out), moments, merged, partials, group, rows, total,
            C=channels, VARIANCE=out == 1, BLOCK_P=_BLOCK_P, BLOCK_C=_BLOCK_C, writes=(merged,),
        )  # fmt: skip
        if out == 1:
            return merged[0, 0], merged[1, 0]
        moments, partials, rows = merged, out, rows * group


def sum_partials(partials: Tensor) -> Tensor:
    """The sums over the P rows of float32 [kinds, P, C], contiguous: [kinds, C]."""
    kinds, rows, channels = partials.shape
    if rows == 0:
        return partials.new_zeros(kinds, channels)
    while True:
        group, out = _groups(rows)
        sums = partials.new_empty(kinds, out, channels)
        launch(
            _sum_partials_kernel, (cdiv(channels, _BLOCK_C), out, kinds), partials, sums, rows, group,
            C=channels, BLOCK_P=_BLOCK_P, BLOCK_C=_BLOCK_C, writes=(sums,),
        )  # fmt: skip
        if out == 1:
            return sums[:, 0]
        partials, rows = sums, out
