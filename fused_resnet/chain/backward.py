"""The backward of a row of chains, composed of primitives (the formulas: operators.py).

The chains run last to first. The last primitive that works on the gradient of a chain's input also takes it through the
closing of the chain before: it gets a ``Closing`` and returns dz instead of dout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_resnet import reference
from fused_resnet.backends import (
    Backend,
    BnActBackward,
    BnActMaxPoolBackward,
    BnBackward,
    BnCoefficients,
    Case,
    Closing,
    ConvBackward,
    DyCoefficients,
    Norm,
    Prologue,
    Sums,
)
from fused_resnet.chain import sync
from fused_resnet.chain.forward import memory_format, raw_conv, summand_of
from fused_resnet.planner import pick, run
from fused_resnet.spec import ChainSpec, RowSpec, UnitSpec


class _Chain(NamedTuple):
    """A chain's values from its forward.

    Its input; for each unit (projection last) the weight, the raw output (x if there was no convolution), the
    normalisation, and the number of values over all processes if that differs from y's own; the add's summand; the
    pool's positions.
    """

    spec: ChainSpec
    x: Tensor
    weights: list[Tensor | None]
    ys: list[Tensor]
    norms: list[Norm]
    counts: list[Tensor | None]
    summand: Tensor | None
    argmax: Tensor | None

    @property
    def closing(self) -> Closing:
        """The closing: the last unit with the shortcut and the activation after the add."""
        k = len(self.spec.units)
        norm = self.norms[k] if self.spec.shortcut.unit is not None else None
        return Closing(self.ys[k - 1], self.norms[k - 1], self.spec.units[-1].act, self.summand, norm)


class _Closed(NamedTuple):
    """dz after a chain's (or a unit's) closing, its sums with y and, if the summand has a norm, with the summand."""

    dz: Tensor
    sums: Sums
    summand_sums: Sums | None = None


class _Found(NamedTuple):
    """The results of one chain's backward: the gradients of x, of the residual, and of each unit's parameters by name.

    The gradient of x has passed the closing before x (``closed``).
    """

    dx: Tensor | None
    closed: _Closed | None
    dresidual: Tensor | None
    params: list[dict[str, Tensor]]


def row_backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    text: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The operator fused_resnet::chain_backward."""
    row = RowSpec.decode(text)
    fmt = memory_format(x, weights)
    last = len(row.chains) - 1
    inputs = [x.contiguous(memory_format=fmt), *saved[:last]]
    it, kept, wanted = iter(weights), iter(saved[last:]), row.split(needs[2:])
    split = [[next(it) if unit.conv is not None else None for unit in spec.all_units] for spec in row.chains]
    own = [[next(kept) for _ in range(spec.n_saved)] for spec in row.chains]

    def recall(i: int) -> _Chain:
        return _recall(inputs[i], residual, split[i], own[i], row.chains[i], fmt)

    chain = recall(last)
    closed = _close(dout.contiguous(memory_format=fmt), chain)
    found: _Found
    grads: list[Tensor | None] = []
    for i in range(last, -1, -1):
        need_input = needs[0] or any(map(any, wanted[:i]))
        before = recall(i - 1) if i and need_input else None
        found = _chain_backward(chain, closed, before and before.closing, need_input, needs[1], wanted[i], fmt)
        units = zip(chain.spec.all_units, found.params, strict=True)
        grads = [g.get(name) for unit, g in units for name in unit.param_names] + grads
        if before is None:
            break
        assert found.closed is not None
        chain, closed = before, found.closed
    names = [name for unit in row.all_units for name in unit.param_names]
    it = iter(weights)
    like = [x, residual, *(next(it) if name == "weight" else None for name in names)]
    have = [found.dx, found.dresidual, *[None] * (len(names) - len(grads)), *grads]
    return [_like(g, t) for g, t, need in zip(have, like, needs, strict=True) if need]


def _recall(
    x: Tensor,
    residual: Tensor | None,
    weights: list[Tensor | None],
    saved: Sequence[Tensor],
    spec: ChainSpec,
    fmt: torch.memory_format,
) -> _Chain:
    """Rebuilds a chain's values from its forward."""
    it = iter(saved)
    ys: list[Tensor] = []
    for i, (unit, weight) in enumerate(zip(spec.all_units, weights, strict=True)):
        if unit.conv is None or weight is None:
            ys.append(x)
        elif spec.recompute and i == 0:
            ys.append(raw_conv(x, weight, unit.conv, None, False, fmt)[0])
        else:
            ys.append(next(it))
    vectors = [[next(it) for _ in range(unit.n_vectors)] for unit in spec.all_units]
    norms = [Norm(*kept[:4]) for kept in vectors]
    counts = [kept[5] if len(kept) > 5 else None for kept in vectors]
    summand = ys[-1] if spec.shortcut.unit is not None else summand_of(x, residual, spec, fmt)
    return _Chain(spec, x, weights, ys, norms, counts, summand, next(it, None))


