"""The last step of every reduction: merges the partial results of one launch's programs in a fixed order.

There are no atomics. A program writes its row of [P, C], and these kernels merge the rows: the same input gives the
same bits.
"""

from __future__ import annotations

import torch
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
    mean_ptr, m2_ptr, out_mean_ptr, out_m2_ptr,
    partials, group, rows, total,
    C: tl.constexpr, VARIANCE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(count, mean, M2) of the union of ``group`` partials; the last launch writes M2 / total, the biased variance.

    Tile: BLOCK_P partials x BLOCK_C channels, a loop over the group: lane p merges p, p + BLOCK_P, ..., then the lanes
    merge. Traffic: 8 bytes read per partial and channel, 8 written per group and channel.
    Source: Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
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
        part_mean = tl.load(mean_ptr + offsets, mask=mask, other=0.0)
        part_m2 = tl.load(m2_ptr + offsets, mask=mask, other=0.0)
        count, mean, m2 = merge(count, mean, m2, part, part_mean, part_m2)
    count, mean, m2 = merge_rows(count, mean, m2)
    if VARIANCE:
        m2 = m2 / count
    to = tl.program_id(1) * C + cols
    tl.store(out_mean_ptr + to, mean, mask=cols < C)
    tl.store(out_m2_ptr + to, m2, mask=cols < C)


@triton.jit(do_not_specialize=["partials", "group"])
def _sum_partials_kernel(
    a_ptr, b_ptr, c_ptr, out_a_ptr, out_b_ptr, out_c_ptr,
    partials, group,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over ``group`` rows of up to three [P, C] at once (b, c may be None).

    Tile: BLOCK_P x BLOCK_C, a loop over the group. Traffic: 4 bytes read per row and channel of each.
    """
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1) * group
    end = tl.minimum(first + group, partials)
    a = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    c = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & (cols < C)[None, :]
        offsets = p[:, None] * C + cols[None, :]
        a += tl.load(a_ptr + offsets, mask=mask, other=0.0)
        if b_ptr is not None:
            b += tl.load(b_ptr + offsets, mask=mask, other=0.0)
        if c_ptr is not None:
            c += tl.load(c_ptr + offsets, mask=mask, other=0.0)
    to = tl.program_id(1) * C + cols
    tl.store(out_a_ptr + to, tl.sum(a, 0), mask=cols < C)
    if b_ptr is not None:
        tl.store(out_b_ptr + to, tl.sum(b, 0), mask=cols < C)
    if c_ptr is not None:
        tl.store(out_c_ptr + to, tl.sum(c, 0), mask=cols < C)


def _groups(partials: int) -> tuple[int, int]:
    """The rows that each program merges, and the rows that result."""
    group = partials if partials <= _ROWS else max(_BLOCK_P, cdiv(partials, _ROWS))
    return group, cdiv(partials, group)


def merge_moments(mean: Tensor, m2: Tensor, rows: int, total: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel from the moments of pieces.

    Args:
        mean, m2: float32 [P, C], contiguous. Partial p covers rows p*rows .. min((p + 1)*rows, total) - 1; the P
            partials cover all rows.
        rows, total: rows per partial, and all rows.

    Returns:
        mean [C] and biased variance [C], float32; NaN without rows, as in PyTorch.
    """
    partials, channels = mean.shape
    if partials == 0:
        return mean.new_full((channels,), float("nan")), mean.new_full((channels,), float("nan"))
    while True:
        group, out = _groups(partials)
        last = out == 1
        to_mean, to_m2 = (
            torch.empty((channels,) if last else (out, channels), dtype=torch.float32, device=mean.device)
            for _ in range(2)
        )
        launch(
            _merge_moments_kernel, (cdiv(channels, _BLOCK_C), out),
            mean, m2, to_mean, to_m2, partials, group, rows, total,
            C=channels, VARIANCE=last, BLOCK_P=_BLOCK_P, BLOCK_C=_BLOCK_C, num_warps=4,
            reads=(mean, m2), writes=(to_mean, to_m2),
        )  # fmt: skip
        mean, m2 = to_mean, to_m2
        if last:
            return mean, m2
        partials, rows = out, rows * group


def sum_partials(*partials: Tensor) -> tuple[Tensor, ...]:
    """The sum over the rows of each float32 [P, C]: at most three, contiguous, of the same shape."""
    rows, channels = partials[0].shape
    if rows == 0:
        return tuple(p.new_zeros(channels) for p in partials)
    while True:
        group, out = _groups(rows)
        sums = [
            torch.empty((channels,) if out == 1 else (out, channels), dtype=torch.float32, device=p.device)
            for p in partials
        ]
        absent = [None] * (3 - len(partials))
        launch(
            _sum_partials_kernel, (cdiv(channels, _BLOCK_C), out),
            *partials, *absent, *sums, *absent, rows, group,
            C=channels, BLOCK_P=_BLOCK_P, BLOCK_C=_BLOCK_C, num_warps=4,
            reads=partials, writes=sums,
        )  # fmt: skip
        if out == 1:
            return tuple(sums)
        partials, rows = tuple(sums), out
