"""Finds chains and rows in a captured graph, and says why the other norms are in none.

unit     a norm; the convolution before it, if only the norm uses its output; the activation after it, if only that uses
         the norm's output
chain    units one after the other; closed by an add and its activation, where the add's other summand is a shortcut or
         another tensor; or closed by a max-pool; or by nothing
row      chains one after the other, where only the next chain uses a chain's output

The graph is dynamo's. It consists of torch functions, and each node has the tensor that the tracer computed
(``example_value``). A chain runs at the place of its last node, so no node between its first and its last may write a
tensor that the chain reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from fused_resnet.checks import DTYPES
from fused_resnet.fusion.table import (
    MULS,
    act_of,
    arguments,
    kind_of,
    summands,
    switches_mode,
    value_of,
    written,
)
from fused_resnet.spec import Act, ConvSpec, PoolSpec

IDENTITY = Act("identity")
# The number of stages in a frozen stem's row, chosen by the size of their tensors in the paper's networks.
_STEM_STAGES = 2


@dataclass(eq=False)
class UnitMatch:
    """The nodes of a unit.

    Attributes:
        start: the node that the unit reads. nodes: its nodes, first to last. norm: the BatchNorm's node; it identifies
            the unit.
        tensors: field of ``units.Unit`` -> node. options: field -> constant; ``momentum`` may be a node.
        counter: the node that counts the batch; it belongs to the unit.
        affine: scale and shift ([1, C, 1, 1]) are given instead of statistics.
    """

    start: fx.Node
    nodes: list[fx.Node]
    norm: fx.Node
    tensors: dict[str, fx.Node]
    options: dict[str, Any]
    act: Act = IDENTITY
    counter: fx.Node | None = None
    affine: bool = False

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def has_conv(self) -> bool:
        return "weight" in self.tensors


@dataclass(eq=False)
class ChainMatch:
    """A chain. ``nodes``: all nodes that it replaces. ``residual``: the summand of the shortcut "tensor"."""

    units: list[UnitMatch]
    nodes: list[fx.Node]
    shortcut: Literal["none", "identity", "projection", "pad", "tensor"] = "none"
    projection: UnitMatch | None = None
    residual: fx.Node | None = None
    stride: tuple[int, int] = (1, 1)
    avg_pool: PoolSpec | None = None
    max_pool: PoolSpec | None = None
    act: Act = IDENTITY  # after the add, or the last unit's

    @property
    def start(self) -> fx.Node:
        return self.units[0].start

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def all_units(self) -> list[UnitMatch]:
        return [*self.units, *([self.projection] if self.projection is not None else [])]


@dataclass(eq=False)
class RowMatch:
    """Chains that run as one. ``choice``: set when the row is lowered; it decides whether they do."""

    chains: list[ChainMatch]
    choice: Any = None

    @property
    def nodes(self) -> list[fx.Node]:
        return [n for chain in self.chains for n in chain.nodes]

    @property
    def all_units(self) -> list[UnitMatch]:
        return [unit for chain in self.chains for unit in chain.all_units]


@dataclass
class Matches:
    """Attributes: rows: in the graph's order. left: norm -> why it is in no row. norms: the number of norms."""

    rows: list[RowMatch] = field(default_factory=list)
    left: dict[fx.Node, str] = field(default_factory=dict)
    norms: int = 0


def match(graph: fx.Graph, frozen: bool = False) -> Matches:
    """Finds the rows of a graph of torch functions, as dynamo gives it to a backend.

    Args:
        frozen: for inference: nothing is kept for a backward, and norms with batch statistics are left out.
    """
    return _Matcher(graph, frozen).matches


