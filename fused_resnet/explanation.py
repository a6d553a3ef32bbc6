"""explain: says for each block of a model whether it is fused, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_resnet.backends import Call, Case, ConvBackward, ConvBiasAct, ConvStats, Packed, primitives
from fused_resnet.base.layouts import channels_last
from fused_resnet.frozen.folded import FoldedUnit
from fused_resnet.frozen.modules import Frozen
from fused_resnet.frozen.rows import FrozenRow
from fused_resnet.fusion.front import Front
from fused_resnet.fusion.inspection import copy_of, named_modules
from fused_resnet.fusion.patterns import looks_like_norm, original
from fused_resnet.fusion.report import ChainReport, UnitReport
from fused_resnet.fusion.swap import fuse, why_not_fused
from fused_resnet.fusion.sync_norm import group_named
from fused_resnet.planner import pick, planned, products, why

_DIFFERS = "captured, the network differs from itself on the example"
_NOT_CAPTURED = "no call of it was captured; TORCH_LOGS=graph_breaks says what dynamo did not capture"


@dataclass(frozen=True)
class Row:
    """One module: its name in the model, its class, whether it runs as chains, why not, and primitive -> backend.

    For a frozen model it has convolution -> backend and what the weight is packed for instead.

    Attributes:
        chains: the number of its chains, if it is fused. reason: why it runs plain, or which part of it does.
        statistics: the processes over which its SyncBatchNorms take statistics. ran: how often its chains ran.
        measured: for each kind of input, the times of its row as chains and with PyTorch's operators, on a CPU.
    """

    name: str
    type: str
    fused: bool
    reason: str
    backends: dict[str, str]
    chains: int = 0
    statistics: str = ""
    ran: int = 0
    measured: str = ""


@dataclass(frozen=True)
class Explanation:
    """The result of ``explain``; prints as a table.

    Attributes:
        rows: one per module. captures: for each module that dynamo captures on its own, the numbers of captures and
            calls.
    """

    rows: list[Row]
    captures: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.rows:
            return "no norm of a known class in this model"
        width = max(len(r.name) for r in self.rows) + 2
        kinds = max(14, max(len(r.type) for r in self.rows) + 2)
        lines = []
        for r in self.rows:
            parts = [*(f"{p}: {b}" for p, b in r.backends.items()), r.statistics, r.measured]
            served = ", ".join(filter(None, parts))
            told = f"{served}; plain: {r.reason}" if served and r.reason else served or r.reason
            lines.append(f"{r.name:<{width}}{r.type:<{kinds}}{'fused' if r.fused else 'plain':<7}{told}")
        fused = sum(r.fused for r in self.rows)
        return "\n".join([*lines, *self.captures, f"{fused} of {len(self.rows)} fused"])


def explain(model: nn.Module, *example: Any) -> Explanation:
    """Says for each block of a fused model what runs, from its captured graphs.

    It lists the chains that run, the backend of each primitive, the processes over which a SyncBatchNorm takes its
    statistics, and the norms that run plain, with the reason. Before the first call nothing is captured, so nothing is
    known: then pass ``example``. For a frozen model it lists for each convolution its backend, and what its weight is
    packed for so far.

    Args:
        model: fused, frozen, or neither. example: inputs; a fused copy of the model is called with them once.

    Raises:
        TypeError: ``model`` is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, Frozen):
        return Explanation(list(_frozen_rows(model)), tuple(_captures([("", model.front())])))
    if example:
        model = fuse(copy_of(model))
        with torch.no_grad():
            model(*example)
    return Explanation(list(_rows(model)), tuple(_captures(_fronts(model))))


def _fronts(model: nn.Module) -> list[tuple[str, Front]]:
    """The fronts of the fused modules that were captured on their own, with the modules' names."""
    return [(n, f) for n, m in named_modules(model) for f in m.__dict__.get("_fr_fronts", {}).values()]


def _captures(fronts: Sequence[tuple[str, Front]]) -> Iterator[str]:
    for name, front in fronts:
        if front.calls:
            plain = f", {front.without} of them without a graph: dynamo's log says why" if front.without else ""
            graphs, calls = _times(len(front.graphs), "graph"), _times(front.calls, "call")
            settled = f"; {front.settled}" if str(front.settled) else ""
            yield f"captured: {name or '(model)'}, {graphs}, {calls}{plain}{settled}"


