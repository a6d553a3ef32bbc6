"""The forward of a row of chains, and inference, composed of primitives (the formulas: operators.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet import reference
from fused_resnet.backends import (
    BnAct,
    BnActMaxPool,
    BnFold,
    BnStats,
    Case,
    ConvBiasAct,
    ConvBnAct,
    ConvStats,
    Norm,
    Prologue,
    loaded,
    vector_dtype,
)
from fused_resnet.base.layouts import channels_last
from fused_resnet.chain import sync
from fused_resnet.chain.folding import fold, fold_weight, folds
from fused_resnet.planner import pick, run
from fused_resnet.spec import Act, ChainSpec, ConvSpec, PoolSpec, RowSpec, UnitSpec


# ---------------------------------------------------------------------------------------------------- small pieces
def memory_format(x: Tensor, params: Sequence[Tensor]) -> torch.memory_format:
    """The layout in which a chain works: channels_last if x or a weight is, as in PyTorch's convolutions."""
    if any(_channels_last(t) for t in (x, *params) if t.dim() >= 4):
        return channels_last(x)
    return torch.contiguous_format


def _channels_last(t: Tensor) -> bool:
    """ATen's suggest_memory_format. It decides by strides if sizes of 1 make a tensor dense in both layouts."""
    if t.stride(1) == 0:
        return False
    least = 0
    for d in (1, *range(t.dim() - 1, 1, -1), 0):
        if t.shape[d] == 0 or t.stride(d) < least or (d == 0 and least == t.stride(1)):
            return False
        least = t.stride(d) * t.shape[d]
    return True


# ---------------------------------------------------------------------------------------------------- forward
def raw_conv(
    x: Tensor, weight: Tensor, conv: ConvSpec, prologue: Prologue | None, stats: bool, fmt: torch.memory_format
) -> tuple[Tensor, Any, Any]:
    y, mean, var = run(ConvStats(x, weight, conv, prologue, stats))
    # copies only if sizes of 1 give a convolution another layout than the chain's
    return y.contiguous(memory_format=fmt), mean, var


class _Raw(NamedTuple):
    """A unit after its convolution: y and, if batch statistics are used, [mean, var] of this process's part."""

    unit: UnitSpec
    p: dict[str, Tensor]
    y: Tensor
    stats: list[Tensor]


def _raw(x: Tensor, p: dict[str, Tensor], unit: UnitSpec, prologue: Prologue | None, fmt: torch.memory_format) -> _Raw:
    if unit.conv is not None:
        y, mean, var = raw_conv(x, p["weight"], unit.conv, prologue, unit.batch_stats, fmt)
    else:
        y = x
        mean, var = run(BnStats(x)) if unit.batch_stats else (None, None)
    stats = [mean, var] if unit.batch_stats else []
    if y.numel() == 0:  # the mean of no values is NaN, which would spread to the other processes' statistics
        stats = [torch.zeros_like(s) for s in stats]
    return _Raw(unit, p, y, stats)


def _normalise(*raws: _Raw) -> list[tuple[Norm, list[Tensor]]]:
    """The normalisation of units that are ready together, and the vectors to keep (``UnitSpec.n_vectors``)."""
    kept = {i: raw.stats for i, raw in enumerate(raws)}
    for group, members in sync.by_group({i: raw.unit for i, raw in enumerate(raws)}):
        y = raws[members[0]].y  # units that are ready together are summands of one size
        kept |= zip(members, sync.statistics([kept[i] for i in members], y, group), strict=True)
    found = []
    for (unit, p, y, _), stats in zip(raws, kept.values(), strict=True):
        wide, vectors = vector_dtype(y.dtype), pick(BnFold, Case.of(y))
        mean, var = stats[:2] if unit.batch_stats else (p["running_mean"], p["running_var"])
        norm = fold(p, mean, var, unit.eps, wide, vectors)
        found.append((norm, [*norm, *stats[1:]]))
    return found


def row_forward(x: Tensor, residual: Tensor | None, params: Sequence[Tensor], text: str) -> list[Tensor]:
    """The operator fused_resnet::chain."""
    row = RowSpec.decode(text)
    fmt = memory_format(x, params)
    outs: list[Tensor] = []
    saved: list[Tensor] = []
    for spec, p in zip(row.chains, row.split(params), strict=True):
        x, *more = _forward(x.contiguous(memory_format=fmt), residual, p, spec, fmt)
        outs.append(x)
        saved += more
    return [outs[-1], *outs[:-1], *saved]


