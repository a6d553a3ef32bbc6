"""Chains in a traced forward: conv -> norm -> act units in a row, what closes them, and what is left.

unit     a norm, the convolution before it if nobody else uses its output, the activation behind it likewise
chain    units in a row; closed by an add, whose other summand is a shortcut or just a tensor, and its activation,
         or by a max-pool, or by nothing
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from fused_resnet.modules import ACT_MODULES
from fused_resnet.patterns import (
    ADDS,
    ZERO_PAD,
    act_call,
    class_name,
    looks_like_norm,
    mutates,
    norm_kind,
    original,
    same_as,
)
from fused_resnet.plans import ChainPaths, Path, Plan, Ref, Step, UnitPaths, at
from fused_resnet.spec import Act
from fused_resnet.tracing import Guard, Trace, parts


@dataclass(eq=False)
class _Unit:
    """Nodes of a unit: its first, its norm and its last; ``start``: what it reads."""

    paths: UnitPaths
    start: fx.Node
    nodes: list[fx.Node]

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]


@dataclass(eq=False)
class Match:
    """A chain and the nodes that it stands for; ``reads``: its input and, after it, a summand that is a tensor."""

    paths: ChainPaths
    nodes: list[fx.Node]
    reads: list[fx.Node] = field(default_factory=list)

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]


class Matcher:
    """The chains of one trace of ``m``.

    Args:
        shared: id of a module that has several places in the model, and no chain may run -> their names.

    Attributes:
        matches: the chains. left: why norms and adds are in none, one sentence each.
    """

    def __init__(self, m: nn.Module, trace: Trace, shared: Mapping[int, list[str]]) -> None:
        self.trace, self.module, self.shared = trace, m, shared
        self.passed = self._pass_identities()
        self.nodes = list(trace.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        # the second call of a norm finds the statistics that the first has updated
        self.calls = Counter(node.target for node in self.nodes if node.op == "call_module")
        self.taken: set[fx.Node] = set()
        self.left: list[str] = []
        self.units = {unit.end: unit for unit in map(self._unit, self.nodes) if unit is not None}
        self.matches = sorted([*self._closed(), *self._open()], key=lambda match: self.order[match.end])
        self.left += self._others({n for match in self.matches for n in match.nodes})

    # ------------------------------------------------------------------------------------------------ what a node is
    def child(self, node: Any) -> nn.Module | None:
        """The module that a node calls with one input."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        return self.module.get_submodule(str(node.target)) if isinstance(node.args[0], fx.Node) else None

    def _pass_identities(self) -> tuple[Path, ...]:
        passed = []
        for node in list(self.trace.graph.nodes):
            if type(self.child(node)) is nn.Identity:
                passed.append(parts(str(node.target)))
                node.replace_all_uses_with(node.args[0])
                self.trace.graph.erase_node(node)
        return tuple(passed)

    def _act(self, node: fx.Node) -> Path | Act | None:
        m = self.child(node)
        if m is not None:
            return parts(str(node.target)) if same_as(type(m)) in ACT_MODULES else None
        return act_call(node.target, node.args, node.kwargs) if node.op in ("call_function", "call_method") else None

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        if len(node.users) != 1 or node.op in ("placeholder", "get_attr"):
            return None
        (user,) = node.users
        return user if user.all_input_nodes.count(node) == 1 and user.args[:1] else None

    def _norm(self, node: fx.Node) -> nn.Module | None:
        m = self.child(node)
        return m if m is not None and looks_like_norm(m) else None

    def _unit(self, node: fx.Node) -> _Unit | None:
        norm: Any = self._norm(node)
        if norm is None or self.calls[node.target] > 1:
            return None
        before, nodes = node.args[0], [node]
        assert isinstance(before, fx.Node)
        act: Path | Act | None = None
        kind, user = norm_kind(type(norm)), self._only_user(node)
        if kind is not None and kind[1] and type(norm.act) is not nn.Identity:
            act = (*parts(str(node.target)), "act")
        elif user is not None and user.args[0] is node and (act := self._act(user)) is not None:
            nodes.append(user)
        alone = _Unit(UnitPaths(None, parts(str(node.target)), act), before, nodes)
        if not isinstance(self.child(before), nn.Conv2d) or self._only_user(before) is not node:
            return self._accepted(alone)
        assert isinstance(start := before.args[0], fx.Node)
        both = _Unit(replace(alone.paths, conv=parts(str(before.target))), start, [before, *nodes])
        once = self.calls[before.target] == 1
        return (self._accepted(both) if once else None) or self._accepted(alone)

    def _accepted(self, unit: _Unit) -> _Unit | None:
        """The unit, if a chain can run its modules."""
        reason = self._several_places(unit.paths.paths) or unit.paths.modules(self.module).why_not()
        if reason is None:
            return unit
        self.left.append(reason)
        return None

    def _several_places(self, paths: list[Path]) -> str | None:
        for m in (at(self.module, path) for path in paths):
            if id(m) in self.shared:
                return f"a {type(m).__name__} is shared: {', '.join(self.shared[id(m)])}"
        return None

    # ------------------------------------------------------------------------------------------------ chains
    def _back(self, last: _Unit) -> list[_Unit]:
        """The units in a row that end with ``last``."""
        row = [last]
        while row[0].paths.conv is not None:
            before = self.units.get(row[0].start)
            if before is None or before.end in self.taken or self._only_user(before.end) is not row[0].nodes[0]:
                break
            row.insert(0, before)
        return row

    def _closed(self) -> Iterator[Match]:
        """Rows that an add closes."""
        for add in self.nodes:
            if add.op not in ("call_function", "call_method") or add.target not in ADDS or add.kwargs:
                continue
            if len(add.args) != 2 or not all(isinstance(a, fx.Node) for a in add.args) or add.args[0] is add.args[1]:
                continue
            found = [
                match
                for branch, other in (add.args, add.args[::-1])
                if (match := self._residual(add, branch, other)) is not None
            ]
            # a shortcut from the chain's own input before somebody else's tensor, the longer one, the later one
            found.sort(key=lambda f: (f.paths.shortcut == "tensor", -len(f.paths.units), -self.order[f.nodes[0]]))
            reasons = []
            for match in found:
                if (reason := self._why_not(match)) is None:
                    self.taken.update(match.nodes)
                    yield match
                    break
                reasons.append(reason)
            else:
                self.left += reasons

    def _residual(self, add: fx.Node, branch: fx.Node, other: fx.Node) -> Match | None:
        last = self.units.get(branch)
        if last is None or last.paths.act is not None or last.end in self.taken or self._only_user(branch) is not add:
            return None
        if mutates(add.target, add.args, add.kwargs) and add.args[0] is other and self._only_user(other) is not add:
            return None  # x += branch(x) changes what others hold
        row = self._back(last)
        start = row[0].start
        paths, nodes = self._shortcut(other, add, start)
        nodes = [*(n for u in row for n in u.nodes), *nodes, add]
        act = None
        user = self._only_user(add)
        if user is not None and user.args[0] is add:
            act = self._act(user)
            if act is not None:
                nodes.append(user)
        units = [u.paths for u in row]
        units[-1] = replace(units[-1], act=act)
        chain = replace(paths, units=tuple(units))
        return Match(chain, nodes, [start, other] if chain.shortcut == "tensor" else [start])

    def _shortcut(self, other: fx.Node, add: fx.Node, start: fx.Node) -> tuple[ChainPaths, list[fx.Node]]:
        """How ``other`` comes of ``start``, in a chain without units, and the nodes on the way."""
        if other is start:
            return ChainPaths((), "identity"), []
        if self._only_user(other) is add and other not in self.taken:
            m, unit = self.child(other), self.units.get(other)
            if m is not None and class_name(type(m)) == ZERO_PAD and other.args[0] is start:
                return ChainPaths((), "pad", parts(str(other.target))), [other]
            if unit is not None and unit.paths.conv is not None and unit.paths.act is None:
                if unit.start is start:
                    return ChainPaths((), unit.paths), unit.nodes
                pool = self.child(unit.start)
                if type(pool) is nn.AvgPool2d and unit.start.args[0] is start:
                    if self._only_user(unit.start) is unit.nodes[0]:
                        path = parts(str(unit.start.target))
                        return ChainPaths((), unit.paths, avg_pool=path), [unit.start, *unit.nodes]
        return ChainPaths((), "tensor"), []

    def _open(self) -> Iterator[Match]:
        """Rows that nothing closes, or a max-pool."""
        for unit in reversed(list(self.units.values())):
            if unit.end in self.taken or unit.nodes[0] in self.taken:
                continue
            row = self._back(unit)
            nodes, pool = [n for u in row for n in u.nodes], None
            user = self._only_user(row[-1].end)
            if user is not None and isinstance(self.child(user), nn.MaxPool2d):
                m: Any = self.child(user)
                if type(m) is nn.MaxPool2d and not (m.return_indices or m.ceil_mode or m.dilation not in (1, (1, 1))):
                    pool = parts(str(user.target))
                    nodes.append(user)
            match = Match(ChainPaths(tuple(u.paths for u in row), max_pool=pool), nodes, [row[0].start])
            if (reason := self._why_not(match)) is None:
                self.taken.update(nodes)
                yield match
            else:
                self.left.append(reason)

    def _why_not(self, match: Match) -> str | None:
        """Why the chain can't run, or None."""
        if not self._keeps_order(match):
            return f"what the chain of {'.'.join(match.paths.units[0].bn)} reads is changed in place before its end"
        chain, reason = match.paths.checked(self.module)
        if chain is None or reason is not None:
            return reason
        first = chain.units[0]
        images = len(chain.units) > 1 or first.conv is not None or isinstance(self.child(match.reads[0]), nn.Conv2d)
        if type(first.bn) is nn.SyncBatchNorm and not images:
            return "a SyncBatchNorm without a convolution, which may get other than images"
        return None

    def _keeps_order(self, match: Match) -> bool:
        """A chain reads its input where its last node was: nobody may have changed it by then."""
        first, last = min(self.order[node] for node in match.nodes), self.order[match.end]
        shares, inside = self._may_share(match.reads), set(match.nodes)
        return not any(self._changes(node, shares) for node in self.nodes[first:last] if node not in inside)

    def _changes(self, node: fx.Node, shares: set[fx.Node]) -> bool:
        """Whether the call may write into one of ``shares``."""
        if node.op == "call_module":
            called = self.module.get_submodule(str(node.target)).modules()
            return not shares.isdisjoint(node.all_input_nodes) and any(getattr(m, "inplace", False) for m in called)
        written = (*node.args[:1], node.kwargs.get("input"), node.kwargs.get("out"))
        return any(value in shares for value in written if isinstance(value, fx.Node)) and mutates(
            node.target, node.args, node.kwargs
        )

    def _may_share(self, reads: list[fx.Node]) -> set[fx.Node]:
        """The values that may be views of these: what a module with parameters returns is none."""
        shares: set[fx.Node] = set()
        found = list(reads)
        while found:
            value = found.pop()
            shares.add(value)
            found += [user for user in value.users if user not in shares and not self._computes(user)]
        return shares

    def _computes(self, node: fx.Node) -> bool:
        called = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        return called is not None and next(called.parameters(), None) is not None

    # ------------------------------------------------------------------------------------------------ the plan
    def crosses(self, match: Match) -> set[str]:
        """The inlined modules that the chain reaches into and out of."""
        within = {str(node.meta["within"]) for node in match.nodes}
        every = set(self.trace.inlined) - {""}
        inside = [{path for path in every if w == path or w.startswith(f"{path}.")} for w in within]
        return {path for paths in inside for path in paths if any(path not in others for others in inside)}

    @property
    def open(self) -> bool:
        """One path of modules and activations from the input to the output."""
        node, *others = self.nodes
        for user in others:
            if list(node.users) != [user] or user.all_input_nodes != [node]:
                return False
            if self.child(user) is None and self._act(user) is None and user.op != "output":
                return False
            node = user
        return node.op == "output" and node.args[0] is self.nodes[-2]

    def plan(self, modal: bool) -> Plan:
        """The forward with its chains."""
        ends = {match.end: i for i, match in enumerate(self.matches)}
        inside = {n for match in self.matches for n in match.nodes} - ends.keys()
        steps = [self._step(node, ends) for node in self.nodes[1:-1] if node not in inside]
        output = _refs(self.nodes[-1].args[0])
        paths = tuple(match.paths for match in self.matches)
        # a forward may call a child's children without calling the child
        owners = {*map(parts, self.trace.inlined), *_lists(self.module, self.trace.inlined)}
        owners = owners.union(*(chain.owners for chain in paths))
        guards = tuple(Guard.of(path, at(self.module, path)) for path in sorted(owners))
        return Plan(
            self.trace.takes,
            self.nodes[0].name,
            _with_dead(_joined(steps, output), output),
            output,
            paths,
            guards,
            self.passed,
            self.trace.sizes,
            modal,
            tuple(dict.fromkeys(self.left)),
        )

    def _step(self, node: fx.Node, ends: dict[fx.Node, int]) -> Step:
        if node in ends:
            i = ends[node]
            return Step(node.name, "chain", i, tuple(Ref(n.name) for n in self.matches[i].reads))
        if node.op == "get_attr":
            return Step(node.name, "attribute", parts(str(node.target)))
        args, kwargs = _refs(node.args), _refs(node.kwargs)
        if node.op == "call_module":
            return Step(node.name, "children", (parts(str(node.target)),), args, kwargs)
        kind = "function" if node.op == "call_function" else "method"
        return Step(node.name, kind, node.target, args, kwargs)

    def _others(self, inside: set[fx.Node]) -> Iterator[str]:
        """What looks like part of a chain and isn't: adds, activations behind a norm, other norms."""
        for node in self.nodes:
            if isinstance(self.child(node), nn.GroupNorm | nn.modules.batchnorm._NormBase) and not self._norm(node):
                yield f"{self._name(node)}: no chain has this norm"
            if self._norm(node) and self.calls[node.target] > 1:
                yield f"{self._name(node)} is called {self.calls[node.target]} times"
            if node in inside or node.op not in ("call_function", "call_method"):
                continue
            if node.target in ADDS and all(isinstance(a, fx.Node) for a in node.args):
                user = self._only_user(node)
                if user is not None and self._act(user) is not None:
                    before = [self._name(a) for a in node.args if isinstance(a, fx.Node) and a.op == "call_module"]
                    yield f"the add behind {' and '.join(before) or 'functions'}"
        for unit in self.units.values():
            user = self._only_user(unit.end)
            m = self.child(user) if user is not None else None
            if unit.paths.act is None and type(m).__module__.rpartition(".")[2].startswith("activation"):
                yield f"{self._name(user)}: no chain has this activation"

    def _name(self, node: Any) -> str:
        return f"{node.target} ({original(self.module.get_submodule(str(node.target))).__name__})"


