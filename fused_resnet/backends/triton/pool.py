"""The stem's tail: normalise + act + max-pool in one pass, and its backward as a gather."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends import BnActMaxPool, BnActMaxPoolBackward, Sums
from fused_resnet.backends.triton import formulas
from fused_resnet.backends.triton.configs import target_of
from fused_resnet.backends.triton.formulas import act_backward, affine, load_vector, narrow
from fused_resnet.backends.triton.geometry import nhwc
from fused_resnet.backends.triton.reduce import sum_partials
from fused_resnet.backends.triton.runtime import cdiv, empty_nhwc, launch, wide
from fused_resnet.spec import Act, ConvSpec, PoolSpec

# Elements of a tile, a square of pixels: neighbouring windows share their loads.
_TILE, _WIDEST = 1024, 64
_PROGRAMS = 4


@triton.jit
def _pixels(tile, H: tl.constexpr, W: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, WIDE: tl.constexpr):
    """Image, row and column of each pixel of a tile. Tiles run over the columns, then the rows, then the images."""
    tiles_w: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    tiles_h: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    lane = tl.arange(0, BLOCK_H * BLOCK_W)
    h = tile // tiles_w % tiles_h * BLOCK_H + lane // BLOCK_W
    w = tile % tiles_w * BLOCK_W + lane % BLOCK_W
    n = tile // (tiles_w * tiles_h)
    if WIDE:
        n = n.to(tl.int64)
    return n, h, w


@triton.jit
def _bn_act_max_pool_kernel(
    y_ptr, scale_ptr, shift_ptr, out_ptr, argmax_ptr,
    act_param,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, R: tl.constexpr,
    S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out = max over (r, s) of act(scale y + shift), argmax = r S + s of the first maximum. A NaN wins, padding never.

    Tile: BLOCK_H x BLOCK_W outputs x BLOCK_C channels, one per program. Traffic: y read once (overlapping windows of a
    tile meet in L1, those of neighbouring tiles in L2), out and one byte per output written once.
    Source: the comparison is that of ATen's max_pool2d.
    """
    c_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    cols = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    n, oh, ow = _pixels(tl.program_id(0) // c_tiles, OH, OW, BLOCK_H, BLOCK_W, WIDE)
    scale = load_vector(scale_ptr, cols, C)
    shift = load_vector(shift_ptr, cols, C)
    best = tl.full([BLOCK_H * BLOCK_W, BLOCK_C], float("-inf"), tl.float32)
    place = tl.full([BLOCK_H * BLOCK_W, BLOCK_C], -1, tl.int32)
    for r in range(0, R):
        h = oh * STRIDE_H - PAD_H + r
        for s in tl.static_range(0, S):
            w = ow * STRIDE_W - PAD_W + s
            there = (h >= 0) & (h < H) & (w >= 0) & (w < W)
            mask = there[:, None] & (cols < C)[None, :]
            y = tl.load(y_ptr + ((n * H + h) * W + w)[:, None] * C + cols[None, :], mask=mask, other=0.0)
            a = formulas.act(affine(y, scale, shift), ACT, act_param)
            # the first pixel wins even if it is -inf
            take = mask & ((a > best) | (a != a) | (place < 0))
            best = tl.where(take, a, best)
            place = tl.where(take, r * S + s, place)
    to = ((n * OH + oh) * OW + ow)[:, None] * C + cols[None, :]
    mask = ((oh < OH) & (ow < OW))[:, None] & (cols < C)[None, :]
    tl.store(out_ptr + to, narrow(best, out_ptr.dtype.element_ty), mask=mask)
    tl.store(argmax_ptr + to, place.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["tiles", "each"])
def _bn_act_max_pool_backward_kernel(
    dout_ptr, argmax_ptr, y_ptr, scale_ptr, shift_ptr, center_ptr, dz_ptr, sum_ptr, sum_y_ptr,
    tiles, each, act_param,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, R: tl.constexpr,
    S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dz = act'(z) times the sum of dout over the windows whose maximum this pixel is; partial sums of dz, dz (y - mu).

    A pixel reads the ceil(R / STRIDE_H) x ceil(S / STRIDE_W) windows that can contain it, the last first: no atomics.
    Tile: BLOCK_H x BLOCK_W pixels x BLOCK_C channels, a loop over ``each`` tiles. Traffic: dout, argmax and y read
    once, dz written once.
    """
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = load_vector(scale_ptr, cols, C)
    shift = load_vector(shift_ptr, cols, C)
    center = load_vector(center_ptr, cols, C)
    total = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
    total_y = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
    first = tl.program_id(1) * each
    for tile in range(first, tl.minimum(first + each, tiles)):
        n, h, w = _pixels(tile, H, W, BLOCK_H, BLOCK_W, WIDE)
        mask = ((h < H) & (w < W))[:, None] & (cols < C)[None, :]
        offsets = ((n * H + h) * W + w)[:, None] * C + cols[None, :]
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        da = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
        for i in range(0, (R + STRIDE_H - 1) // STRIDE_H):
            oh = (h + PAD_H) // STRIDE_H - i
            r = h + PAD_H - oh * STRIDE_H
            in_h = (oh >= 0) & (oh < OH) & (r < R)
            for j in tl.static_range(0, (S + STRIDE_W - 1) // STRIDE_W):
                ow = (w + PAD_W) // STRIDE_W - j
                s = w + PAD_W - ow * STRIDE_W
                window = (in_h & (ow >= 0) & (ow < OW) & (s < S))[:, None] & mask
                at = ((n * OH + oh) * OW + ow)[:, None] * C + cols[None, :]
                place = tl.load(argmax_ptr + at, mask=window, other=0).to(tl.int32)
                dout = tl.load(dout_ptr + at, mask=window, other=0.0).to(tl.float32)
                da += tl.where(window & (place == (r * S + s)[:, None]), dout, 0.0)
        dz = act_backward(da, affine(y, scale, shift), ACT, act_param)
        tl.store(dz_ptr + offsets, narrow(dz, dz_ptr.dtype.element_ty), mask=mask)
        total += dz
        total_y += dz * (y - center[None, :])
    to = tl.program_id(1) * C + cols
    tl.store(sum_ptr + to, tl.sum(total, 0), mask=cols < C)
    tl.store(sum_y_ptr + to, tl.sum(total_y, 0), mask=cols < C)


def _constants(y: Tensor, out: Tensor, act: Act, pool: PoolSpec) -> dict[str, Any]:
    names = ("C", "H", "W", "OH", "OW", "R", "S", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W")
    sizes = (*y.shape[1:], *out.shape[2:], *pool.kernel, *pool.stride, *pool.padding)
    return dict(zip(names, sizes, strict=True)) | {"ACT": act.index, "WIDE": wide(y)}


def _tile(t: Tensor) -> tuple[dict[str, Any], int, int]:
    """The tile, the number of tiles over t's pixels, and the number over its channels."""
    n, channels, h, w = t.shape
    block_c = min(triton.next_power_of_2(channels), _WIDEST)
    pixels = _TILE // block_c
    block_h = 1 << (pixels.bit_length() - 1) // 2
    tile = {"BLOCK_H": block_h, "BLOCK_W": pixels // block_h, "BLOCK_C": block_c}
    return tile, n * cdiv(h, block_h) * cdiv(w, tile["BLOCK_W"]), cdiv(channels, block_c)


def bn_act_max_pool(call: BnActMaxPool) -> tuple[Tensor, Tensor]:
    y, norm, act, pool = nhwc(call.y), call.norm, call.act, call.pool
    shape = (*y.shape[:2], *ConvSpec(pool.stride, pool.padding).out_size(y.shape[2:], pool.kernel))
    out, argmax = empty_nhwc(y, shape), empty_nhwc(y, shape, torch.uint8)
    tile, tiles, c_tiles = _tile(out)
    launch(
        _bn_act_max_pool_kernel, (tiles * c_tiles,), y, norm.scale, norm.shift, out, argmax, float(act.param),
        **_constants(y, out, act, pool), **tile, writes=(out, argmax),
    )  # fmt: skip
    return out, argmax


def bn_act_max_pool_backward(call: BnActMaxPoolBackward) -> tuple[Tensor, Sums]:
    dout, argmax, y = nhwc(call.dout), nhwc(call.argmax), nhwc(call.y)
    norm, act, pool = call.norm, call.act, call.pool
    dz = empty_nhwc(y, y.shape, dout.dtype)
    tile, tiles, c_tiles = _tile(y)
    each = max(1, cdiv(tiles, max(1, _PROGRAMS * target_of(y.device).processors // c_tiles)))
    partials = torch.empty((2, cdiv(tiles, each), y.shape[1]), dtype=torch.float32, device=y.device)
    sums = partials.unbind()
    launch(
        _bn_act_max_pool_backward_kernel, (c_tiles, partials.shape[1]),
        dout, argmax, y, norm.scale, norm.shift, norm.center, dz, *sums, tiles, each, float(act.param),
        **_constants(y, dout, act, pool), **tile, writes=(dz, *sums),
    )  # fmt: skip
    return dz, Sums(*sum_partials(partials))
