"""What was found in a captured graph, without the graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fused_resnet.fusion.inspection import named_modules
from fused_resnet.fusion.matches import ChainMatch, Matches, UnitMatch
from fused_resnet.fusion.table import value_of
from fused_resnet.spec import ConvSpec, PoolSpec

Place = tuple[str, str]  # a module's name in the captured one, and its class's


class Names:
    """Where the nodes of a graph were called.

    Behind a graph break dynamo captures the frames of inner modules, too, and calls their own ``self`` the root: its
    keys, which are the modules' ids, tell which they are.

    Args:
        graph: captured. module: whose call was captured, None where it isn't known.
    """

    def __init__(self, graph: fx.Graph, module: nn.Module | None) -> None:
        self.known = {str(id(m)): (n, _class(type(m))) for n, m in named_modules(module)} if module is not None else {}
        self.frame: list[Place] = []  # the module whose frame it is, where that isn't the captured one
        for node in graph.nodes:
            stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
            for key, (path, _) in list(stack.items())[:1]:
                name, (_, _, inner) = self._name(key), path.partition("].")
                if name is not None and inner and name.endswith(f".{inner}"):
                    outer = name.removesuffix(f".{inner}")
                    self.frame = [place for place in self.known.values() if place[0] == outer]
                    return

    def _name(self, key: str) -> str | None:
        place = self.known.get(key.partition("@")[0])  # "@1": its second call
        return place[0] if place is not None else None

    def stack(self, node: fx.Node) -> list[Place]:
        """The modules that a node was called in, outermost first, the captured one left out."""
        stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        found = list(self.frame)
        for key, (path, cls) in stack.items():
            name = self._name(key)
            found.append((path.partition("].")[2] if name is None else name, _class(cls)))
        return found

    def of(self, node: fx.Node) -> Place:
        """The innermost of them."""
        stack = self.stack(node)
        return stack[-1] if stack else ("", "")


def _class(cls: Any) -> str:
    kind = getattr(cls, "_fr_original", cls)
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


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
    """A chain: the module that all of it belongs to, and its units, a projection last.

    Attributes:
        row, place: the chains with one ``row`` run as one, this one at its ``place``. choice: whether the row pays, or
            the frozen row.
    """

    owner: Place
    units: tuple[UnitReport, ...]
    shortcut: str
    max_pool: PoolSpec | None
    row: str
    place: int
    choice: Any

    def inside(self, name: str) -> ChainReport:
        """With the names that its modules have in one that has the captured one as ``name``."""

        def full(place: Place) -> Place:
            return (f"{name}.{place[0]}" if name and place[0] else place[0] or name, place[1])

        units = tuple(replace(unit, norm=full(unit.norm)) for unit in self.units)
        return replace(self, owner=full(self.owner), units=units)


class GraphReport:
    """One captured graph.

    Args:
        matches: what was found in it. names: of its modules.

    Attributes:
        chains: in its order; those with the same ``row`` run as one. left: a norm -> why it is in none.
        norms: how many there are. ran: how many times the graph ran.
    """

    def __init__(self, matches: Matches, names: Names) -> None:
        self.norms, self.ran = matches.norms, 0
        self.chains = [
            _chain(chain, f"{id(matches)} {i}", place, row.choice, names)
            for i, row in enumerate(matches.rows)
            for place, chain in enumerate(row.chains)
        ]
        self.left = {names.of(norm): reason for norm, reason in matches.left.items()}
        self.rows = len(matches.rows)

    def __str__(self) -> str:
        taken = sum(len(chain.units) for chain in self.chains)
        left = "".join(f"; left {name or kind}: {reason}" for (name, kind), reason in self.left.items())
        return f"{taken} norms in {len(self.chains)} chains, {self.rows} rows{left}"


def _chain(chain: ChainMatch, row: str, place: int, choice: Any, names: Names) -> ChainReport:
    units = tuple(_unit(unit, names) for unit in chain.all_units)
    return ChainReport(_owner(chain, names), units, chain.shortcut, chain.max_pool, row, place, choice)


def _unit(unit: UnitMatch, names: Names) -> UnitReport:
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
        names.of(unit.norm),
        conv,
        shape,
        like.device.type,
        like.dtype,
        int(x.shape[1]),
        last,
        unit.options.get("process_group"),
    )


def _owner(chain: ChainMatch, names: Names) -> Place:
    """The innermost module that all of a chain's calls are in."""
    stacks = [names.stack(node) for node in chain.nodes]
    common: Place = ("", "")
    for level in zip(*stacks):
        if len(set(level)) > 1:
            break
        common = level[0]
    return common
