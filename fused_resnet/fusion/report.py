"""The report of a captured graph, which does not keep the graph alive."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fused_resnet.chain import signals
from fused_resnet.fusion.inspection import named_modules
from fused_resnet.fusion.matches import ChainMatch, Matches, UnitMatch
from fused_resnet.fusion.table import value_of
from fused_resnet.spec import ConvSpec, PoolSpec

Place = tuple[str, str]  # the module's name inside the captured module, and its class's name


class Names:
    """The modules in which the nodes of a graph were called.

    After a graph break dynamo also captures the frames of inner modules, and calls each one's ``self`` the root. Its
    keys, the modules' ids, identify these modules.

    Args:
        graph: the captured graph. module: the module whose call was captured; None if it is unknown.
    """

    def __init__(self, graph: fx.Graph, module: nn.Module | None) -> None:
        self.known = {str(id(m)): (n, _class(type(m))) for n, m in named_modules(module)} if module is not None else {}
        self.frame: list[Place] = []  # the module whose frame it is, if that is not the captured one
        for node in graph.nodes:
            stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
            for key, (path, _) in list(stack.items())[:1]:
                name, (_, _, inner) = self._name(key), path.partition("].")
                if name is not None and inner and name.endswith(f".{inner}"):
                    outer = name.removesuffix(f".{inner}")
                    self.frame = [place for place in self.known.values() if place[0] == outer]
                    return

    def _name(self, key: str) -> str | None:
        place = self.known.get(key.partition("@")[0])  # "@1": the module's second call
        return place[0] if place is not None else None

    def stack(self, node: fx.Node) -> list[Place]:
        """The modules in which a node was called, outermost first, without the captured one."""
        stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        found = list(self.frame)
        for key, (path, cls) in stack.items():
            name = self._name(key)
            found.append((path.partition("].")[2] if name is None else name, _class(cls)))
        return found

    def of(self, node: fx.Node) -> Place:
        """The innermost of these modules."""
        stack = self.stack(node)
        return stack[-1] if stack else ("", "")


def _class(cls: Any) -> str:
    kind = getattr(cls, "_fr_original", cls)
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


@dataclass(frozen=True)
class UnitReport:
    """A unit: its norm's place, and its convolution and the shapes of the weight and the input, if it has one.

    ``image``: the input's shape; () if it is not the same in all calls, or if autocast converts it.
    """

    norm: Place
    conv: ConvSpec | None
    weight: tuple[int, ...]
    image: tuple[int, ...]
    device: str
    dtype: torch.dtype
    channels: int
    channels_last: bool
    group: str | None


@dataclass(frozen=True)
class ChainReport:
    """A chain: the module that contains all of it, and its units, a projection last.

    Attributes:
        row, place: chains with the same ``row`` run as one; this one is at position ``place``. choice: the row's
            ``Choice``, or the frozen row.
    """

    owner: Place
    units: tuple[UnitReport, ...]
    shortcut: str
    max_pool: PoolSpec | None
    row: str
    place: int
    choice: Any

    def inside(self, name: str) -> ChainReport:
        """The chain with its modules' names in a model that contains the captured module as ``name``."""

        def full(place: Place) -> Place:
            return (f"{name}.{place[0]}" if name and place[0] else place[0] or name, place[1])

        units = tuple(replace(unit, norm=full(unit.norm)) for unit in self.units)
        return replace(self, owner=full(self.owner), units=units)


class GraphReport:
    """One captured graph.

    Args:
        matches: the matches in it. names: its modules' names.

    Attributes:
        chains: in the graph's order; those with the same ``row`` run as one. left: a norm -> why it is in no chain.
        norms: the number of norms. ran: the number of times that the graph ran.
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
        w = signals.image(w)
        conv = ConvSpec.make(tuple(w.shape), **geometry, bias="bias" in unit.tensors)
    like = w if w is not None else x
    start = value_of(unit.start)
    # as rows run: signals and volumes in channels_last, images if they or the weight are
    last = x.dim() != 4 or any(not t.is_contiguous() for t in (start, w) if t is not None)
    shape = tuple(map(int, w.shape)) if w is not None else ()
    return UnitReport(
        names.of(unit.norm),
        conv,
        shape,
        _image(unit, w),
        like.device.type,
        like.dtype,
        int(x.shape[1]),
        last,
        unit.options.get("process_group"),
    )


def _image(unit: UnitMatch, weight: torch.Tensor | None) -> tuple[int, ...]:
    """See ``UnitReport``."""
    x, y = value_of(unit.start), value_of(unit.nodes[0])
    if x is None or y is None or weight is None or not x.dtype == y.dtype == weight.dtype:
        return ()
    return tuple(signals.image(x).shape) if all(type(n) is int for n in x.shape) else ()


def _owner(chain: ChainMatch, names: Names) -> Place:
    """The innermost module that contains all of a chain's calls."""
    stacks = [names.stack(node) for node in chain.nodes]
    common: Place = ("", "")
    for level in zip(*stacks):
        if len(set(level)) > 1:
            break
        common = level[0]
    return common
