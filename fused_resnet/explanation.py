"""explain: what became of each block of a model, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_resnet.backends import Case
from fused_resnet.classes import FusedSequential, plan_of, rows_of
from fused_resnet.freezing import Frozen, FrozenChain, FrozenUnit, why_not_frozen
from fused_resnet.frozen_forward import packed_forms
from fused_resnet.modules import ChainModules, named_modules, shared_by
from fused_resnet.patterns import original
from fused_resnet.planner import planned, why
from fused_resnet.plans import Plan
from fused_resnet.small import least_values
from fused_resnet.spec import ConvSpec


@dataclass(frozen=True)
class Row:
    """One module: its name in the model, class, whether it runs as chains, why not, and primitive -> backend (of a
    frozen model: convolution -> backend, and what its weight is packed for).

    Attributes:
        chains: how many, where it is fused. reason: why it runs plain, or what of a fused one does.
        statistics: over which processes its SyncBatchNorms take theirs. least: values of its input below which it runs
            its own forward, in training on this CPU (``small.py``).
    """

    name: str
    type: str
    fused: bool
    reason: str
    backends: dict[str, str]
    chains: int = 0
    statistics: str = ""
    least: int = 0


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found; prints as a table."""

    rows: list[Row]

    def __str__(self) -> str:
        if not self.rows:
            return "no norm of a known class in this model"
        width = max(len(r.name) for r in self.rows) + 2
        kinds = max(14, max(len(r.type) for r in self.rows) + 2)
        lines = []
        for r in self.rows:
            parts = [*(f"{p}: {b}" for p, b in r.backends.items()), r.statistics]
            parts.append(f"its own forward below {r.least} values" if r.least else "")
            served = ", ".join(filter(None, parts))
            told = f"{served}; plain: {r.reason}" if served and r.reason else served or r.reason
            lines.append(f"{r.name:<{width}}{r.type:<{kinds}}{'fused' if r.fused else 'plain':<7}{told}")
        fused = sum(r.fused for r in self.rows)
        return "\n".join([*lines, f"{fused} of {len(self.rows)} fused"])


def explain(model: nn.Module) -> Explanation:
    """Each module of ``model`` with convolutions and norms of its own: fused or not, why not, which backend serves
    which primitive, and over which processes a SyncBatchNorm takes its statistics. A module whose norms are part of its
    parent's chains has no row.

    Of a frozen model each convolution: which backend serves it, and what its weight has been packed for by now.

    Raises:
        TypeError: not an nn.Module.
    """
    from fused_resnet.analysis import analyse  # late, as in fuse

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    rows = []
    if isinstance(model, Frozen):
        return Explanation(_frozen_rows(model))
    closed_by = _closed_by(model)
    for found in analyse(model):
        m, plan = found.module, plan_of(found.module)
        name, kind = found.name or "(model)", original(m).__name__
        if plan is not None and not plan.chains:
            continue  # it runs its children in rows, who have rows of their own here
        if plan is not None:
            chains, reason = plan.modules(m)
            if found.reason == "its forward was replaced":
                reason = found.reason
            served = _serving(chains) if reason is None else {}
            if served and id(m) in closed_by:
                served["bn_act_backward"] = f"in conv_backward of {closed_by[id(m)]}"
            shared = _shared(chains) if reason is None else ""
            least = _least(chains, plan) if reason is None else 0
            rows.append(
                Row(name, kind, reason is None, reason or "; ".join(plan.left), served, len(chains), shared, least)
            )
        elif found.within is None and (found.reason or (found.plans is not None and found.plans[True].chains)):
            rows.append(Row(name, kind, False, found.reason or "not fused yet: call fuse(model)", {}))
    return Explanation(rows)


def _least(chains: Sequence[ChainModules], plan: Plan) -> int:
    """Of the module's input, values from which its chains run: 0 where they do at any size."""
    weights = [t for chain in chains for unit in chain.all_units for t in unit.bn.parameters()]
    limited = plan.values < float("inf") and weights and all(t.device.type == "cpu" for t in weights)
    return math.ceil(least_values("training") / plan.values) if limited and weights[0].dtype == torch.float32 else 0