def _close(dout: Tensor, chain: _Chain) -> _Closed:
    """The pass through the row's last add and activation (and a stem's max-pool)."""
    if chain.spec.pool is None:
        return _Closed(*run(BnActBackward(dout, *chain.closing)))
    assert chain.argmax is not None
    y, norm, act, *_ = chain.closing
    return _Closed(*run(BnActMaxPoolBackward(dout, chain.argmax, y, norm, act, chain.spec.pool)))


def _chain_backward(
    chain: _Chain,
    closed: _Closed,
    before: Closing | None,
    need_input: bool,
    need_residual: bool,
    wanted: Sequence[bool],
    fmt: torch.memory_format,
) -> _Found:
    """One chain's gradients from ``closed``. ``before``: the closing before its input."""
    work = _Gradients(chain, closed, need_input, wanted, fmt)
    shortcut = chain.spec.shortcut
    # a projection of x itself runs after the units and adds to their gradient: then it writes only the pixels that it
    # reads
    direct = shortcut.kind == "projection" and shortcut.pool is None
    dx, done = work.units(work.shortcut(), None if direct else before)
    if direct:
        dx, *sums = work.projection(dx, before)
        done = _Closed(dx, *sums) if before is not None else None  # type: ignore[arg-type]
    dresidual = closed.dz if shortcut.kind == "tensor" and need_residual else None
    return _Found(dx, done, dresidual, work.grads)


class _Gradients:
    """The steps of one chain's backward. ``grads``: the gradients so far, per unit, by the parameter's name."""

    def __init__(
        self, chain: _Chain, closed: _Closed, need_input: bool, wanted: Sequence[bool], fmt: torch.memory_format
    ) -> None:
        self.chain, self.closed, self.need_input, self.fmt = chain, closed, need_input, fmt
        self.needs = chain.spec.split(wanted)
        self.vectors = pick(BnCoefficients, Case.of(chain.x))
        self.grads: list[dict[str, Tensor]] = [{} for _ in chain.spec.all_units]
        self.means: dict[int, Sums] = {}
        if closed.summand_sums is not None:
            last = len(chain.spec.units) - 1
            self.means = _means(chain, {last: closed.sums, last + 1: closed.summand_sums})

    def shortcut(self) -> Tensor | None:
        """The gradient of x through the shortcut; None for a projection of x itself, which runs after the units."""
        x, spec = self.chain.x, self.chain.spec
        kind, pool = spec.shortcut.kind, spec.shortcut.pool
        if kind == "identity" and self.need_input:
            return self.closed.dz
        if kind == "pad" and self.need_input:
            return _pad_backward(self.closed.dz, x, spec)
        if pool is None:
            return None
        dstart, *_ = self.projection(None, None)
        if dstart is None:
            return None
        backward = torch.ops.aten.avg_pool2d_backward if x.dim() == 4 else torch.ops.aten.avg_pool3d_backward
        return backward(dstart.to(x.dtype), x, *pool.window, pool.ceil_mode, pool.count_include_pad, None)

    def units(self, dx: Tensor | None, before: Closing | None) -> tuple[Tensor | None, _Closed | None]:
        """Runs the units, last to first. Adds their gradient of x to ``dx``, and takes the sum through ``before``."""
        (x, ys, norms), units = (self.chain.x, self.chain.ys, self.chain.norms), self.chain.spec.units
        dz, sums, _ = self.closed
        for i in range(len(units) - 1, 0, -1):
            need_start = self.need_input or any(any(n.values()) for n in self.needs[:i])
            prologue = Prologue(norms[i - 1], units[i - 1].act)
            dstart, start_sums, _ = self.unit(i, dz, sums, ys[i - 1], prologue, need_start, None, None)
            if not need_start:
                return dx, None
            assert dstart is not None and start_sums is not None
            dz, sums = dstart, start_sums
        conv = units[0].conv is not None
        add, closing = (dx, before) if conv else (None, None)
        dstart, *closed_sums = self.unit(0, dz, sums, x, None, self.need_input, add, closing)
        if dstart is None:
            return dx, None
        dx = dstart if conv or dx is None else dx + dstart
        return dx, _Closed(dx, *closed_sums) if closing is not None else None  # type: ignore[arg-type]

    def projection(self, add: Tensor | None, closing: Closing | None) -> tuple[Tensor | None, Sums | None, Sums | None]:
        """Runs the projection's unit, whose input is the shortcut's."""
        x, closed, last = self.chain.x, self.closed, len(self.chain.ys) - 1
        assert closed.summand_sums is not None
        start = reference.shortcut_input(x, self.chain.spec.shortcut).contiguous(memory_format=self.fmt)
        found = self.unit(last, closed.dz, closed.summand_sums, start, None, self.need_input, add, closing)
        # dbeta is the last unit's, copied because an operator's outputs must not share memory
        self.grads[-1]["bn_bias"] = closed.summand_sums.dz.clone()
        return found

    def unit(
        self, i: int, dz: Tensor, sums: Sums, start: Tensor, prologue: Prologue | None, need_start: bool,
        add: Tensor | None, closing: Closing | None,
    ) -> tuple[Tensor | None, Sums | None, Sums | None]:  # fmt: skip
        """Sets the gradients of unit i's parameters and returns the gradient of its input."""
        unit, weight, y = self.chain.spec.all_units[i], self.chain.weights[i], self.chain.ys[i]
        need_weight = self.needs[i].get("weight", False)
        if i not in self.means and (need_start or need_weight):
            self.means.update(_means(self.chain, {i: sums}))
        own, coef = _unit_gradients(unit, self.chain.norms[i], sums, self.means.get(i), y, self.vectors)
        self.grads[i] |= own
        if not (need_start or need_weight):
            return None, None, None
        if unit.conv is None:
            return run(BnBackward(dz, y, coef)), None, None
        assert weight is not None
        needs = need_start, need_weight
        dstart, dw, start_sums, summand_sums = run(
            ConvBackward(dz, y, coef, start, prologue, weight, unit.conv, *needs, add, closing)
        )
        if dw is not None:
            self.grads[i]["weight"] = dw
        return dstart, start_sums, summand_sums


