"""Finds the chains of a captured graph: units one after the other, and the add or the max-pool that closes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from fused_resnet.chain import signals
from fused_resnet.fusion.matches import ChainMatch, UnitMatch
from fused_resnet.fusion.refusals import Refusals
from fused_resnet.fusion.table import arguments, kind_of, only_user, storage_of, summands, value_of, written
from fused_resnet.fusion.units import followed_by_act
from fused_resnet.spec import PoolSpec


def chains_of(
    nodes: Sequence[fx.Node], units: dict[fx.Node, UnitMatch], refusals: Refusals, left: dict[fx.Node, str]
) -> list[ChainMatch]:
    """The chains of these units, in the graph's order. Leaves in ``left`` only the norms that are in none of them."""
    found = _Chains(nodes, units, refusals, left)
    return sorted([*found.closed(), *found.open()], key=lambda chain: found.order[chain.end])


class _Chains:
    def __init__(
        self, nodes: Sequence[fx.Node], units: dict[fx.Node, UnitMatch], refusals: Refusals, left: dict[fx.Node, str]
    ) -> None:
        self.nodes, self.units, self.refusals, self.left = nodes, units, refusals, left
        self.order = refusals.order
        self.taken: set[fx.Node] = set()

    def _back(self, last: UnitMatch) -> list[UnitMatch]:
        """The longest sequence of units that ends with ``last``."""
        row = [last]
        while row[0].has_conv:
            before = self.units.get(row[0].start)
            if before is None or before.end in self.taken or only_user(before.end) is not row[0].nodes[0]:
                break
            row.insert(0, before)
        return row

    def closed(self) -> Iterator[ChainMatch]:
        """The chains that an add closes."""
        for add in self.nodes:
            both = summands(add)
            if both is None:
                continue
            found = [c for pair in (both, both[::-1]) if (c := self._residual(add, *pair)) is not None]
            # prefers a shortcut from the chain's own input to another tensor, then the longer chain, then the later one
            found.sort(key=lambda c: (c.shortcut == "tensor", -len(c.units), -self.order[c.nodes[0]]))
            for chain in found:
                if self._accepted(chain):
                    yield chain
                    break

    def _residual(self, add: fx.Node, branch: fx.Node, other: fx.Node) -> ChainMatch | None:
        """The chain that ends with ``branch`` and that ``add`` closes."""
        origin, passed = _dropped(branch)
        last = self.units.get(origin)
        if last is None or last.act.name != "identity" or last.end in self.taken or only_user(branch) is not add:
            return None
        if other in written(add) and not self._alone(other, add):
            return None  # x += branch(x) changes a tensor that others hold
        if not _same_sum(add, branch, other):
            return None
        row = self._back(last)
        chain = ChainMatch(row, [])
        closing = self._shortcut(chain, other, add)
        chain.act, behind = followed_by_act(add)
        chain.nodes = [*(n for u in row for n in u.nodes), *passed, *closing, add, *behind]
        return chain

    def _alone(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether only ``user``, which writes into a value, uses the value or a view of it."""
        storage = storage_of(node)
        shared = [n for n in self.nodes[: self.order[user]] if n is not node and storage_of(n) == storage]
        return storage is not None and only_user(node) is user and not shared

    def _shortcut(self, chain: ChainMatch, other: fx.Node, add: fx.Node) -> list[fx.Node]:
        """Sets the shortcut of ``chain`` to the one that computes ``other``. Returns the shortcut's nodes."""
        if other is chain.start:
            chain.shortcut = "identity"
            return []
        if only_user(other) is add and other not in self.taken:
            unit = self.units.get(other)
            if unit is not None and unit.has_conv and unit.act.name == "identity" and unit.excitation is None:
                pooled = _avg_pool(unit, chain.start)
                if unit.start is chain.start or pooled is not None:
                    chain.shortcut, chain.projection, chain.avg_pool = "projection", unit, pooled
                    return [*([unit.start] if pooled is not None else []), *unit.nodes]
            if (stride := _zero_pad(other, chain)) is not None:
                chain.shortcut, chain.stride = "pad", stride
                return [other.args[0], other]  # type: ignore[list-item]
        chain.shortcut, chain.residual = "tensor", other
        return []

    def open(self) -> Iterator[ChainMatch]:
        """The chains that a max-pool closes, or nothing."""
        for unit in reversed(list(self.units.values())):
            if unit.end in self.taken or unit.nodes[0] in self.taken:
                continue
            row = self._back(unit)
            chain = ChainMatch(row, [n for u in row for n in u.nodes], act=unit.act)
            user = only_user(unit.end)
            given = arguments(user) if user is not None and kind_of(user) == "max_pool" else None
            plain = given is not None and not given["ceil_mode"] and not given["return_indices"]
            plain &= unit.excitation is None and chain.dims < 3  # the pass with a max-pool is for images
            if plain and given is not None and given["dilation"] in (1, (1,), (1, 1), [1], [1, 1]):
                window = (given["kernel_size"], given["stride"] or None, given["padding"])
                chain.max_pool = _pool(chain.dims, *window)
                if chain.max_pool is not None and self._accepted(pooled := _with(chain, user)):
                    yield pooled
                    continue
                chain.max_pool = None
            if self._accepted(chain):
                yield chain

    def _accepted(self, chain: ChainMatch) -> bool:
        """Takes the chain's nodes, if the chain can run at the place of its last node."""
        if self.taken.intersection(chain.nodes):
            return False
        if reason := self.refusals.why_not(chain):
            self.left |= {u.norm: reason for u in chain.all_units if not u.affine}
            return False
        self.taken.update(chain.nodes)
        for unit in chain.all_units:
            self.left.pop(unit.norm, None)
        return True


def _dropped(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Skips dropouts that drop nothing, backwards."""
    passed: list[fx.Node] = []
    while kind_of(node) == "dropout" and (given := arguments(node)) and given["training"] is False:
        passed.insert(0, node)
        node = given["input"]
    return node, passed


def _same_sum(add: fx.Node, branch: fx.Node, other: fx.Node) -> bool:
    """Whether the add neither converts nor broadcasts a summand."""
    values = [value_of(n) for n in (add, branch, other)]
    if any(v is None for v in values):
        return False
    shape, dtype = values[0].shape, values[0].dtype  # type: ignore[union-attr]
    return all(v.shape == shape and v.dtype == dtype for v in values)  # type: ignore[union-attr]


def _avg_pool(unit: UnitMatch, start: fx.Node) -> PoolSpec | None:
    """The average pool between ``start`` and a projection."""
    given = arguments(unit.start) if kind_of(unit.start) == "avg_pool" else None
    if given is None or given["input"] is not start or only_user(unit.start) is not unit.nodes[0]:
        return None
    if given["divisor_override"] is not None:
        return None
    window = (given["kernel_size"], given["stride"] or None, given["padding"])
    return _pool(unit.dims, *window, given["ceil_mode"], given["count_include_pad"])


def _zero_pad(node: fx.Node, chain: ChainMatch) -> tuple[int, ...] | None:
    """The stride of option A's shortcut: every stride-th pixel, and zero channels appended."""
    given = arguments(node) if kind_of(node) == "pad" else None
    strided: Any = given["input"] if given is not None else None
    if given is None or given["mode"] != "constant" or given["value"] not in (None, 0, 0.0):
        return None
    if not isinstance(strided, fx.Node) or strided.args[:1] != (chain.start,) or only_user(strided) is not node:
        return None
    index: Any = strided.args[1] if getattr(strided.target, "__name__", "") == "getitem" else None
    dims = chain.dims
    if not isinstance(index, tuple) or len(index) != dims + 2 or not all(isinstance(i, slice) for i in index):
        return None
    steps = [i.step or 1 for i in index]
    whole = all(i.start is None and i.stop is None for i in index) and steps[:2] == [1, 1]
    pad = given["pad"]
    behind = isinstance(pad, list | tuple) and len(pad) == 2 * dims + 2 and not any(pad[:-1])
    if not (whole and behind and all(type(s) is int for s in steps)):
        return None
    return (1, *steps[2:]) if dims == 1 else tuple(steps[2:])


def _with(chain: ChainMatch, node: Any) -> ChainMatch:
    """The chain with one more node at its end."""
    return replace(chain, nodes=[*chain.nodes, node])


def _pool(dims: int, *window: Any) -> PoolSpec | None:
    """The window over images of ``dims`` dimensions; over signals as that over images."""
    make: Any = PoolSpec.make
    try:
        return signals.pool(make(*window, dims=dims))
    except (TypeError, ValueError):
        return None
