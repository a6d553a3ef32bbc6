"""explain: what became of each block of a model, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from fused_resnet.backends import Case
from fused_resnet.convert import FusedModule, FusedSequential, candidates, rows_of
from fused_resnet.freezing import Frozen, FrozenChain, FrozenUnit, why_not_frozen
from fused_resnet.frozen_forward import packed_forms
from fused_resnet.modules import ChainModules, shared_by
from fused_resnet.planner import planned, why
from fused_resnet.spec import ConvSpec


@dataclass(frozen=True)
class Row:
    """One block: its name in the model, class, whether it runs as a chain, why not, primitive -> backend (of a
    frozen model: convolution -> backend, and what its weight is packed for), and over which processes its
    SyncBatchNorms take their statistics."""

    name: str
    type: str
    fused: bool
    reason: str
    backends: dict[str, str]
    statistics: str = ""


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found; prints as a table."""

    rows: list[Row]

    def __str__(self) -> str:
        if not self.rows:
            return "no block of a known class in this model"
        width = max(len(r.name) for r in self.rows) + 2
        lines = []
        for r in self.rows:
            served = ", ".join([*(f"{p}: {b}" for p, b in r.backends.items()), *filter(None, [r.statistics])])
            lines.append(f"{r.name:<{width}}{r.type:<14}{'fused' if r.fused else 'plain':<7}{served or r.reason}")
        fused = sum(r.fused for r in self.rows)
        return "\n".join([*lines, f"{fused} of {len(self.rows)} fused"])


def explain(model: nn.Module) -> Explanation:
    """Each block of ``model``: fused or not, why not, which backend serves which primitive, and over which processes a
    SyncBatchNorm takes its statistics.

    Modules of unknown classes that own both a Conv2d and a BatchNorm2d are listed too: no pattern knows them. Of a
    frozen model each convolution: which backend serves it, and what its weight has been packed for by now.

    Raises:
        TypeError: not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    rows = []
    known: set[int] = set()
    if isinstance(model, Frozen):
        return Explanation(_frozen_rows(model))
    closed_by = _closed_by(model)
    for name, m, chain, reason in candidates(model):
        fused = isinstance(m, FusedModule) and reason is None
        original = m._fr_original if isinstance(m, FusedModule) else type(m)
        why_plain = reason or ("" if fused else "not fused yet: call fuse(model)")
        served = _serving(chain) if fused and chain is not None else {}
        if served and id(m) in closed_by:
            served["bn_act_backward"] = f"in conv_backward of {closed_by[id(m)]}"
        shared = _shared(chain) if fused and chain is not None else ""
        rows.append(Row(name or "(stem)", original.__name__, fused, why_plain, served, shared))
        known.update(id(c) for c in m.modules())
    for name, m in model.named_modules():
        kinds = {type(c) for c in m.children()}
        if id(m) not in known and nn.Conv2d in kinds and kinds & {nn.BatchNorm2d, nn.SyncBatchNorm}:
            rows.append(Row(name, type(m).__name__, False, f"no pattern for {type(m).__name__}", {}))
    return Explanation(rows)


def _frozen_rows(model: Frozen) -> list[Row]:
    chains = [m for m in model.modules() if isinstance(m, FrozenChain)]
    rows = [Row(m.name or "(stem)", m.block, True, "", _serving_frozen(m)) for m in chains]
    names = {row.name for row in rows}
    for name, m, chain, reason in candidates(model.model):
        name = name or "(stem)"
        if name not in names:
            why_plain = reason or (why_not_frozen(chain) if chain is not None else None) or ""
            rows.append(Row(name, type(m).__name__, False, why_plain, {}))
    return rows


def _serving_frozen(chain: FrozenChain) -> dict[str, str]:
    """Convolution -> what serves it."""
    last = len(chain.spec.units)
    return {
        f"conv {i + 1 if i < last else 'shortcut'} {'x'.join(map(str, unit.weight.shape[2:]))}": _serving_unit(
            unit, chain.portable
        )
        for i, unit in enumerate(chain)
        if isinstance(unit, FrozenUnit)
    }


def _serving_unit(unit: FrozenUnit, portable: bool) -> str:
    w, conv = unit.weight, unit.spec.conv
    if portable:
        return "PyTorch's own"
    if measured := planned("conv_bias_act", conv, tuple(w.shape)):
        return measured
    backend = why("conv_bias_act", Case(w.device.type, w.dtype, True, conv, (w.shape[2], w.shape[3])))[0]
    forms = sorted({getattr(form, "kind", "stem") for form in packed_forms(w)})
    return f"{backend}, {'packed: ' + ' and '.join(forms) if forms else 'not packed'}"


def _closed_by(model: nn.Module) -> dict[int, str]:
    """Blocks whose closing backward is done by the block after them in a row -> that block's name."""
    names = {id(m): name for name, m in model.named_modules()}
    rows = [blocks for m in model.modules() if isinstance(m, FusedSequential) for blocks in rows_of(m)]
    return {id(m): names[id(after)] for row in rows for (m, _), (after, _) in zip(row, row[1:], strict=False)}


def _shared(chain: ChainModules) -> str:
    """Over which processes the chain's SyncBatchNorms take their statistics."""
    norms = [unit.bn for unit in chain.all_units if isinstance(unit.bn, nn.SyncBatchNorm)]
    groups = [shared_by(bn) for bn in norms]
    sizes = sorted({dist.get_world_size(group) for group in groups if group is not None})
    if sizes:
        return f"statistics over the process group of {' and '.join(map(str, sizes))}"
    return "statistics of this process alone: no process group" if norms else ""


def _serving(chain: ChainModules) -> dict[str, str]:
    """Primitive -> backend for a chain's training step, in the parameters' device, dtype and layout."""
    served: dict[str, str] = {}
    for unit in chain.all_units:
        if unit.conv is None:
            continue
        c, w = unit.conv, unit.conv.weight
        conv = ConvSpec.make(w.shape, c.stride, c.padding, c.dilation, c.groups, c.bias is not None)
        last = not w.is_contiguous() or w.shape[2:] == (1, 1)
        case = Case(w.device.type, w.dtype, last, conv, (w.shape[2], w.shape[3]))
        for primitive in ("conv_stats", "conv_backward"):
            label = f"{primitive} {w.shape[2]}x{w.shape[3]}"
            served[label] = planned(primitive, conv, tuple(w.shape)) or why(primitive, case)[0]
    tail = "bn_act_max_pool" if chain.max_pool is not None else "bn_act"
    for primitive in (tail, f"{tail}_backward"):
        channels = chain.units[-1].bn.num_features
        served[primitive] = planned(primitive, None, channels) or why(primitive, Case(w.device.type, w.dtype, last))[0]
    return served