def _means(chain: _Chain, sums: dict[int, Sums]) -> dict[int, Sums]:
    """The sums over all processes of a group, divided by the count, for the units that share statistics over it."""
    found: dict[int, Sums] = {}
    for group, members in sync.by_group({i: chain.spec.all_units[i] for i in sums}):
        count = chain.counts[members[0]]  # units that close together are summands of one size
        assert count is not None
        found |= zip(members, sync.means([sums[i] for i in members], count, group), strict=True)
    return found


def _unit_gradients(
    unit: UnitSpec, norm: Norm, sums: Sums, means: Sums | None, y: Tensor, vectors: Backend
) -> tuple[dict[str, Tensor], DyCoefficients]:
    """dgamma, dbeta (and the convolution bias's gradient) by name, from this process's sums; and A, B, C of dy.

    If a process group shares statistics, A, B and C come from ``means``: dy is the gradient of all processes' losses.
    """
    alone = unit.batch_stats and unit.group is None
    count = y.numel() // y.shape[1] if alone else None
    dgamma, coef = BnCoefficients(norm, sums, count).on(vectors)
    if means is not None:
        _, coef = BnCoefficients(norm, means, 1).on(vectors)
    grads = {"bn_weight": dgamma, "bn_bias": sums.dz}
    if unit.conv is not None and unit.conv.bias:
        # y minus its mean does not depend on the bias
        grads["bias"] = torch.zeros_like(sums.dz) if unit.batch_stats else norm.scale * sums.dz
    return grads, coef


def _pad_backward(dz: Tensor, x: Tensor, spec: ChainSpec) -> Tensor:
    """Option A: the gradient of x's own channels at the pixels that the shortcut read."""
    dx = torch.zeros_like(x, dtype=dz.dtype)
    dx[:, :, *(slice(None, None, s) for s in spec.shortcut.stride)] = dz[:, : x.shape[1]]
    return dx


def _like(g: Tensor | None, t: Tensor | None) -> Tensor:
    """The gradient in its tensor's dtype and strides (otherwise autograd would copy it later); 0 if there is none.

    ``t``: None for a vector, whose dtype autograd sees to.
    """
    if t is None:
        assert g is not None
        return g
    if g is None:
        return torch.zeros_like(t)
    g = g.to(t.dtype)
    if g.stride() == t.stride():
        return g
    strides = torch.empty_like(t, device="meta").stride()
    if g.stride() == strides:
        return g
    if all(n == 1 or have == want for n, have, want in zip(t.shape, g.stride(), strides, strict=True)):
        return g.as_strided(t.shape, strides)
    return torch.empty_like(t).copy_(g)
