"""What was found in a captured graph, without the graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fused_resnet.fusion.matcher import ChainMatch, Matches, UnitMatch
from fused_resnet.fusion.table import value_of
from fused_resnet.spec import ConvSpec, PoolSpec

Place = tuple[str, str]  # a module's name in the captured one, and its class's


@dataclass(frozen=True)
class UnitReport:
    """A unit: where its norm is, and its convolution with the weight's shape, if it has one."""

    norm: Place
    conv: ConvSpec | None
    weight: tuple[int, ...]
    device: str
    dtype: torch.dtype
    channels: int
    channels_last: bool
    group: str | None


@dataclass(frozen=True)
class ChainReport:
    """A chain: the module that all of it belongs to, and its units, a projection last."""

    owner: Place
    units: tuple[UnitReport, ...]
    max_pool: PoolSpec | None
    row: str

    def inside(self, name: str) -> ChainReport:
        """With the names that its modules have in one that has the captured one as ``name``."""

        def full(place: Place) -> Place:
            return (f"{name}.{place[0]}" if name and place[0] else place[0] or name, place[1])

        units = tuple(replace(unit, norm=full(unit.norm)) for unit in self.units)
        return replace(self, owner=full(self.owner), units=units)


class GraphReport:
    """One captured graph.

    Attributes:
        chains: in its order; those with the same ``row`` run as one. left: a norm -> why it is in none.
        norms: how many there are. ran: how many times the graph ran.
    """

    def __init__(self, matches: Matches) -> None:
        self.norms, self.ran = matches.norms, 0
        self.chains = [
            _chain(chain, f"{id(matches)} {i}") for i, row in enumerate(matches.rows) for chain in row.chains
        ]
        self.left = {_place(norm): reason for norm, reason in matches.left.items()}
        self.rows = len(matches.rows)

    def __str__(self) -> str:
        taken = sum(len(chain.units) for chain in self.chains)
        left = "".join(f"; left {name or kind}: {reason}" for (name, kind), reason in self.left.items())
        return f"{taken} norms in {len(self.chains)} chains, {self.rows} rows{left}"


def _chain(chain: ChainMatch, row: str) -> ChainReport:
    return ChainReport(_owner(chain), tuple(map(_unit, chain.all_units)), chain.max_pool, row)


def _unit(unit: UnitMatch) -> UnitReport:
    x, weight = value_of(unit.norm), unit.tensors.get("weight")
    assert x is not None
    w = value_of(weight) if weight is not None else None
    conv = None
    if w is not None:
        geometry = {k: unit.options[k] for k in ("stride", "padding", "dilation", "groups")}
        conv = ConvSpec.make(tuple(w.shape), **geometry, bias="bias" in unit.tensors)
    like = w if w is not None else x
    last = not like.is_contiguous() or tuple(like.shape[2:]) == (1, 1)
    shape = tuple(map(int, w.shape)) if w is not None else ()
    return UnitReport(
        _place(unit.norm),
        conv,
        shape,
        like.device.type,
        like.dtype,
        int(x.shape[1]),
        last,
        unit.options.get("process_group"),
    )


def _stack(node: fx.Node) -> list[Place]:
    """The modules that a node was called in, outermost first, the captured one left out."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    found = []
    for path, cls in stack.values():
        _, _, name = path.partition("].")
        kind = getattr(cls, "_fr_original", cls)
        found.append((name, kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]))
    return found


def _place(node: fx.Node) -> Place:
    stack = _stack(node)
    return stack[-1] if stack else ("", "")


def _owner(chain: ChainMatch) -> Place:
    """The innermost module that all of a chain's calls are in."""
    stacks = [_stack(node) for node in chain.nodes]
    common: Place = ("", "")
    for level in zip(*stacks):
        if len(set(level)) > 1:
            break
        common = level[0]
    return common
