"""Chains in the graphs of the user's own ``torch.compile`` with Inductor, its default backend.

While dynamo traces a fused module's forward for Inductor, ``announce`` sets Inductor's pre-grad pass for this one
compilation, around the user's own pass. Inductor calls PyTorch's convolutions and generates the passes between them. So
in training the pass replaces the rows that, measured on this CPU, take less time than PyTorch's convolutions alone: no
passes can make those faster. All else stays Inductor's: evaluation, in which it fuses what chains would, and other
devices, on which nothing is measured here.

AOTAutograd then traces through a row's call, so its graph has the operators ``fused_resnet::chain``. It does not keep
such a graph in its own cache, because it does not know the function that is called. Inductor's cache holds what it
makes of the operators, whose text says all about the row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from fused_resnet import reference
from fused_resnet.chain import signals
from fused_resnet.fusion.choosing import Choice
from fused_resnet.fusion.front import log
from fused_resnet.fusion.inspection import calling
from fused_resnet.fusion.lowering import ChainRow, UnitCall, chain_rows, finish, put_in
from fused_resnet.fusion.matches import Matches
from fused_resnet.fusion.report import GraphReport, Names
from fused_resnet.fusion.table import constant, value_of

# Inductor's settings for one compilation. Its caches don't know what the pass depends on, so it runs first.
_PASS, _TIMING = "pre_grad_custom_pass", "pre_grad_pass_timing"


class _Pass:
    """Inductor's pass over a graph of torch functions. ``before``: the settings to return to."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.before = {name: getattr(config, name) for name in (_PASS, _TIMING) if hasattr(config, name)}
        self.compilation = torch._guards.CompileContext.current_compile_id()
        for name, value in zip(self.before, (self, "early")):
            setattr(config, name, value)

    def __call__(self, graph: fx.Graph) -> None:
        gm: Any = graph.owning_module
        own = torch._guards.CompileContext.current_compile_id() == self.compilation
        if not own or "dynamo_compile_id" in gm.meta:  # the outermost graph comes last
            for name, value in self.before.items():
                setattr(self.config, name, value)
        users = self.before[_PASS]
        for each in users if isinstance(users, list | tuple) else [users]:
            if each is not None:
                each(graph)
        if own and torch.is_grad_enabled():
            put_chains(gm)


def announce() -> bool:
    """Sets the pass, if dynamo now traces for Inductor. Dynamo calls this at each call of a fused module's forward."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    config = sys.modules.get("torch._inductor.config")
    if config is None or calling() or torch.compiler.is_exporting():
        return False
    compiler: Any = InstructionTranslator.current_tx().output.compiler_fn
    while hasattr(compiler, "_torchdynamo_orig_backend"):
        compiler = compiler._torchdynamo_orig_backend
    if getattr(compiler, "compiler_name", None) != "inductor":
        return False
    if not isinstance(getattr(config, _PASS), _Pass):
        _Pass(config)
    return True


announce._dynamo_marked_constant = True  # type: ignore[attr-defined]


def put_chains(gm: fx.GraphModule) -> Matches:
    """Puts the rows into a graph that pay in training, in place."""
    names = Names(gm.graph, None)
    matches, made = chain_rows(gm)
    pays = [_pays(row) for row in made]
    matches.rows = [row for row, faster in zip(matches.rows, pays, strict=True) if faster]
    calls = put_in(gm, matches, [row for row, faster in zip(made, pays, strict=True) if faster])
    for call in calls:
        # a function, because AOTAutograd's cache would take two modules of one name for the same
        call.op, call.target = "call_function", _function(gm.get_submodule(str(call.target)))
    finish(gm)
    log.info("captured for inductor %s", GraphReport(matches, names))
    return matches


def _function(row: Any) -> Callable[..., Tensor]:
    def chains(*given: Tensor) -> Tensor:
        return row.chained(*given)

    return chains


def _pays(row: ChainRow) -> bool:
    """Whether chains train the row faster than PyTorch's convolutions alone, on tensors like the graph's."""
    from torch._dispatch.python import no_python_dispatcher
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    given: list[Any] = [constant(node) if (v := value_of(node)) is None else v for node in row.inputs]
    if row.group or any(isinstance(v, fx.Node) for v in given):
        return False  # a momentum that is computed as the graph runs can't be traced
    weights = [u.tensors["weight"] for call in row.chains for u in call.all_units if "weight" in u.tensors]
    learns = any(given[place].requires_grad for place in (0, *weights))
    if not weights or not learns or not all(v.is_cpu for v in given if isinstance(v, Tensor)):
        return False
    beside: Any = SimpleNamespace(
        text=f"beside convolutions: {row.text}", images=row.images, group=False, chained=row.chained,
        plain=lambda *given: _convolutions(row, given),
    )  # fmt: skip
    with unset_fake_temporarily(), no_python_dispatcher():
        return Choice().pays(beside, [_like(v) if isinstance(v, Tensor) else v for v in given])


def _convolutions(row: ChainRow, given: Sequence[Any]) -> Tensor:
    """The row without its norms, activations and pools."""

    def conv(x: Tensor, call: UnitCall) -> Tensor:
        if "weight" not in call.tensors:
            return x
        geometry = {name: call.options[name] for name in ("stride", "padding", "dilation", "groups")}
        return reference.CONV[x.dim()](x, signals.image(given[call.tensors["weight"]]), **geometry)

    x: Tensor = signals.image(given[0])
    for chain in row.chains:
        start = x
        for unit in chain.units:
            x = conv(x, unit)
        if chain.projection is not None:
            pool = chain.avg_pool
            if pool is not None:
                start = reference.AVG_POOL[start.dim()](start, *pool.window, pool.ceil_mode)
            x = x + conv(start, chain.projection)
    return x


def _like(v: Tensor) -> Tensor:
    """A tensor with values, like one without. A symbolic size is what it was at the call that is compiled."""

    def hint(size: Any) -> int:
        return int(size.node.hint) if isinstance(size, torch.SymInt) else size

    made = torch.empty_strided([hint(n) for n in v.shape], [hint(n) for n in v.stride()], dtype=v.dtype)
    made = made.uniform_(0.5, 1.5) if v.is_floating_point() else made.zero_()
    return made.requires_grad_(v.requires_grad)