def _times(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _blocks(
    model: nn.Module, chains: Sequence[ChainReport], plain: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, str, list[ChainReport], list[str]]]:
    """The modules that have chains or plain norms, in the model's order: name, class, chains, why norms run plain.

    Args:
        plain: (name, reason) of the norms that run plain.
    """
    modules = dict(named_modules(model))
    blocks: dict[str, list[ChainReport]] = {}
    for chain in chains:
        blocks.setdefault(chain.owner[0], []).append(chain)
    reasons: dict[str, dict[str, None]] = {}
    for norm, reason in plain:
        reasons.setdefault(norm.rpartition(".")[0], {})[reason] = None
    order = {name: i for i, name in enumerate(modules)}
    for name in sorted(blocks.keys() | reasons.keys(), key=lambda name: order.get(name, -1)):
        found = blocks.get(name, [])
        kind = found[0].owner[1] if found else ""
        kind = kind or (original(modules[name]).__name__ if name in modules else "")
        yield name, kind, found, list(reasons.get(name, ()))


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in named_modules(model) if looks_like_norm(m)}


def _rows(model: nn.Module) -> Iterator[Row]:
    norms = _norms(model)
    chains, left, fronts = _captured(_fronts(model))
    taken = {unit.norm[0] for chain in chains for unit in chain.units}
    plain = [(name, left.get(name) or _unseen(model, name, fronts)) for name in norms.keys() - taken]
    closed_by = _closed_by(chains)
    for name, kind, found, reasons in _blocks(model, chains, plain):
        ran = list(filter(_ran, found))
        measured = "; ".join(dict.fromkeys(filter(None, (str(chain.choice) for chain in found))))
        if len(ran) < len(found):
            reasons.append("PyTorch's own operators are faster")
        served = _serving(ran)
        if ran and ran[-1].owner[0] in closed_by:
            served["bn_act_backward"] = f"in conv_backward of {closed_by[ran[-1].owner[0]]}"
        calls = min((chain.choice.chains for chain in ran), default=0)
        shared = _shared(ran, norms)
        yield Row(name or "(model)", kind, bool(ran), "; ".join(reasons), served, len(ran), shared, calls, measured)


def units_of(model: nn.Module) -> list[UnitReport]:
    """The units of the chains that a fused model ran, with the model's names of their norms."""
    return [unit for chain in _captured(_fronts(model))[0] if _ran(chain) for unit in chain.units]


def _ran(chain: ChainReport) -> bool:
    """Whether it ran as a chain, or had no choice."""
    return bool(chain.choice.chains) or not chain.choice.plain


def _captured(fronts: Sequence[tuple[str, Front]]) -> tuple[list[ChainReport], dict[str, str], int]:
    """The chains of the latest graphs, with the model's names; the norms outside chains, and why; the number of fronts
    that were called."""
    chains: list[ChainReport] = []
    left: dict[str, str] = {}
    for name, front in fronts:
        for graph in reversed([graph for graph in front.graphs if graph.ran]):  # dynamo may drop graphs
            known = {u.norm[0] for c in chains for u in c.units} | left.keys()
            for chain in graph.chains:
                here = chain.inside(name)
                if not known.intersection(u.norm[0] for u in here.units):
                    chains.append(here)
            for (norm, _), reason in graph.left.items():
                norm = f"{name}.{norm}" if name and norm else norm or name
                if norm not in known:
                    left[norm] = reason
    return chains, left, sum(front.calls > 0 for _, front in fronts)


def closing_norms(model: nn.Module, *example: Any) -> set[str]:
    """The names of the norms before residual adds. Calls a fused copy of the model with the example."""
    model = fuse(copy_of(model)).train()
    with torch.no_grad():
        model(*example)
    return captured_closing_norms(model)


def captured_closing_norms(model: nn.Module) -> set[str]:
    """The same of a fused model, by the graphs that its calls ran."""
    closed = (chain for chain in _captured(_fronts(model))[0] if chain.shortcut != "none")
    return {chain.units[-2 if chain.shortcut == "projection" else -1].norm[0] for chain in closed}


def _unseen(model: nn.Module, norm: str, fronts: int) -> str:
    """The reason why a norm is in no captured graph."""
    path = norm.split(".")
    around = [model.get_submodule(".".join(path[:i])) for i in range(len(path))]
    around = [m for m in around if not isinstance(m, nn.ModuleList | nn.ModuleDict)]
    if reason := next(filter(None, map(why_not_fused, around)), ""):
        return reason
    if not any("_fr_fused" in m.__dict__ for m in around):
        return "not fused yet: call fuse(model)"
    return _NOT_CAPTURED if fronts else "not called yet: explain(model, example) calls a copy"


def _frozen_rows(model: Frozen) -> Iterator[Row]:
    chains, left, _ = _captured([("", model.front())])
    taken = set() if model.differs else {unit.norm[0] for chain in chains for unit in chain.units}
    norms = _norms(model.model).keys() - taken
    plain = [(name, _DIFFERS if model.differs else left.get(name, _NOT_CAPTURED)) for name in norms]
    for name, kind, found, reasons in _blocks(model.model, chains, plain):
        fused = bool(found) and not model.differs
        served = _serving_frozen(found) if fused else {}
        yield Row(name or "(model)", kind, fused, "; ".join(reasons), served, len(found) * fused)


