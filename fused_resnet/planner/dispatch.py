"""Chooses the backend of each primitive: by preference, or by measuring on the device.

A chain calls a primitive by ``run(call)``. If nothing is measured, the choice is the first of
``backends.NAMES`` that is available and takes the case. On a GPU each new signature (shapes, dtype, hyper-parameters;
the batch rounded up to a power of two) is measured once. The candidates are all backends that take it, with all their
configurations, beside ``aten``. Caches are flushed between runs. A convolution's backward is also measured as two
calls, one for the input and one for the weight. A candidate whose numbers differ from those of ``aten`` on these
arguments is dropped with a warning. The fastest is kept in a file (``cache``), so later processes choose the same.
``use_backend`` overrides all of this.

FUSED_RESNET_PLAN: "auto" (measure on GPUs; the default), "measure" (on CPUs too), "preference" (never).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from fused_resnet.backends import NAMES, BnFold, Call, forced, load
from fused_resnet.base.locks import Lock
from fused_resnet.planner.choice import Choice, call_choice, label
from fused_resnet.planner.measuring import candidates_for, measure
from fused_resnet.planner.preference import pick
from fused_resnet.spec import ConvSpec

if TYPE_CHECKING:
    from fused_resnet.planner.cache import PlanCache

R = TypeVar("R")
_choosing = Lock()
# the call's key -> choice; and for ``explain``: (primitive, what it is about) -> entry
_known: dict[Any, Choice] = {}
_entries: dict[Any, dict[str, Any]] = {}
# Called with (call, {"choice": ..., "ms": ...}) after each measurement, for reports.
listeners: list[Callable[[Call[Any], dict[str, Any]], None]] = []


def run(call: Call[R]) -> R:
    """Runs the call on the backend that serves it.

    Raises:
        BackendUnavailable: ``use_backend`` asks for one that refuses the case.
    """
    if forced() is not None or not _measures(call.like.device.type):
        return call.on(pick(type(call), call.case))
    key = call.key
    choice = _known.get(key)
    if choice is None:
        with _choosing.held():  # concurrent threads get one choice, and their timings do not overlap
            choice = _choose(call)
        if choice is None:  # it can't be measured now: by preference, and a later call measures
            return call.on(pick(type(call), call.case))
        _known[key] = choice
    return cast(R, call_choice(choice, call))


def run_whole(call: Call[R]) -> R | None:
    """Runs the call of a whole row, on the backend that serves rows of this kind; None: the primitives run one by one.

    So they do where each is measured, and for a backend without whole rows.
    """
    if call.like.numel() == 0 or _measures(call.like.device.type):
        return None
    backend = pick(BnFold, call.case)
    return call.on(backend) if backend.declines(type(call), call.case) is None else None


def plan() -> str:
    """FUSED_RESNET_PLAN (ValueError if it has another value than the three allowed)."""
    wish = os.environ.get("FUSED_RESNET_PLAN", "auto")
    if wish not in ("auto", "measure", "preference"):
        raise ValueError(f"FUSED_RESNET_PLAN: expected auto, measure or preference, got {wish!r}")
    return wish


def _measures(device: str) -> bool:
    wish = plan()
    return (wish == "auto" and device == "cuda") or (wish == "measure" and device != "meta")


def cache_of(device: torch.device) -> PlanCache:
    """The cache of a device; a CPU has one per number of threads."""
    return _cache(device, torch.get_num_threads() if device.type == "cpu" else 0)


@lru_cache
def _cache(device: torch.device, threads: int) -> PlanCache:
    from fused_resnet.planner.cache import PlanCache, identity  # imported only when something is measured

    return PlanCache(identity(device))


def _choose(call: Call[Any]) -> Choice | None:
    """The choice from the cache, or measured now. None: nothing to measure, or a CUDA graph is being captured."""
    x = call.like
    cache, text = cache_of(x.device), call.signature
    entry = cache.choices.get(text)
    if entry is None or not _usable(Choice.decode(entry["choice"]), call):
        if x.numel() == 0 or (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return None
        candidates = candidates_for(call)
        if len(candidates) == 1:
            return Choice(candidates[0])
        choice, times = measure(call, candidates)
        entry = cache.add(text, {"choice": choice.encode(), "ms": times}, instead_of=entry)
        for listener in listeners:
            listener(call, entry)
    _entries[(call.name, *call.about)] = entry
    choice = Choice.decode(entry["choice"])
    return choice if _usable(choice, call) else None


def _usable(choice: Choice, call: Call[Any]) -> bool:
    """Whether a cached choice can be used: its backend may be gone since."""
    if choice.parts is not None:
        return all(_usable(part, call) for part in choice.parts)
    backend = load(choice.backend)[0] if choice.backend in NAMES else None
    return backend is not None and backend.declines(type(call), call.case) is None


def planned(primitive: type[Call[Any]], conv: ConvSpec | None, shape: Any) -> str | None:
    """The choice for a convolution's weight shape (or a number of channels), its time and aten's.

    They are from the last measurement that this process looked up; None if nothing was measured.
    """
    entry = _entries.get((primitive.name, conv, shape))
    if entry is None:
        return None
    choice, ms = Choice.decode(entry["choice"]), entry["ms"]
    return f"{choice} ({ms[label(choice)]:.3f} ms, aten {ms['aten']:.3f})"


def forget() -> None:
    """Drops this process's choices, so that the next call reads the cache file again."""
    _known.clear()
    _entries.clear()
    _cache.cache_clear()
