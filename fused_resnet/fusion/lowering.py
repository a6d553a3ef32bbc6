"""Puts rows of chains in the place of the nodes that they replace."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fused_resnet.chain import signals
from fused_resnet.chain.call import checked, in_backward, run_checked
from fused_resnet.chain.checks import autocasts
from fused_resnet.chain.encoding import Rows
from fused_resnet.chain.units import Chain, Unit
from fused_resnet.fusion.choosing import Choice, thread
from fused_resnet.fusion.matcher import match
from fused_resnet.fusion.matches import ChainMatch, ExcitationMatch, HeadMatch, Matches, RowMatch, UnitMatch
from fused_resnet.fusion.sync_norm import group_named
from fused_resnet.fusion.table import constant, storage_of, written

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


class Places:
    """The nodes whose tensors a row is called with, each once, and their positions."""

    def __init__(self) -> None:
        self.nodes: dict[fx.Node, int] = {}

    def of(self, node: fx.Node) -> int:
        return self.nodes.setdefault(node, len(self.nodes))


class ExcitationCall:
    """The squeeze-and-excitation of a unit: its activations, and the positions of its tensors among the row's."""

    def __init__(self, match: ExcitationMatch, places: Places) -> None:
        weight, bias, gate_weight, gate_bias = match.tensors
        self.weights = places.of(weight), places.of(gate_weight)
        self.biases = [places.of(node) if node is not None else None for node in (bias, gate_bias)]
        self.acts = match.acts
        self.text = f"excitation {self.weights} {self.biases} {self.acts}"


class UnitCall:
    """A unit of a row: its constants, and the positions of its tensors among the row's."""

    def __init__(self, match: UnitMatch, act: Any, places: Places) -> None:
        self.tensors = {name: places.of(node) for name, node in match.tensors.items()}
        self.momentum = places.of(m) if isinstance(m := match.options["momentum"], fx.Node) else None
        self.options = {k: v for k, v in match.options.items() if not isinstance(v, fx.Node)} | {"act": act}
        self.affine = match.affine
        self.excitation = ExcitationCall(match.excitation, places) if match.excitation is not None else None
        self.group = self.options.pop("process_group", None)
        names = ("running_mean", "running_var") if self.options["training"] else ()
        self.buffers = [self.tensors[name] for name in names if name in self.tensors]
        geometry = [f"{k} {self.options[k]}" for k in ("stride", "padding", "dilation", "groups") if k in self.options]
        statistics = "batch" if self.options["training"] else "running"
        behind = [self.excitation.text] if self.excitation is not None else []
        self.text = " ".join([*geometry, statistics, *sorted(self.tensors), str(act), *behind]).replace(", ", ",")
        self.counter = places.of(match.counter.args[0]) if match.counter is not None else None  # type: ignore[arg-type]
        if self.counter is not None:
            self.buffers.append(self.counter)

    def saves(self, given: Sequence[Tensor]) -> bool:
        """Whether PyTorch's own operators save the unit's input: a norm does, a convolution if it or its input is
        trained, a product with a scale if that is."""
        own, conv = self.tensors, "weight" in self.tensors
        if not conv and not self.affine:
            return True
        names = ("weight", "bias") if conv else ("bn_weight",)
        return (conv and given[0].requires_grad) or any(given[own[n]].requires_grad for n in names if n in own)

    def unit(self, given: Sequence[Tensor]) -> Unit:
        tensors: dict[str, Any] = {name: given[place] for name, place in self.tensors.items()}
        if self.options["training"]:  # PyTorch's own norms don't count their updates of statistics as changes
            tensors |= {n: tensors[n].data for n in ("running_mean", "running_var") if n in tensors}
        unit = Unit(**self.options, **tensors)
        if self.group is not None:
            unit.process_group = group_named(self.group)
        if self.momentum is not None:
            unit.momentum = float(given[self.momentum])
        if self.affine:  # z = scale*y + shift: mean 0 and variance 1 leave both as they are
            unit.bn_weight = unit.bn_weight.flatten().clone()  # type: ignore[union-attr]
            unit.bn_bias = unit.bn_bias.flatten()  # type: ignore[union-attr]
            unit.running_mean = torch.zeros_like(unit.bn_weight, requires_grad=False)
            unit.running_var = torch.ones_like(unit.bn_weight, requires_grad=False)
        unit.weight = signals.image(unit.weight)
        return unit