def _frozen_rows(model: Frozen) -> list[Row]:
    from fused_resnet.analysis import analyse

    chains: dict[str, list[FrozenChain]] = {}
    for _, m in named_modules(model):
        if isinstance(m, FrozenChain):
            chains.setdefault(m.name, []).append(m)
    left = {name: "; ".join(plan.left) for name, m in named_modules(model.model) if (plan := plan_of(m)) is not None}
    rows = [
        Row(name or "(model)", made[0].block, True, left.get(name, ""), _serving_frozen(made), len(made))
        for name, made in chains.items()
    ]
    for found in analyse(model.model):
        if found.within is not None or found.name in chains:
            continue
        reason = found.reason
        if found.plans is not None:
            unfolded = map(why_not_frozen, found.plans[False].modules(found.module)[0])
            reason = next(filter(None, unfolded), "")
        if found.name in model.left:
            reason = "it, or a module of its own, is called otherwise than its chains are for"
        if reason:
            rows.append(Row(found.name or "(model)", original(found.module).__name__, False, reason, {}))
    return rows


def _serving_frozen(chains: Sequence[FrozenChain]) -> dict[str, str]:
    """Convolution, or norm without one -> what serves it."""
    served = {}
    for number, chain in enumerate(chains, 1):
        of = f"chain {number} " if len(chains) > 1 else ""
        for i, unit in enumerate(chain, 1):
            assert isinstance(unit, FrozenUnit)
            place = str(i) if i <= len(chain.spec.units) else "shortcut"
            kind = "bn_act" if unit.spec.conv is None else "conv"
            size = "x".join(map(str, unit.weight.shape[2:]))
            served[f"{of}{kind} {place} {size}".rstrip()] = _serving_unit(unit, chain)
    return served


def _serving_unit(unit: FrozenUnit, chain: FrozenChain) -> str:
    w, conv = unit.weight, unit.spec.conv
    if chain.portable:
        return "PyTorch's own"
    if conv is None:
        case = Case(w.device.type, chain.dtype, True)
        return planned("bn_act", None, w.shape[0]) or why("bn_act", case)[0]
    behind = ", its scale behind it: folded it would leave the dtype's range" if len(unit.tensors) > 2 else ""
    if measured := planned("conv_bias_act", conv, tuple(w.shape)):
        return measured + behind
    backend = why("conv_bias_act", Case(w.device.type, w.dtype, True, conv, (w.shape[2], w.shape[3])))[0]
    forms = sorted({getattr(form, "kind", "stem") for form in packed_forms(w)})
    return f"{backend}, {'packed: ' + ' and '.join(forms) if forms else 'not packed'}{behind}"


def _closed_by(model: nn.Module) -> dict[int, str]:
    """Blocks whose closing backward is done by the block after them in a row -> that block's name."""
    names = {id(m): name for name, m in named_modules(model)}
    rows = [blocks for _, m in named_modules(model) if isinstance(m, FusedSequential) for blocks in rows_of(m)]
    return {id(m): names[id(after)] for row in rows for (m, _), (after, _) in zip(row, row[1:], strict=False)}


def _shared(chains: Sequence[ChainModules]) -> str:
    """Over which processes the chains' SyncBatchNorms take their statistics."""
    norms = [unit.bn for chain in chains for unit in chain.all_units if isinstance(unit.bn, nn.SyncBatchNorm)]
    groups = [shared_by(bn) for bn in norms]
    sizes = sorted({dist.get_world_size(group) for group in groups if group is not None})
    if sizes:
        return f"statistics over the process group of {' and '.join(map(str, sizes))}"
    return "statistics of this process alone: no process group" if norms else ""


def _serving(chains: Sequence[ChainModules]) -> dict[str, str]:
    """Primitive -> backend for the chains' training step, in the parameters' device, dtype and layout."""
    served: dict[str, str] = {}
    for chain in chains:
        last = False
        like: Tensor | None = chain.units[0].bn.weight
        for unit in chain.all_units:
            if unit.conv is None:
                continue
            c, like = unit.conv, unit.conv.weight
            conv = ConvSpec.make(like.shape, c.stride, c.padding, c.dilation, c.groups, c.bias is not None)
            last = not like.is_contiguous() or like.shape[2:] == (1, 1)
            case = Case(like.device.type, like.dtype, last, conv, (like.shape[2], like.shape[3]))
            for primitive in ("conv_stats", "conv_backward"):
                label = f"{primitive} {like.shape[2]}x{like.shape[3]}"
                served[label] = planned(primitive, conv, tuple(like.shape)) or why(primitive, case)[0]
        if like is None:
            continue  # a norm without parameters, behind somebody else's convolution: nothing tells its dtype
        tail = "bn_act_max_pool" if chain.max_pool is not None else "bn_act"
        for primitive in (tail, f"{tail}_backward"):
            case = Case(like.device.type, like.dtype, last)
            served[primitive] = planned(primitive, None, chain.units[-1].channels) or why(primitive, case)[0]
    return served