def _forward(
    x: Tensor, residual: Tensor | None, params: Sequence[Tensor], spec: ChainSpec, fmt: torch.memory_format
) -> list[Tensor]:
    parts = spec.split(params)
    ys: list[Tensor] = []
    vectors: list[Tensor] = []
    h, prologue = x, None
    for i, (unit, p) in enumerate(zip(spec.units, parts, strict=False)):
        raw = _raw(h, p, unit, prologue, fmt)
        h = raw.y
        if unit.conv is not None and not (spec.recompute and i == 0):
            ys.append(h)
        if i + 1 < len(spec.units):
            ((norm, kept),) = _normalise(raw)
            prologue = Prologue(norm, unit.act)
            vectors += kept
    closing = [raw]
    summand = summand_of(x, residual, spec, fmt)
    if spec.shortcut.unit is not None:
        assert summand is not None
        closing.append(_raw(summand, parts[-1], spec.shortcut.unit, None, fmt))
        summand = closing[-1].y
        ys.append(summand)
    norms, last = zip(*_normalise(*closing), strict=True)
    vectors += [v for kept in last for v in kept]
    act = spec.units[-1].act
    if spec.pool is not None:
        out, argmax = run(BnActMaxPool(h, norms[0], act, spec.pool))
        return [out, *ys, *vectors, argmax]
    out = run(BnAct(h, norms[0], act, summand, norms[1] if len(norms) > 1 else None))
    return [out, *ys, *vectors]


def summand_of(x: Tensor, residual: Tensor | None, spec: ChainSpec, fmt: torch.memory_format) -> Tensor | None:
    """The input of the shortcut: x, x averaged, x strided and padded, or a given tensor."""
    if spec.shortcut.kind == "none":
        return None
    summand = residual if spec.shortcut.kind == "tensor" else reference.shortcut_input(x, spec.shortcut)
    assert summand is not None
    return summand.contiguous(memory_format=fmt)


def inference(x: Tensor, residual: Tensor | None, params: Sequence[Tensor], text: str) -> Tensor:
    """The operator fused_resnet::chain_inference.

    BatchNorm with running statistics is folded into the convolutions, conv(x, s W) + t, or applied to their outputs, or
    applied in a closing max-pool.
    """
    row = RowSpec.decode(text)
    fmt = memory_format(x, params)
    h = x
    for spec, p in zip(row.chains, row.split(params), strict=True):
        h = _inference(h.contiguous(memory_format=fmt), residual, p, spec, fmt)
    # an operator must not return one of its inputs
    return h.clone() if h is x or h is residual else h


def _inference(
    x: Tensor, residual: Tensor | None, params: Sequence[Tensor], spec: ChainSpec, fmt: torch.memory_format
) -> Tensor:
    parts = spec.split(params)
    wide, vectors = vector_dtype(x.dtype), pick(BnFold, Case.of(x))

    def unit(h: Tensor, p: dict[str, Tensor], u: UnitSpec, act: Act, summand: Tensor | None) -> Tensor:
        norm = fold(p, p["running_mean"], p["running_var"], u.eps, wide, vectors)
        if u.conv is None:
            return run(BnAct(h, norm, act, summand))
        backend = pick(ConvBiasAct, Case.of(h, u.conv, p["weight"]))
        if backend.offers(ConvBnAct):
            out = ConvBnAct(h, p["weight"], norm, u.conv, act, summand).on(backend)
        elif folds(p, norm, u.eps, h.dtype):
            weight = p["weight"].to(wide) * norm.scale.view(-1, *[1] * (h.dim() - 1))
            out = run(ConvBiasAct(h, weight, norm.shift, u.conv, act, summand))
        else:
            weight, scale = fold_weight(p["weight"], norm, h.dtype)
            y = raw_conv(h, weight, u.conv, None, False, fmt)[0]
            out = run(BnAct(y, norm if scale is None else norm._replace(scale=scale), act, summand))
        return out.contiguous(memory_format=fmt)  # the layout that the fake kernel promises, as in raw_conv

    summand = summand_of(x, residual, spec, fmt)
    if spec.shortcut.unit is not None:
        assert summand is not None
        summand = unit(summand, parts[-1], spec.shortcut.unit, Act("identity"), None)
    h = x
    for u, p in zip(spec.units[:-1], parts, strict=False):
        h = unit(h, p, u, u.act, None)
    last, p = spec.units[-1], parts[len(spec.units) - 1]
    if spec.pool is None:
        h = unit(h, p, last, last.act, summand)
    else:
        # the pool normalises on load: nothing is folded into W, and positions are bytes, not PyTorch's int64
        raw = _raw(h, p, last, None, fmt)
        ((norm, _),) = _normalise(raw)
        h = _max_pool(raw.y, norm, last.act, spec.pool)
    return h


def _max_pool(y: Tensor, norm: Norm, act: Act, pool: PoolSpec) -> Tensor:
    backend, aten = pick(BnActMaxPool, Case.of(y)), loaded("aten")
    if backend is aten:  # aten would compute the positions too, in separate operators
        a = BnAct(y, norm, act).on(aten)
        return torch.nn.functional.max_pool2d(a, *pool.window)
    return BnActMaxPool(y, norm, act, pool).on(backend)[0]