def _serving_frozen(chains: Sequence[ChainReport]) -> dict[str, str]:
    """Convolution, or a norm without one -> the backend that serves it."""
    served = {}
    for number, chain in enumerate(chains, 1):
        row: FrozenRow = chain.choice
        if row.folded is None:
            continue
        of = f"chain {number} " if len(chains) > 1 else ""
        folded = row.folded[chain.place]
        for i, unit in enumerate(folded.units, 1):
            place = str(i) if i <= len(folded.spec.units) else "shortcut"
            kind = "bn_act" if unit.conv is None else "conv"
            size = "x".join(map(str, unit.weight.shape[2:]))
            served[f"{of}{kind} {place} {size}".rstrip()] = _serving_unit(unit, row)
        if row.head is not None and chain.place == len(row.chains) - 1:
            served["linear after the mean"] = _serving_unit(row.folded[-1].units[0], row)
    return served


def _serving_unit(unit: FoldedUnit, row: FrozenRow) -> str:
    w, conv = unit.weight, unit.conv
    if row.portable:
        return "PyTorch's own"
    if conv is None or isinstance(w, Tensor):
        case = Case(w.device.type, row.dtype, True)
        return planned(primitives.BnAct, None, w.shape[0]) or why(primitives.BnAct, case)[0]
    behind = (
        ", its scale in a separate pass: folded, it would leave the dtype's range" if unit.scale is not None else ""
    )
    if measured := planned(ConvBiasAct, conv, tuple(w.shape)):
        return measured + behind
    backend = why(ConvBiasAct, Case(w.device.type, w.dtype, True, conv, tuple(w.shape[2:]), len(w.shape) == 5))[0]
    forms = sorted({form.kind for form in w.packed_forms() if isinstance(form, Packed)})
    return f"{backend}, {'packed: ' + ' and '.join(forms) if forms else 'not packed'}{behind}"


def _closed_by(chains: Sequence[ChainReport]) -> dict[str, str]:
    """Blocks whose closing backward runs in the next block of their row -> that block's name."""
    pairs = zip(chains, chains[1:], strict=False)
    return {one.owner[0]: after.owner[0] for one, after in pairs if one.row == after.row}


def _shared(chains: Sequence[ChainReport], norms: dict[str, nn.Module]) -> str:
    """The processes over which the chains' SyncBatchNorms take their statistics."""
    units = [unit for chain in chains for unit in chain.units]
    sizes = sorted({dist.get_world_size(group_named(unit.group)) for unit in units if unit.group is not None})
    if sizes:
        return f"statistics over the process group of {' and '.join(map(str, sizes))}"
    alone = any(isinstance(norms.get(unit.norm[0]), nn.SyncBatchNorm) for unit in units)
    return "statistics of this process alone: no process group" if alone else ""


def _serving(chains: Sequence[ChainReport]) -> dict[str, str]:
    """Primitive -> backend for the chains' training step, in the captured tensors' device, dtype and layout."""
    served: dict[str, str] = {}
    names: dict[str, dict[str, None]] = {}
    for chain in chains:
        for i, unit in enumerate(chain.units):
            if unit.conv is None:
                continue
            prologue = 0 < i < len(chain.units) - (chain.shortcut == "projection")
            kernel = unit.weight[2:]
            case = Case(unit.device, unit.dtype, unit.channels_last, unit.conv, kernel, len(kernel) == 3)
            for convolution in (ConvStats, ConvBackward):
                label = f"{convolution.name} {'x'.join(map(str, kernel))}"
                measured = planned(convolution, unit.conv, unit.weight)
                # a block may have several convolutions of one size
                names.setdefault(label, {})[_algorithm(convolution, case, unit, prologue)] = None
                served[label] = measured or " and ".join(names[label])
        last = chain.units[-1]
        case = Case(last.device, last.dtype, last.channels_last)
        closing = (primitives.BnAct, primitives.BnActBackward)
        pooled = (primitives.BnActMaxPool, primitives.BnActMaxPoolBackward)
        for primitive in closing if chain.max_pool is None else pooled:
            served[primitive.name] = planned(primitive, None, last.channels) or why(primitive, case)[0]
    return served


def _algorithm(primitive: type[Call[Any]], case: Case, unit: UnitReport, prologue: bool) -> str:
    """The backend that serves a convolution by preference, and its algorithm if it has a name."""
    backend = pick(primitive, case)
    if not unit.image or unit.conv is None:
        return backend.name
    x, weight = (torch.empty(shape, dtype=case.dtype) for shape in (unit.image, unit.weight))
    if case.channels_last:
        x, weight = (t.contiguous(memory_format=channels_last(t)) for t in (x, weight))
    conv = replace(unit.conv, products=products.chosen(x, weight, unit.conv))
    algorithm = backend.algorithm(primitive, x, weight, conv, prologue)
    return backend.name if algorithm is None else f"{backend.name} ({algorithm})"