class ChainCall:
    """A chain of a row."""

    def __init__(self, match: ChainMatch, places: Places) -> None:
        acts = [u.act for u in match.units[:-1]] + [match.act]
        self.units = [UnitCall(u, act, places) for u, act in zip(match.units, acts, strict=True)]
        projection = match.projection
        self.projection = UnitCall(projection, None, places) if projection is not None else None
        self.shortcut = match.shortcut if match.shortcut in ("identity", "pad") else None
        self.residual = places.of(match.residual) if match.residual is not None else None
        self.stride, self.avg_pool, self.max_pool = match.stride, match.avg_pool, match.max_pool
        # whether the backward reads x or the residual to compute z again
        self.reads_summand = match.shortcut not in ("none", "projection") and match.act.name != "identity"
        self.reads_summand |= match.avg_pool is not None
        self.all_units = [*self.units, *([self.projection] if self.projection is not None else [])]
        self.counters = [u.counter for u in self.all_units if u.counter is not None]
        shortcut = f"{match.shortcut}{match.stride if match.shortcut == 'pad' else ''}"
        pools = [str(p) for p in (self.avg_pool, self.max_pool) if p is not None]
        self.text = ", ".join([*(u.text for u in self.all_units), shortcut, *pools])

    def chain(self, given: Sequence[Tensor]) -> Chain:
        shortcut = self.projection.unit(given) if self.projection is not None else self.shortcut
        stride = self.stride if self.shortcut == "pad" else 1
        return Chain([u.unit(given) for u in self.units], shortcut, stride, self.avg_pool)


class HeadCall:
    """The head of a row: the positions of its tensors among the row's."""

    def __init__(self, match: HeadMatch, places: Places) -> None:
        self.weight = places.of(match.weight)
        self.bias = places.of(match.bias) if match.bias is not None else None
        self.text = f"head {self.weight} {self.bias}"