def _lists(m: nn.Module, inlined: tuple[str, ...]) -> Iterator[Path]:
    """Lists of modules, whose children the forwards call themselves."""
    for owner in inlined:
        for path, child in m.get_submodule(owner).named_children():
            if isinstance(child, nn.ModuleList | nn.ModuleDict):
                yield (*parts(owner), path)


def _refs(arguments: Any) -> Any:
    """fx's arguments with references in the place of nodes, in plain containers."""
    if isinstance(arguments, fx.Node):
        return Ref(arguments.name)
    if isinstance(arguments, tuple):
        made = [_refs(a) for a in arguments]
        return type(arguments)(*made) if hasattr(arguments, "_fields") else tuple(made)
    if isinstance(arguments, list):
        return [_refs(a) for a in arguments]
    if isinstance(arguments, dict):
        return {k: _refs(v) for k, v in arguments.items()}
    if isinstance(arguments, slice):
        return slice(_refs(arguments.start), _refs(arguments.stop), _refs(arguments.step))
    return arguments


def _used(arguments: Any) -> Iterator[str]:
    if isinstance(arguments, Ref):
        yield arguments.name
    elif isinstance(arguments, tuple | list):
        for a in arguments:
            yield from _used(a)
    elif isinstance(arguments, dict):
        yield from _used(list(arguments.values()))
    elif isinstance(arguments, slice):
        yield from _used([arguments.start, arguments.stop, arguments.step])


def _joined(steps: list[Step], output: Any) -> list[Step]:
    """Children that are called one after the other, each on what the one before made, as one step."""
    uses = [name for step in steps for name in _used([step.args, step.kwargs])] + list(_used(output))
    joined: list[Step] = []
    for step in steps:
        before = joined[-1] if joined else None
        if (
            before is not None
            and before.kind == step.kind == "children"
            and not (before.kwargs or step.kwargs)
            and step.args == (Ref(before.name),)
            and len(before.args) == 1
            and uses.count(before.name) == 1
        ):
            joined[-1] = replace(before, name=step.name, target=before.target + step.target)
        else:
            joined.append(step)
    return joined


def _with_dead(steps: list[Step], output: Any) -> tuple[Step, ...]:
    """Each step with the values that are used there for the last time."""
    alive = set(_used(output))
    found: list[Step] = []
    for step in reversed(steps):
        used = set(_used([step.args, step.kwargs]))
        dead = sorted((used | {step.name}) - alive)
        found.append(replace(step, dead=tuple(dead)))
        alive |= used
    return tuple(reversed(found))
