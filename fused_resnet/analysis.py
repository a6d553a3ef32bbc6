"""Which modules of a model get a plan, and which are part of another's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fused_resnet.classes import PLANNED, why_no_class
from fused_resnet.matching import Matcher
from fused_resnet.modules import has_hooks, named_modules, places
from fused_resnet.patterns import METHODS, calls_itself, looks_like_norm, original
from fused_resnet.plans import Plan, at
from fused_resnet.tracing import CannotTrace, Trace, parts, trace


@dataclass(eq=False)
class Found:
    """What became of one module.

    Attributes:
        method: that the plans stand for. plans: in eval and in train mode (often the same one); None: it stays plain,
            and ``reason`` says why. within: the name of the module whose plan it is part of.
        open: a parent's plan may reach into it.
    """

    name: str
    module: nn.Module
    method: str = "forward"
    plans: tuple[Plan, Plan] | None = None
    reason: str = ""
    within: str | None = None
    open: bool = False


def analyse(model: nn.Module) -> list[Found]:
    """Every module of ``model`` with a norm for a chain, or blocks for a row, in its own forward; parents first."""
    shared = _shared(model)
    found: dict[int, Found] = {}
    everything = named_modules(model)
    compiled = [(name, m) for name, m in everything if isinstance(m, torch.jit.ScriptModule)]
    inside = {id(m) for _, outer in compiled for _, m in named_modules(outer) if m is not outer}
    for name, m in reversed(everything):
        if id(m) in inside:
            continue
        try:
            if isinstance(m, torch.jit.ScriptModule):
                if any(looks_like_norm(part) for _, part in named_modules(m)):
                    found[id(m)] = Found(name, m, reason="TorchScript compiled it")
            elif _has_material(m, found):
                found[id(m)] = _analysed(m, name, found, shared)
        except Exception as error:  # whatever a module's own properties and classes raise when they are looked at
            found[id(m)] = Found(name, m, reason=f"it can't be looked at: {type(error).__name__}: {error}")
    return list(reversed(found.values()))


def _shared(model: nn.Module) -> dict[int, list[str]]:
    """Convolutions and norms that have several places in the model, and which."""
    found: dict[int, list[str]] = {}
    for name, m in places(model):
        if isinstance(m, nn.Conv2d) or looks_like_norm(m):
            found.setdefault(id(m), []).append(name)
    return {key: names for key, names in found.items() if len(names) > 1}


def _parts(m: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What the module's forward may call: its children, and those of its lists."""
    for name, child in m._modules.items():
        if child is None:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and not _runs(child):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _runs(m: nn.Module) -> bool:
    return original(m).forward is not nn.Module.forward


def _has_material(m: nn.Module, found: dict[int, Found]) -> bool:
    """A norm of its own, a child that a chain may reach into, or blocks in a list, which it may run in a row."""
    if not _runs(m) or looks_like_norm(m):
        return False
    if any(looks_like_norm(part) or _is_open(part, found) for _, part in _parts(m)):
        return True
    lists = [child for child in m._modules.values() if isinstance(child, nn.Sequential | nn.ModuleList)]
    return original(m) is not nn.Sequential and any(_blocks(child, found) > 1 for child in lists)


def _blocks(modules: Iterable[nn.Module], found: dict[int, Found]) -> int:
    """How many of them are one chain each."""
    plans = [found[id(m)].plans for m in modules if id(m) in found]
    return sum(p is not None and p[True].whole is not None for p in plans)


def _analysed(m: nn.Module, name: str, found: dict[int, Found], shared: dict[int, list[str]]) -> Found:
    result = Found(name, m)
    cls = original(m)
    calls = getattr(cls.forward, "__code__", None)
    known = [f for f in METHODS if hasattr(cls, f) and (f == "forward" or (calls and f in calls.co_names))]
    for method in known:
        result.method, result.reason = method, ""
        if "forward" in m.__dict__ or method in m.__dict__:
            result.reason = "its forward was replaced"
            break
        if calls_itself(m):
            result.reason = "its class overrides __call__"
            break
        if reason := why_no_class(cls, PLANNED + method):
            result.reason = reason
            break
        try:
            _plan(m, result, found, shared)
        except CannotTrace as because:
            # a forward that only calls others' norms loses nothing by it
            if any(looks_like_norm(part) for _, part in _parts(m)):
                result.reason = str(because)
            continue
        if result.plans is not None:
            break
    return result


def _plan(m: nn.Module, result: Found, found: dict[int, Found], shared: dict[int, list[str]]) -> None:
    method = result.method

    inline = {path for path, part in _parts(m) if _is_open(part, found)}
    inline |= {f"{path}.{below}" for path in list(inline) for below, _ in _open_below(m.get_submodule(path), found)}
    while True:
        try:
            training = trace(m, method, inline, True, True)
            matcher = Matcher(m, training, shared)
        except CannotTrace:
            if not inline:
                raise
            inline = set()  # a child that it calls twice, most often
            continue
        crossed: set[str] = set().union(*map(matcher.crosses, matcher.matches))
        # what no chain leaves is a leaf, with all that is in it
        needed = {p for p in inline if all(q in crossed for q in inline if p == q or p.startswith(f"{q}."))}
        if needed == inline:
            break
        inline = needed
    result.open = matcher.open and not has_hooks(m)
    result.plans = _per_mode(m, method, inline, training, matcher)
    runs = (step.target for plan in result.plans for step in plan.steps if step.kind == "children")
    in_rows = any(_blocks((at(m, path) for path in run), found) > 1 for run in runs)
    if not in_rows and not any(plan.chains for plan in result.plans):
        result.reason = "; ".join(result.plans[0].left or result.plans[1].left)
        result.plans = None
        return
    owners = set(map(parts, inline)).union(*(c.owners for plan in result.plans for c in plan.chains))
    for path in owners:
        part = found.get(id(at(m, path)))
        if part is not None:
            part.within, part.plans = result.name, None


def _is_open(m: nn.Module, found: dict[int, Found]) -> bool:
    return id(m) in found and found[id(m)].open


def _open_below(m: nn.Module, found: dict[int, Found]) -> Iterator[tuple[str, nn.Module]]:
    """All open modules below one that is open itself."""
    for path, part in _parts(m):
        if _is_open(part, found):
            yield path, part
            for below, inner in _open_below(part, found):
                yield f"{path}.{below}", inner


def _per_mode(m: nn.Module, method: str, inline: set[str], training: Trace, matcher: Matcher) -> tuple[Plan, Plan]:
    """The plans in eval and in train mode; ``training``, with its ``matcher``, is the trace in train mode."""
    evaluating = trace(m, method, inline, False, False)
    if training.same(evaluating):
        plan = matcher.plan(modal=False)
        return plan, plan
    if not training.same(trace(m, method, inline, True, False)):
        raise CannotTrace("its forward tests whether gradients are wanted")
    if not evaluating.same(trace(m, method, inline, False, True)):
        raise CannotTrace("its forward tests whether gradients are wanted")
    return Matcher(m, evaluating, matcher.shared).plan(modal=True), matcher.plan(modal=True)