class _Matcher:
    def __init__(self, graph: fx.Graph, frozen: bool) -> None:
        self.frozen = frozen
        self.nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.writes = [(i, written(node)) for i, node in enumerate(self.nodes)]
        self.writes = [(i, changed) for i, changed in self.writes if changed]
        self.switches = [i for i, node in enumerate(self.nodes) if switches_mode(node)]
        self.counters = {m: n for n in self.nodes if counts_batch(n) and (m := _module(n)) is not None}
        self.matches = Matches(norms=sum(kind_of(n) == "norm" for n in self.nodes))
        self.taken: set[fx.Node] = set()
        self.units: dict[fx.Node, UnitMatch] = {}
        for node in self.nodes:
            if (unit := self._unit(node)) is not None:
                self.units[unit.end] = unit
        chains = sorted([*self._closed(), *self._open()], key=lambda chain: self.order[chain.end])
        self.matches.rows = list(self._rows(chains))

    # ------------------------------------------------------------------------------------------------ nodes
    def _only_user(self, node: fx.Node) -> fx.Node | None:
        """The node that uses a value, if there is only one and it uses the value once."""
        if len(node.users) != 1 or node.op not in ("call_function", "call_method"):
            return None
        (user,) = node.users
        return user if user.op != "output" and user.all_input_nodes.count(node) == 1 else None

    def _through(self, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """Skips dropouts that drop nothing: returns the node after which the graph continues, and the skipped nodes."""
        passed: list[fx.Node] = []
        while (user := self._only_user(node)) is not None and kind_of(user) == "dropout":
            given = arguments(user)
            if given is None or given["training"] is not False or given["input"] is not node:
                break
            passed.append(user)
            node = user
        return node, passed

    def _followed_by_act(self, node: fx.Node) -> tuple[Act, list[fx.Node]]:
        """The activation after a value, if nothing else uses the value, and the activation's nodes."""
        last, passed = self._through(node)
        user = self._only_user(last)
        if user is None or user.args[:1] != (last,) or (act := act_of(user)) is None:
            return IDENTITY, passed
        return act, [*passed, user]

    # ------------------------------------------------------------------------------------------------ units
    def _unit(self, node: fx.Node) -> UnitMatch | None:
        kind = kind_of(node)
        if kind == "norm":
            unit, reason = self._norm(node)
            if unit is None:
                self.matches.left[node] = reason
        else:
            unit = self._affine(node)
        if unit is None:
            return None
        unit.act, nodes = self._followed_by_act(unit.end)
        unit.nodes += nodes
        before = unit.start
        if kind_of(before) == "conv" and self._only_user(before) is unit.nodes[0] and self._add_conv(unit, before):
            return unit
        return unit

    def _norm(self, node: fx.Node) -> tuple[UnitMatch | None, str]:
        given = arguments(node)
        if given is None or not isinstance(given["input"], fx.Node):
            return None, "a batch_norm with arguments of unknown names"
        x, training = value_of(given["input"]), given["training"]
        if x is None or x.dim() != 4:
            return None, f"a norm of {x.dim() - 2 if x is not None else 'unknown'} dimensions"
        if x.dtype not in DTYPES or x.layout != torch.strided:
            return None, f"a norm of {x.dtype} values"
        if not isinstance(training, bool) or not isinstance(given["eps"], int | float):
            return None, "a norm whose mode or eps is computed"
        if training and self.frozen:
            return None, "a norm without running statistics"
        names = {"running_mean": "running_mean", "running_var": "running_var", "weight": "bn_weight", "bias": "bn_bias"}
        tensors = {to: given[of] for of, to in names.items() if given[of] is not None}
        if not all(isinstance(t, fx.Node) for t in tensors.values()):
            return None, "a norm whose parameters are constants"
        mean = tensors.get("running_mean")
        counter = self.counters.get(_module(node)) if training and mean is not None else None
        options = {"training": training, "momentum": given["momentum"], "eps": given["eps"]}
        if given.get("group") is not None:
            options["process_group"] = given["group"]
        return UnitMatch(given["input"], [node], node, tensors, options, counter=counter), ""

    def _affine(self, node: fx.Node) -> UnitMatch | None:
        """A unit from x * scale + shift per channel, as frozen norms compute it."""
        for product, shift in (pair for pair in (summands(node),) if pair is not None):
            factors = product.args if product.op != "placeholder" and product.target in MULS else ()
            if len(factors) != 2 or product.kwargs or self._only_user(product) is not node:
                return None
            x, scale = (value_of(f) for f in factors)
            t = value_of(shift)
            if x is None or scale is None or t is None or x.dim() != 4 or x.dtype not in DTYPES:
                return None
            if not (_per_channel(scale, x) and _per_channel(t, x)) or {scale.dtype, t.dtype} != {x.dtype}:
                return None
            start, factor = factors
            options = {"training": False, "momentum": 0.0, "eps": 0.0}
            tensors = {"bn_weight": factor, "bn_bias": shift}
            return UnitMatch(start, [product, node], node, tensors, options, affine=True)  # type: ignore[arg-type]
        return None

    def _add_conv(self, unit: UnitMatch, node: fx.Node) -> bool:
        """Adds the convolution before the unit to it, if a chain can run the convolution."""
        given = arguments(node)
        if given is None or not isinstance(given["input"], fx.Node) or not isinstance(given["weight"], fx.Node):
            return False
        x, weight = value_of(given["input"]), value_of(given["weight"])
        if x is None or weight is None or x.dim() != 4 or weight.dim() != 4:
            return False
        options = {name: given[name] for name in ("stride", "padding", "dilation", "groups")}
        try:
            ConvSpec.make(tuple(weight.shape), **options, bias=given["bias"] is not None)
        except (TypeError, ValueError):
            return False
        unit.tensors = (
            {"weight": given["weight"]}
            | ({"bias": given["bias"]} if given["bias"] is not None else {})
            | (unit.tensors)
        )
        unit.options |= options
        unit.start = given["input"]
        unit.nodes.insert(0, node)
        return True

    # ------------------------------------------------------------------------------------------------ chains
    def _back(self, last: UnitMatch) -> list[UnitMatch]:
        """The longest sequence of units that ends with ``last``."""
        row = [last]
        while row[0].has_conv:
            before = self.units.get(row[0].start)
            if before is None or before.end in self.taken or self._only_user(before.end) is not row[0].nodes[0]:
                break
            row.insert(0, before)
        return row

    def _closed(self) -> Iterator[ChainMatch]:
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
        origin, passed = self._dropped(branch)
        last = self.units.get(origin)
        if last is None or last.act.name != "identity" or last.end in self.taken or self._only_user(branch) is not add:
            return None
        if other in written(add) and not self._alone(other, add):
            return None  # x += branch(x) changes a tensor that others hold
        if not self._same_sum(add, branch, other):
            return None
        row = self._back(last)
        chain = ChainMatch(row, [])
        closing = self._shortcut(chain, other, add)
        chain.act, behind = self._followed_by_act(add)
        chain.nodes = [*(n for u in row for n in u.nodes), *passed, *closing, add, *behind]
        return chain

    def _alone(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether only ``user``, which writes into a value, uses the value or a view of it."""
        storage = storage_of(node)
        shared = [n for n in self.nodes[: self.order[user]] if n is not node and storage_of(n) == storage]
        return storage is not None and self._only_user(node) is user and not shared

    def _dropped(self, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """Skips dropouts that drop nothing, backwards."""
        passed: list[fx.Node] = []
        while kind_of(node) == "dropout" and (given := arguments(node)) and given["training"] is False:
            passed.insert(0, node)
            node = given["input"]
        return node, passed

    def _same_sum(self, add: fx.Node, branch: fx.Node, other: fx.Node) -> bool:
        """Whether the add neither converts nor broadcasts a summand."""
        values = [value_of(n) for n in (add, branch, other)]
        if any(v is None for v in values):
            return False
        shape, dtype = values[0].shape, values[0].dtype  # type: ignore[union-attr]
        return all(v.shape == shape and v.dtype == dtype for v in values)  # type: ignore[union-attr]

    def _shortcut(self, chain: ChainMatch, other: fx.Node, add: fx.Node) -> list[fx.Node]:
        """Sets the shortcut of ``chain`` to the one that computes ``other``. Returns the shortcut's nodes."""
        if other is chain.start:
            chain.shortcut = "identity"
            return []
        if self._only_user(other) is add and other not in self.taken:
            unit = self.units.get(other)
            if unit is not None and unit.has_conv and unit.act.name == "identity":
                pooled = self._avg_pool(unit, chain.start)
                if unit.start is chain.start or pooled is not None:
                    chain.shortcut, chain.projection, chain.avg_pool = "projection", unit, pooled
                    return [*([unit.start] if pooled is not None else []), *unit.nodes]
            if (stride := self._zero_pad(other, chain)) is not None:
                chain.shortcut, chain.stride = "pad", stride
                return [other.args[0], other]  # type: ignore[list-item]
        chain.shortcut, chain.residual = "tensor", other
        return []

    def _avg_pool(self, unit: UnitMatch, start: fx.Node) -> PoolSpec | None:
        """The average pool between ``start`` and a projection."""
        given = arguments(unit.start) if kind_of(unit.start) == "avg_pool" else None
        if given is None or given["input"] is not start or self._only_user(unit.start) is not unit.nodes[0]:
            return None
        if given["divisor_override"] is not None:
            return None
        window = (given["kernel_size"], given["stride"] or None, given["padding"])
        return _pool(*window, given["ceil_mode"], given["count_include_pad"])

    def _zero_pad(self, node: fx.Node, chain: ChainMatch) -> tuple[int, int] | None:
        """The stride of option A's shortcut: every stride-th pixel, and zero channels appended."""
        given = arguments(node) if kind_of(node) == "pad" else None
        strided: Any = given["input"] if given is not None else None
        if given is None or given["mode"] != "constant" or given["value"] not in (None, 0, 0.0):
            return None
        if (
            not isinstance(strided, fx.Node)
            or strided.args[:1] != (chain.start,)
            or self._only_user(strided) is not node
        ):
            return None
        index: Any = strided.args[1] if getattr(strided.target, "__name__", "") == "getitem" else None
        if not isinstance(index, tuple) or len(index) != 4 or not all(isinstance(i, slice) for i in index):
            return None
        steps = [i.step or 1 for i in index]
        whole = all(i.start is None and i.stop is None for i in index) and steps[:2] == [1, 1]
        pad = given["pad"]
        behind = isinstance(pad, list | tuple) and len(pad) == 6 and not any(pad[:5])
        return (steps[2], steps[3]) if whole and behind and all(type(s) is int for s in steps) else None

    def _open(self) -> Iterator[ChainMatch]:
        """The chains that a max-pool closes, or nothing."""
        for unit in reversed(list(self.units.values())):
            if unit.end in self.taken or unit.nodes[0] in self.taken:
                continue
            row = self._back(unit)
            chain = ChainMatch(row, [n for u in row for n in u.nodes], act=unit.act)
            user = self._only_user(unit.end)
            given = arguments(user) if user is not None and kind_of(user) == "max_pool" else None
            plain = given is not None and not given["ceil_mode"] and not given["return_indices"]
            if plain and given is not None and given["dilation"] in (1, (1, 1), [1, 1]):
                window = (given["kernel_size"], given["stride"] or None, given["padding"])
                chain.max_pool = _pool(*window)
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
        if reason := self._why_not(chain):
            self.matches.left |= {u.norm: reason for u in chain.all_units if not u.affine}
            return False
        self.taken.update(chain.nodes)
        for unit in chain.all_units:
            self.matches.left.pop(unit.norm, None)
        return True

    def _why_not(self, chain: ChainMatch) -> str | None:
        pool = chain.max_pool
        if pool is not None and pool.kernel[0] * pool.kernel[1] > 256:
            return "a max-pool with a window of more than 256 values"
        dtypes = {v.dtype for n in chain.nodes if (v := value_of(n)) is not None}
        x = value_of(chain.start)
        if len(dtypes) > 1 or x is None or (x.dtype not in dtypes and not chain.units[0].has_conv):
            return "its dtype changes inside the chain"
        if self.frozen:
            return self._disturbed([chain])
        # PyTorch saves weights for the backward too, but no biases
        biases = [
            unit.tensors[name] for unit in chain.all_units for name in ("bias", "bn_bias") if name in unit.tensors
        ]
        kept = {storage_of(n) for n in (chain.start, chain.residual, *biases) if n is not None}
        if any(i > self.order[chain.end] and kept & set(map(storage_of, changed)) for i, changed in self.writes):
            return "a tensor that its backward needs is changed in place after it"
        return self._disturbed([chain])

    def _disturbed(self, chains: Sequence[ChainMatch]) -> str | None:
        """The reason why the chains' nodes can't all run at the place of the last one, or None."""
        nodes = [n for chain in chains for n in chain.nodes]
        inside, reads = set(nodes), _reads(chains)
        first, last = min(self.order[n] for n in nodes), max(self.order[n] for n in nodes)
        if any(first < i < last for i in self.switches):
            return "gradients or autocast are switched on or off inside the chain"
        storages = {storage_of(n) for n in reads}
        for i, changed in self.writes:
            if first < i < last and self.nodes[i] not in inside and not counts_batch(self.nodes[i]):
                if any(storage_of(n) is None or storage_of(n) in storages for n in changed):
                    return "a tensor that it reads is changed in place before its last operator"
        updated = {storage_of(n) for n in _updates(chains)}
        for node in self.nodes[first:last]:
            if node not in inside and any(storage_of(n) in updated for n in node.all_input_nodes):
                return "its running statistics are used before its last operator"
        late = max((self.order[n] for n in reads), default=0)
        return "it reads a tensor that is computed after its last operator" if late > last else None

    # ------------------------------------------------------------------------------------------------ rows
    def _rows(self, chains: Sequence[ChainMatch]) -> Iterator[RowMatch]:
        """Groups chains that follow one another into rows."""
        by_start: dict[fx.Node, list[ChainMatch]] = {}
        for chain in chains:
            by_start.setdefault(chain.start, []).append(chain)
        seen: set[int] = set()
        for chain in chains:
            if id(chain) in seen:
                continue
            row = [chain]
            while (after := self._after(row, by_start)) is not None:
                row.append(after)
            seen.update(map(id, row))
            yield RowMatch(row)

    def _after(self, row: Sequence[ChainMatch], by_start: dict[fx.Node, list[ChainMatch]]) -> ChainMatch | None:
        """The chain that may run in one row with the chains before it."""
        end, followers = row[-1].end, by_start.get(row[-1].end, [])
        if len(followers) != 1:
            return None
        (after,) = followers
        if self.frozen:
            if not _fits_row(after) or (_begins_stage(after) and _stages(row) >= _STEM_STAGES):
                return None
        elif not all(map(_fits_row, (*row, after))) or _begins_stage(after):
            return None  # a stage is a row of its own: its parameters' gradients must not wait for all other stages
        if not set(end.users) <= set(after.nodes):
            return None
        whole = [*row, after]
        return after if self._disturbed(whole) is None else None


def _begins_stage(chain: ChainMatch) -> bool:
    return chain.shortcut in ("projection", "pad")


def _stages(row: Sequence[ChainMatch]) -> int:
    """The number of stages in a row after its stem. Without a stem it is the maximum, so that no stage is added."""
    stem = row[0]
    if stem.shortcut != "none" or (len(stem.units) > 1 and stem.max_pool is None):
        return _STEM_STAGES
    return 0 if len(row) == 1 else 1 + sum(map(_begins_stage, row[2:]))


def _fits_row(chain: ChainMatch) -> bool:
    """Whether a chain has nothing that is only allowed outside rows."""
    return chain.max_pool is None and chain.shortcut != "tensor" and chain.units[0].has_conv


def _reads(chains: Sequence[ChainMatch]) -> set[fx.Node]:
    """All values that the chains read from outside."""
    tensors = {t for chain in chains for unit in chain.all_units for t in unit.tensors.values()}
    computed = {m for c in chains for u in c.all_units if isinstance(m := u.options["momentum"], fx.Node)}
    return tensors | computed | {chains[0].start} | {c.residual for c in chains if c.residual is not None}


def _updates(chains: Sequence[ChainMatch]) -> list[fx.Node]:
    """The running statistics that the chains change."""
    units = [unit for chain in chains for unit in chain.all_units if unit.options["training"]]
    return [u.tensors[name] for u in units for name in ("running_mean", "running_var") if name in u.tensors]


def _with(chain: ChainMatch, node: Any) -> ChainMatch:
    """The chain with one more node at its end."""
    return replace(chain, nodes=[*chain.nodes, node])


def _pool(*window: Any) -> PoolSpec | None:
    try:
        return PoolSpec.make(*window)
    except (TypeError, ValueError):
        return None


def _module(node: fx.Node) -> Any:
    """The call of the module that a node comes from."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack)) if stack else None


def counts_batch(node: fx.Node) -> bool:
    """Whether a node is num_batches_tracked.add_(1) and nothing uses its result."""
    if node.op != "call_method" or node.target != "add_" or node.args[1:] != (1,) or node.users:
        return False
    counted = value_of(node.args[0])
    of: Any = node.args[0]
    return counted is not None and counted.dim() == 0 and counted.dtype == torch.int64 and len(of.users) == 1


def _per_channel(value: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether the shape is [1, C, 1, 1] or [C, 1, 1]."""
    shape = (1,) * (4 - value.dim()) + tuple(value.shape)
    return value.dim() in (3, 4) and shape == (1, x.shape[1], 1, 1)


def storage_of(node: fx.Node) -> int | None:
    """The storage of a node's tensor, which a view shares with its base; None if it is unknown."""
    while "dropout" in str(getattr(node.target, "__name__", "")):
        node = node.all_input_nodes[0]  # one that drops nothing returns its input, unlike in the tracer
    value = value_of(node)
    try:
        return value.untyped_storage()._cdata if value is not None else None
    except (NotImplementedError, RuntimeError):  # a tensor subclass without a storage
        return None