class ChainRow(nn.Module):
    """A row of chains in a lowered graph, called with its input and the tensors that the graph holds for it.

    Args:
        written: the storages that the graph or its caller may write into after the row.

    Attributes:
        plain: the nodes that it replaces, called with the same tensors. choice: decides whether the row pays.
        images: the positions of the tensors that are images, the input first. visible: those of them that may change
            after the row. group: processes share some statistics.
        text: a description of the row without its tensors.
    """

    def __init__(self, gm: fx.GraphModule, row: RowMatch, written: set[int | None]) -> None:
        super().__init__()
        places = Places()
        places.of(row.chains[0].start)
        self.chains = [ChainCall(chain, places) for chain in row.chains]
        self.inputs = list(places.nodes)
        self.plain = part_of(gm, row, self.inputs)
        row.choice = self.choice = Choice()
        self.images = [0, *(call.residual for call in self.chains if call.residual is not None)]
        self.visible = [place for place in self.images if storage_of(self.inputs[place]) in written]
        self.group = any(unit.group is not None for call in self.chains for unit in call.all_units)
        self.statistics = sorted({place for call in self.chains for unit in call.all_units for place in unit.buffers})
        self.text = "; ".join(call.text for call in self.chains)
        self.encoded = Rows()

    def forward(self, *given: Tensor) -> Tensor:
        return self.chained(*given) if self.choice.pays(self, given) else self._plainly(given)

    def _plainly(self, given: Sequence[Tensor]) -> Tensor:
        if not in_backward():
            return self.plain(*given)
        # a forward inside a backward (a checkpoint's) updates no statistics, as in a chain
        kept = [(given[i], given[i].clone()) for i in self.statistics]
        try:
            return self.plain(*given)
        finally:
            for buffer, value in kept:
                buffer.data.copy_(value)  # .data: the backward has saved the buffer and checks its version

    def chained(self, *given: Tensor) -> Tensor:
        """Runs the row as chains."""
        chains = [call.chain(given) for call in self.chains]
        first = self.chains[0]  # a chain that has one of these is alone in its row
        x, residual = self._images(first, given)
        signal = x.dim() == 3
        if signal:
            x, residual = signals.input(x), signals.input(residual)
        try:
            row = checked(x, chains, residual, first.max_pool, self._recompute(first, given), self.encoded)
        except (TypeError, ValueError):
            return self._plainly(given)  # PyTorch's own error, or what PyTorch takes and a chain does not
        out = run_checked(x, chains, residual, row)
        if not in_backward():
            for counter in (c for call in self.chains for c in call.counters):
                given[counter].add_(1)
        return signals.output(out) if signal else out

    def _images(self, call: ChainCall, given: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """x and the residual; a copy if it may change before the backward, which PyTorch's own would not notice."""
        x, residual = given[0], given[call.residual] if call.residual is not None else None
        if not torch.is_grad_enabled() or not any(map(_wants_grad, given)):
            return x, residual
        if call.reads_summand and call.residual in self.visible:
            return x, given[call.residual].clone()
        first = call.units[0]
        reads = call.reads_summand or "weight" not in first.tensors  # without a convolution x is the raw output
        return x.clone() if reads and 0 in self.visible and not first.saves(given) else x, residual

    @staticmethod
    def _recompute(call: ChainCall, given: Sequence[Tensor]) -> bool:
        """Whether to convolve again in the backward: for a stem in 32 bits, whose raw output is the largest tensor.

        PyTorch saves the stem's input, too, only if the weight is trained.
        """
        x, weight = given[0], call.units[0].tensors.get("weight")
        dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
        one_conv = len(call.units) == 1 and weight is not None and given[weight].requires_grad
        return call.max_pool is not None and one_conv and dtype.itemsize > 2

    def extra_repr(self) -> str:
        return ", ".join(f"{len(c.units)} units, shortcut {c.shortcut or 'none'}" for c in self.chains)


def _wants_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def part_of(gm: fx.GraphModule, row: RowMatch, inputs: Sequence[fx.Node]) -> fx.GraphModule:
    """A graph of the row's nodes alone."""
    counters = [unit.counter for unit in row.all_units if unit.counter is not None]
    taken = {*row.nodes, *counters}
    graph, copies = fx.Graph(), {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in gm.graph.nodes:
        if node in taken:
            copies[node] = graph.node_copy(node, lambda n: copies[n] if n in copies else constant(n))
    graph.output(copies[row.end])
    return fx.GraphModule(nn.Module(), graph)


class _Checkpoint(nn.Module):
    """``torch.utils.checkpoint`` around a lowered part of a graph.

    Args:
        part: the graph. options: the checkpoint's options.
    """

    def __init__(self, part: fx.GraphModule, options: dict[str, Any]) -> None:
        super().__init__()
        self.part, self.options = part, {"use_reentrant": False} | options

    def forward(self, *args: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        thread.gained = math.inf  # the fused module around it keeps its graph
        # The arguments are saved, so tensors that change in place (a norm's statistics) must not be among them.
        wanting = [i for i, value in enumerate(args) if _wants_grad(value)]

        def part(*given: Any) -> Any:
            values = list(args)
            for i, value in zip(wanting, given, strict=True):
                values[i] = value
            return self.part(*values)

        return checkpoint(part, *(args[i] for i in wanting), **self.options)


def lower(gm: fx.GraphModule) -> Matches:
    """Puts rows of chains into a captured graph and into its checkpointed parts, in place.

    Args:
        gm: a graph of torch functions with ``example_value`` in the nodes' meta, as dynamo gives it to a backend.

    Returns:
        The matches in it and in its checkpointed parts.
    """
    matches, made = chain_rows(gm)
    put_in(gm, matches, made)
    for node in [n for n in gm.graph.nodes if n.op == "call_function" and n.target is _CHECKPOINT]:
        inner = _lower_checkpoint(gm, node)
        matches.rows += inner.rows
        matches.left |= inner.left
        matches.norms += inner.norms
    finish(gm)
    return matches


def chain_rows(gm: fx.GraphModule) -> tuple[Matches, list[ChainRow]]:
    """The matches in a graph, and a module for each of their rows."""
    matches, last = match(gm.graph), _last_writes(gm.graph)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    ends = [order[row.end] for row in matches.rows]
    written = [{storage for storage, i in last.items() if i > end} for end in ends]
    return matches, [ChainRow(gm, row, w) for row, w in zip(matches.rows, written, strict=True)]


def _last_writes(graph: fx.Graph) -> dict[int | None, float]:
    """Storage -> position of the last node that may write into it; infinite if the graph's caller may.

    The storage None is an unknown one.
    """
    last: dict[int | None, float] = {None: math.inf}
    for i, node in enumerate(graph.nodes):
        outside = {"placeholder": [node], "output": node.all_input_nodes}.get(node.op, [])
        for n in outside or written(node):
            storage = storage_of(n)
            last[storage] = max(last.get(storage, i), math.inf if outside else i)
    return last


def put_in(gm: fx.GraphModule, matches: Matches, made: Sequence[Any]) -> list[fx.Node]:
    """Replaces the nodes of each row by a call of its module in ``made``. Returns the calls.

    A module's ``inputs`` are the nodes that it is called with.
    """
    calls: dict[fx.Node, fx.Node] = {}  # a row's last node -> the call of the row
    for number, (row, module) in enumerate(zip(matches.rows, made, strict=True)):
        gm.add_submodule(name := f"fused_resnet_row_{number}", module)
        calls[row.end] = _replace(gm.graph, name, row, [calls.get(n, n) for n in module.inputs])
        module.inputs.clear()  # so that the module does not keep the graph's nodes alive
    return list(calls.values())


def finish(gm: fx.GraphModule) -> None:
    """Generates the code of a graph whose nodes were replaced."""
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.target = _itself(node.target)
    gm.recompile()


def _itself(function: Any) -> Any:
    """The function itself, even if its name in torch was patched: a graph's code calls torch's functions by name."""
    if not isinstance(function, FunctionType) or not function.__module__.startswith("torch."):
        return function
    named = getattr(sys.modules.get(function.__module__), function.__name__, function)
    return function if named is function else lambda *args, **kwargs: function(*args, **kwargs)


def _replace(graph: fx.Graph, name: str, row: RowMatch, inputs: Sequence[fx.Node]) -> fx.Node:
    """Puts the call of a row at the place of its last node."""
    end = row.end
    with graph.inserting_after(end):
        call = graph.call_module(name, tuple(inputs))
    call.meta = dict(end.meta)
    end.replace_all_uses_with(call)
    counters = [unit.counter for unit in row.all_units if unit.counter is not None]
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in sorted([*row.nodes, *counters], key=order.__getitem__, reverse=True):
        graph.erase_node(node)
    return call


def _lower_checkpoint(gm: fx.GraphModule, node: fx.Node) -> Matches:
    """Lowers a checkpointed part of the graph; ``torch.utils.checkpoint`` calls it."""
    part = gm.get_submodule(node.args[0].target)  # type: ignore[union-attr, arg-type]
    assert isinstance(part, fx.GraphModule)
    matches = lower(part)
    name = f"fused_resnet_checkpoint_{node.name}"
    gm.add_submodule(name, _Checkpoint(part, dict(node.kwargs)))
    with gm.graph.inserting_after(node):
        call = gm.graph.call_module(name, tuple(node.args[1:]))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)
    return matches
