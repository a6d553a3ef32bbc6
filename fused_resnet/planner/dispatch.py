"""Chooses the backend of each primitive: by preference, or by measuring on the device.

A chain calls a primitive by ``run(primitive, *args)``. If nothing is measured, the choice is the first of
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
from typing import TYPE_CHECKING, Any

import torch

from fused_resnet.backends import NAMES, Case, forced, load
from fused_resnet.base.locks import Lock
from fused_resnet.planner.choice import Choice, call_choice, label
from fused_resnet.planner.measuring import candidates_for, measure
from fused_resnet.planner.preference import pick, refusal_of
from fused_resnet.planner.signatures import CONV, case_of_call, key_of, signature
from fused_resnet.spec import ConvSpec

if TYPE_CHECKING:
    from fused_resnet.planner.cache import PlanCache


_choosing = Lock()
# key of the arguments -> choice; and for ``explain``: (primitive, conv, weight's shape or channels) -> entry
_known: dict[Any, Choice] = {}
_entries: dict[Any, dict[str, Any]] = {}
# Called with (primitive, args, {"choice": ..., "ms": ...}) after each measurement, for reports.
listeners: list[Callable[[str, tuple[Any, ...], dict[str, Any]], None]] = []


def run(primitive: str, *args: Any) -> Any:
    """Calls the primitive on the backend that serves these arguments (see ``Primitives``).

    Raises:
        BackendUnavailable: ``use_backend`` asks for one that refuses the case.
    """
    x = args[0]
    if forced() is not None or not _measures(x.device.type):
        return getattr(pick(primitive, case_of_call(primitive, args)), primitive)(*args)
    key = key_of(primitive, args)
    choice = _known.get(key)
    if choice is None:
        with _choosing.held():  # concurrent threads get one choice, and their timings do not overlap
            choice = _choose(primitive, args)
        if choice is None:  # it can't be measured now: by preference, and a later call measures
            return getattr(pick(primitive, case_of_call(primitive, args)), primitive)(*args)
        _known[key] = choice
    return call_choice(choice, primitive, args)


def plan() -> str:
    """FUSED_RESNET_PLAN (ValueError if it has another value than the three allowed)."""
    wish = os.environ.get("FUSED_RESNET_PLAN", "auto")
    if wish not in ("auto", "measure", "preference"):
        raise ValueError(f"FUSED_RESNET_PLAN: expected auto, measure or preference, got {wish!r}")
    return wish


def _measures(device: str) -> bool:
    return (plan() == "auto" and device == "cuda") or (plan() == "measure" and device != "meta")


def cache_of(device: torch.device) -> PlanCache:
    """The cache of a device; a CPU has one per number of threads."""
    return _cache(device, torch.get_num_threads() if device.type == "cpu" else 0)


@lru_cache
def _cache(device: torch.device, threads: int) -> PlanCache:
    from fused_resnet.planner.cache import PlanCache, identity  # imported only when something is measured

    return PlanCache(identity(device))


def _choose(primitive: str, args: tuple[Any, ...]) -> Choice | None:
    """The choice from the cache, or measured now. None: nothing to measure, or a CUDA graph is being captured."""
    x, case = args[0], case_of_call(primitive, args)
    device: torch.device = x.device
    text = signature(primitive, args)
    entry = cache_of(device).choices.get(text)
    if entry is None or not _usable(Choice.decode(entry["choice"]), primitive, case):
        if x.numel() == 0 or (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return None
        candidates = candidates_for(primitive, case)
        if len(candidates) == 1:
            return Choice(candidates[0])
        choice, times = measure(primitive, candidates, args)
        entry = cache_of(device).add(text, {"choice": choice.encode(), "ms": times}, instead_of=entry)
        for listener in listeners:
            listener(primitive, args, entry)
    about = args[CONV[primitive][0]] if primitive in CONV else None
    shape = tuple(args[CONV[primitive][1]].shape) if primitive in CONV else x.shape[1]
    _entries[(primitive, about, shape)] = entry
    choice = Choice.decode(entry["choice"])
    return choice if _usable(choice, primitive, case) else None


def _usable(choice: Choice, primitive: str, case: Case) -> bool:
    """Whether a cached choice can be used: its backend may be gone since."""
    if choice.parts is not None:
        return all(_usable(part, primitive, case) for part in choice.parts)
    module = load(choice.backend)[0] if choice.backend in NAMES else None
    return module is not None and refusal_of(module, primitive, case) is None


def planned(primitive: str, conv: ConvSpec | None, shape: Any) -> str | None:
    """The choice for a convolution's weight shape (or a number of channels), its time and aten's.

    They are from the last measurement that this process looked up; None if nothing was measured.
    """
    entry = _entries.get((primitive, conv, shape))
    if entry is None:
        return None
    choice, ms = Choice.decode(entry["choice"]), entry["ms"]
    return f"{choice} ({ms[label(choice)]:.3f} ms, aten {ms['aten']:.3f})"


def forget() -> None:
    """Drops this process's choices, so that the next call reads the cache file again."""
    _known.clear()
    _entries.clear()
    _cache.cache_clear()
