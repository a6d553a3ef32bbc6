"""Rows of a captured graph for inference. BatchNorm is folded into the weights; the first use packs the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_resnet.backends import BnFold, Norm, loaded, vector_dtype
from fused_resnet.backends.steps import Excitation
from fused_resnet.base.arguments import number
from fused_resnet.base.layouts import channels_last, is_channels_last
from fused_resnet.chain import signals
from fused_resnet.chain.folding import fold_weight
from fused_resnet.chain.packing import Weight, values_of
from fused_resnet.chain.units import Unit
from fused_resnet.frozen.folded import FoldedChain, FoldedUnit
from fused_resnet.frozen.forward import Row, plain_chains, run_chains
from fused_resnet.fusion.lowering import ChainCall, ExcitationCall, HeadCall, Places, UnitCall, finish, put_in
from fused_resnet.fusion.matcher import match
from fused_resnet.fusion.matches import Matches, RowMatch
from fused_resnet.fusion.patterns import ACT_CALLS, ADDS
from fused_resnet.fusion.table import MULS, constant, storage_of, value_of, written
from fused_resnet.spec import Act, ChainSpec, ConvSpec, ShortcutSpec, UnitSpec

# A parameter or buffer -> the values to fold: those before it was rounded to 16 bits, or its own.
Exact = Callable[[Tensor], Tensor]
# Calls whose values do not depend on their operands' layout. These return images in the operands' layout.
_HAND_ON: set[Any] = {
    *ACT_CALLS, *ADDS, *MULS, torch.sub, "sub", torch.cat, torch.conv1d, F.conv1d, torch.conv2d, F.conv2d, torch.conv3d,
    F.conv3d, F.batch_norm, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    F.adaptive_max_pool3d, F.interpolate, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.pad, "clamp", torch.clamp,
}  # fmt: skip
# These return no images. Some return a view in one layout and a copy in another, so nobody may write into the result.
_TAKE_ANY: set[Any] = {torch.flatten, "flatten", "reshape", torch.reshape, "mean", torch.mean, "sum", "size", "dim"}


class _Folded(NamedTuple):
    """A folded row.

    Attributes:
        values: of its sources, see ``values_of``. kept: the sources as they were, which keeps them alive, so that no
            address is used again. calls: the row as one call, for each kind of input.
    """

    values: tuple[int, ...] | None
    kept: list[Tensor]
    chains: list[FoldedChain]
    calls: dict[Any, Row | None]

    def of(self, sources: Sequence[Tensor]) -> bool:
        """Whether the sources have the same shapes, strides and dtypes. Dynamo captures again if one has others."""
        looks = [[(t.shape, t.stride(), t.dtype) for t in tensors] for tensors in (self.kept, sources)]
        return looks[0] == looks[1]


class FrozenRow(nn.Module):
    """A row of chains in a lowered graph, called with its input, a summand, and the sources of its tensors.

    The first call folds the tensors. A later call folds them again if a source has changed.

    Args:
        gm, row: the graph and the row in it. states: the graph's inputs that are parameters or buffers. dtype: the
            images' dtype. portable: use only PyTorch's own operators. exact: see ``Exact``. known: the folded rows of
            one frozen model; further captures of the same row find theirs in it.

    Attributes:
        folded: the chains as they last ran; None before the first call.

    Raises:
        LookupError: some of its tensors depend on the model's inputs.
    """

    def __init__(
        self, gm: fx.GraphModule, row: RowMatch, states: set[fx.Node], dtype: torch.dtype, portable: bool, exact: Exact,
        known: dict[Any, _Folded],
    ) -> None:  # fmt: skip
        super().__init__()
        self.dtype, self.portable, self.exact, self.known = dtype, portable, exact, known
        places = Places()
        for node in (row.chains[0].start, row.chains[0].residual):
            if node is not None:
                places.of(node)
        images = list(places.nodes)
        self.chains = [ChainCall(chain, places) for chain in row.chains]
        self.head = HeadCall(row.head, places) if row.head is not None else None
        wanted = list(places.nodes)[len(images) :]
        self.constants, sources = _constants(gm, wanted, states)
        self.inputs = [*images, *sources]
        self.images, self.places = len(images), len(places.nodes)
        units = [str(unit.options) for chain in self.chains for unit in chain.all_units]
        head = [self.head.text] if self.head is not None else []
        self.text = "; ".join([*(chain.text for chain in self.chains), *head, *units, self.constants.code])
        self.made: _Folded | None = None
        row.choice = self

    @property
    def folded(self) -> list[FoldedChain] | None:
        return self.made.chains if self.made is not None else None

    def forward(self, *given: Tensor) -> Tensor:
        images, sources = given[: self.images], given[self.images :]
        values, made = values_of(*sources), self.made
        if made is None or values is None or made.values != values:
            self.made = made = self._fold(values, sources)
        residual = signals.image(images[1]) if len(images) > 1 else None
        row = signals.image(images[0]), made.chains, residual
        with torch._C._DisableAutocast():
            out = plain_chains(*row) if self.portable else run_chains(*row, made.calls)
        if self.head is not None:
            return out.flatten(1)
        return out.squeeze(2) if images[0].dim() == 3 else out

    def _fold(self, values: tuple[int, ...] | None, sources: Sequence[Tensor]) -> _Folded:
        made = self.known.get(self.text)
        if made is not None and values is not None and made.values == values and made.of(sources):
            return made
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._tensors(sources)
            chains = [self._chain(call, tensors, sources) for call in self.chains]
            if self.head is not None:
                chains.append(self._linear(self.head, tensors, sources))
        self.known[self.text] = made = _Folded(values, [t.detach() for t in sources], chains, {})
        return made

    def _tensors(self, sources: Sequence[Tensor]) -> list[Any]:
        """The row's tensors by place, computed from their sources; None for images."""
        constants = self.constants(*map(self.exact, sources))
        return [None] * (self.places - len(constants)) + list(constants)

    def _chain(self, call: ChainCall, tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> FoldedChain:
        units = [self._unit(unit, tensors, sources) for unit in call.all_units]
        specs = tuple(
            UnitSpec(unit.conv, unit.act, given.options["eps"], batch_stats=False)
            for unit, given in zip(units, call.all_units, strict=True)
        )
        shortcut = ShortcutSpec("tensor" if call.residual is not None else "none")
        if call.projection is not None:
            shortcut = ShortcutSpec("projection", specs[-1], call.avg_pool)
        elif call.shortcut == "pad":
            channels = units[-1].weight.shape[0]
            shortcut = ShortcutSpec("pad", stride=call.stride, channels=channels)
        elif call.shortcut is not None:
            shortcut = ShortcutSpec("identity")
        return FoldedChain(ChainSpec(specs[: len(call.units)], shortcut, call.max_pool), units)

    def _linear(self, call: HeadCall, tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> FoldedChain:
        def weight(given: Sequence[Tensor]) -> Tensor:
            return given[call.weight].to(self.dtype)[:, :, None, None]

        own = weight(tensors)
        wide = vector_dtype(self.dtype)
        bias = own.new_zeros(own.shape[0], dtype=wide) if call.bias is None else tensors[call.bias].to(wide)
        return FoldedChain.head(Weight(own, lambda: weight(self._tensors(sources))), bias)

    def _unit(self, call: UnitCall, tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> FoldedUnit:
        u = call.unit(tensors)
        norm = self._norm(u)
        wide = vector_dtype(self.dtype)
        act = u.act if isinstance(u.act, Act) else Act.make(u.act)
        excitation = _excitation(call.excitation, tensors, wide) if call.excitation is not None else None
        if u.weight is None:
            return FoldedUnit(norm.scale.to(wide), norm.shift.to(wide), None, act, excitation=excitation)
        own, scale = self._weight(u, norm)
        again = None if self.portable else lambda: self._weight(call.unit(self._tensors(sources)))[0]
        bias = norm.shift.to(self.dtype if self.portable and scale is None else wide)
        conv = ConvSpec.make(u.weight.shape, u.stride, u.padding, u.dilation, u.groups, bias=True)
        return FoldedUnit(Weight(own, again), bias, conv, act, scale, excitation)

    @staticmethod
    def _norm(u: Unit) -> Norm:
        """The unit's BatchNorm as vectors."""
        assert u.running_mean is not None and u.running_var is not None
        wide = vector_dtype(u.running_mean.dtype)
        mean, var = u.running_mean.to(wide), u.running_var.to(wide)
        return BnFold(mean, var, u.bn_weight, u.bn_bias, u.bias, number(u.eps, "eps")).on(loaded("aten"))

    def _weight(self, u: Unit, norm: Norm | None = None) -> tuple[Tensor, Tensor | None]:
        """``fold_weight``, channels_last."""
        assert u.weight is not None
        weight, scale = fold_weight(u.weight, norm if norm is not None else self._norm(u), self.dtype)
        return weight.contiguous(memory_format=channels_last(weight)), scale


def _excitation(call: ExcitationCall, tensors: Sequence[Any], dtype: torch.dtype) -> Excitation:
    def layer(weight: Tensor, bias: int | None) -> tuple[Tensor, Tensor]:
        return weight, weight.new_zeros(weight.shape[0]) if bias is None else tensors[bias].to(dtype)

    squeeze, excite = (layer(tensors[w].to(dtype), b) for w, b in zip(call.weights, call.biases, strict=True))
    return Excitation(*squeeze, call.acts[0], *excite, call.acts[1])


def _constants(
    gm: fx.GraphModule, wanted: Sequence[fx.Node], states: set[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """A graph that computes ``wanted`` from parameters and buffers, and these sources, in the order of its inputs.

    Raises:
        LookupError: ``wanted`` can't be computed from parameters and buffers alone.
    """
    rest, found = list(wanted), set(wanted)
    changed = {n for node in gm.graph.nodes for n in written(node)}
    while rest:
        node = rest.pop()
        computed = node.op in ("call_function", "call_method") and not _draws(node)
        if node in changed or not (node in states or (computed and node.all_input_nodes)):
            raise LookupError(node.name)
        for source in () if node in states else node.all_input_nodes:
            if source not in found:
                found.add(source)
                rest.append(source)
    graph, copies, sources = fx.Graph(), {}, []
    for node in gm.graph.nodes:
        if node in found and node in states:
            copies[node] = graph.placeholder(node.name)
            sources.append(node)
        elif node in found:
            copies[node] = graph.node_copy(node, lambda n: copies[n] if n in copies else constant(n))
    graph.output([copies[node] for node in wanted])
    return fx.GraphModule(nn.Module(), graph), sources


def _draws(node: fx.Node) -> bool:
    """Whether a call draws random numbers."""
    name = str(getattr(node.target, "__name__", node.target))
    return any(word in name for word in ("rand", "dropout", "bernoulli", "normal", "multinomial", "exponential"))


def _why_not(row: RowMatch, dtype: torch.dtype) -> str | None:
    """The reason why a row can't be frozen, or None."""
    images = [*row.nodes, *(n for n in (row.chains[0].start, row.chains[0].residual) if n is not None)]
    others = {v.dtype for n in images if (v := value_of(n)) is not None} - {dtype}
    return f"it is computed in {others.pop()}, and the model is frozen for {dtype}" if others else None


def lower_frozen(
    gm: fx.GraphModule, states: set[fx.Node], dtype: torch.dtype, portable: bool, exact: Exact, known: dict[Any, Any]
) -> Matches:
    """Puts frozen rows into a captured graph, in place. The arguments are those of ``FrozenRow``."""
    matches = match(gm.graph, frozen=True)
    if portable:
        for row in matches.rows:
            row.head = None
    rows, made = [], []
    for row in matches.rows:
        reason = _why_not(row, dtype)
        if reason is None:
            try:
                made.append(FrozenRow(gm, row, states, dtype, portable, exact, known))
                rows.append(row)
            except LookupError:
                reason = "its weights are not computed from parameters and buffers alone"
        if reason is not None:
            matches.left |= {u.norm: reason for u in row.all_units if not u.affine}
    matches.rows = rows
    calls = put_in(gm, matches, made)
    changed = {storage_of(n) for node in gm.graph.nodes for n in written(node)}
    for call in calls:
        _keep_layout(gm.graph, call, changed)
    finish(gm)
    return matches


def _keep_layout(graph: fx.Graph, call: fx.Node, changed: set[int | None]) -> None:
    """Restores the layout of a row's output where it may be noticed: rows return channels_last images.

    ``changed``: the storages that the graph writes into.
    """
    want = value_of(call)
    if want is None or want.dim() < 3 or is_channels_last(want) or not _noticed(call, changed):
        return
    with graph.inserting_after(call):
        made = graph.call_method("contiguous", (call,))
    made.meta = dict(call.meta)
    call.replace_all_uses_with(made, lambda user: user is not made)


def _noticed(node: fx.Node, changed: set[int | None]) -> bool:
    """Whether a call that uses a value, directly or through other calls, depends on its layout."""
    for user in node.users:
        if user.op == "call_module" or (user.target in _TAKE_ANY and storage_of(user) not in changed):
            continue
        if user.target not in _HAND_ON or _noticed(user, changed):
            return True
    return False
