"""Chooses the backend of each primitive: by preference, or by measuring on the device.

A chain calls a primitive by ``run(primitive, *args)``. If nothing is measured, the choice is the first of
``backends.NAMES`` that is available and takes the case. On a GPU each new signature (shapes, dtype, hyper-parameters;
the batch rounded up to a power of two) is measured once. The candidates are all backends that take it, with all their
configurations, beside ``aten``. Caches are flushed between runs. A convolution's backward is also measured as two
calls, one for the input and one for the weight. A candidate whose numbers differ from those of ``aten`` on these
arguments is dropped with a warning. The fastest is kept in a file (``plan_cache``), so later processes choose the same.
``use_backend`` overrides all of this.

FUSED_RESNET_PLAN: "auto" (measure on GPUs; the default), "measure" (on CPUs too), "preference" (never).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fused_resnet.backends import (
    COMPANIONS,
    NAMES,
    OPTIONAL,
    BackendUnavailable,
    Case,
    Closing,
    DyCoefficients,
    Norm,
    Prologue,
    allow_tf32,
    forced,
    load,
    vector_dtype,
    warn_once,
)
from fused_resnet.locks import Lock
from fused_resnet.spec import Act, ConvSpec, PoolSpec

if TYPE_CHECKING:
    from fused_resnet.plan_cache import PlanCache

# The positions of a primitive's convolution and weight among its arguments.
_CONV = {"conv_bias_act": (3, 1), "conv_stats": (2, 1), "conv_backward": (6, 5)}
# The positions of conv_backward's need_input, need_weight, add, closing.
_NEEDS, _ADD, _CLOSING = (7, 8), 9, 10
_WEIGHT_ONLY = {_NEEDS[0]: False, _ADD: None, _CLOSING: None}


# ---------------------------------------------------------------------------------------------------- by preference
def case_of(x: Tensor, conv: ConvSpec | None = None, weight: Tensor | None = None) -> Case:
    """The case of a call, from its tensors."""
    kernel = (weight.shape[2], weight.shape[3]) if weight is not None else (1, 1)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return Case(x.device.type, x.dtype, channels_last, conv, kernel)


def pick(primitive: str, case: Case) -> Any:
    """The backend module that serves this primitive by preference.

    Raises:
        BackendUnavailable: ``use_backend`` asks for one that refuses the case.
    """
    return _pick(primitive, case, forced())[0]


def why(primitive: str, case: Case) -> tuple[str, dict[str, str]]:
    """The name of the backend that serves, and the reasons of preferred backends that refuse."""
    module, reasons = _pick(primitive, case, forced())
    return _name(module), reasons


def _name(module: Any) -> str:
    name: str = module.__name__.rsplit(".", 1)[-1]
    return name


def _order(primitive: str, only: str | None) -> tuple[str, ...]:
    if only is None:
        return NAMES
    return (only, *COMPANIONS.get(only, ()), *(("aten",) if primitive in OPTIONAL else ()))


@lru_cache(maxsize=4096)
def _pick(primitive: str, case: Case, only: str | None) -> tuple[Any, dict[str, str]]:
    reasons: dict[str, str] = {}
    for name in _order(primitive, only):
        # a backend requested by name may count meta tensors even if it can't run here
        module, reason = load(name, to_run=case.device != "meta" or only is None)
        if module is not None:
            refusal = _refusal(module, primitive, case)
            if refusal is None:
                return module, reasons
            reason = refusal
        reasons[name] = reason
    raise BackendUnavailable(f"{primitive} on {case}: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))


def _refusal(module: Any, primitive: str, case: Case) -> str | None:
    if not hasattr(module, primitive):
        return f"does not implement {primitive}"
    reason: str | None = module.refuse(primitive, case)
    return reason


# ---------------------------------------------------------------------------------------------------- choices
@dataclass(frozen=True)
class Choice:
    """The choice for a signature: a backend and its configuration (which only the backend reads; None: its default).

    For conv_backward it may be one choice for the input's gradient and one for the weight's.
    """

    backend: str
    config: tuple[Any, ...] | None = None
    parts: tuple[Choice, Choice] | None = None

    def encode(self) -> dict[str, Any]:
        """The choice as a value for JSON."""
        if self.parts is not None:
            return {"backend": self.backend, "parts": [part.encode() for part in self.parts]}
        return {"backend": self.backend, "config": self.config}

    @staticmethod
    def decode(raw: dict[str, Any]) -> Choice:
        """The inverse of ``encode``."""
        parts = raw.get("parts")
        both = (Choice.decode(parts[0]), Choice.decode(parts[1])) if parts is not None else None
        return Choice(raw["backend"], _tuples(raw.get("config")), both)

    def __str__(self) -> str:
        if self.parts is not None:
            return " + ".join(str(part) for part in self.parts)
        return self.backend


_APART = "apart"


def _tuples(raw: Any) -> Any:
    return tuple(_tuples(v) for v in raw) if isinstance(raw, list | tuple) else raw


def _configured(choice: Choice) -> AbstractContextManager[Any]:
    if choice.config is None:
        return nullcontext()
    context: AbstractContextManager[Any] = load(choice.backend)[0].configured(choice.config)  # type: ignore[union-attr]
    return context


def _call(choice: Choice, primitive: str, args: tuple[Any, ...]) -> Any:
    if choice.parts is not None:
        for_input, for_weight = choice.parts
        # the weight's gradient first: the input's may overwrite ``add``
        _, dw, *_ = _call(for_weight, primitive, _with(args, _WEIGHT_ONLY))
        dx, _, *sums = _call(for_input, primitive, _with(args, {_NEEDS[1]: False}))
        return dx, dw, *sums
    function = getattr(load(choice.backend)[0], primitive)
    if choice.config is None:
        return function(*args)
    with _configured(choice):
        return function(*args)


def _with(args: tuple[Any, ...], changes: dict[int, Any]) -> tuple[Any, ...]:
    return tuple(changes.get(i, a) for i, a in enumerate(args))


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
        return getattr(pick(primitive, _case(primitive, args)), primitive)(*args)
    key = _key(primitive, args)
    choice = _known.get(key)
    if choice is None:
        with _choosing.held():  # concurrent threads get one choice, and their timings do not overlap
            choice = _choose(primitive, args)
        if choice is None:  # it can't be measured now: by preference, and a later call measures
            return getattr(pick(primitive, _case(primitive, args)), primitive)(*args)
        _known[key] = choice
    return _call(choice, primitive, args)


def plan() -> str:
    """FUSED_RESNET_PLAN (ValueError if it has another value than the three allowed)."""
    wish = os.environ.get("FUSED_RESNET_PLAN", "auto")
    if wish not in ("auto", "measure", "preference"):
        raise ValueError(f"FUSED_RESNET_PLAN: expected auto, measure or preference, got {wish!r}")
    return wish


def _measures(device: str) -> bool:
    return (plan() == "auto" and device == "cuda") or (plan() == "measure" and device != "meta")


def _case(primitive: str, args: tuple[Any, ...]) -> Case:
    if primitive not in _CONV:
        return case_of(args[0])
    conv, weight = _CONV[primitive]
    return case_of(args[3] if primitive == "conv_backward" else args[0], args[conv], args[weight])


def _key(primitive: str, args: tuple[Any, ...]) -> Any:
    """The key of a choice in this process."""
    return (primitive, args[0].device, _tf32(primitive, args[0]), *map(_part, args))


def _tf32(primitive: str, x: Tensor) -> bool:
    """Whether float32 products run in tf32, with another kernel and other times."""
    return primitive in _CONV and x.device.type == "cuda" and allow_tf32(x.dtype)


def _part(a: Any) -> Any:
    """The hashable properties of an argument on which a measurement depends."""
    if isinstance(a, Tensor):
        return a.shape, a.dtype, a.is_contiguous()
    if isinstance(a, Prologue):
        return a.act
    if isinstance(a, Closing):
        return a.act, a.summand is None, a.summand_norm is None
    if isinstance(a, DyCoefficients):
        return a.b is None
    if isinstance(a, Norm):
        return True
    if isinstance(a, tuple) and not isinstance(a, ConvSpec | Act | PoolSpec):
        return len(a)
    return a


def signature(primitive: str, args: tuple[Any, ...]) -> str:
    """The key of a measurement in the cache file. Batches are rounded up to a power of two."""
    return " ".join([primitive, *(text_of(a) for a in args), *(["tf32"] if _tf32(primitive, args[0]) else [])])


def text_of(a: Any) -> str:
    """The text of a primitive's argument in a signature."""
    if isinstance(a, Tensor):
        shape = list(a.shape)
        if a.dim() == 4 and shape[0] > 0:
            shape[0] = 1 << (shape[0] - 1).bit_length()
        layout = "nhwc" if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last) else ""
        return f"{str(a.dtype).removeprefix('torch.')}{layout}{'x'.join(map(str, shape))}"
    if isinstance(a, ConvSpec):
        return f"conv(stride={a.stride},padding={a.padding},dilation={a.dilation},groups={a.groups})".replace(" ", "")
    if isinstance(a, Act):
        return f"{a.name}({a.param:g})"
    if isinstance(a, Prologue):
        return f"prologue({text_of(a.act)})"
    if isinstance(a, Closing):
        summand = "" if a.summand is None else ",summand" if a.summand_norm is None else ",norm"
        return f"closing({text_of(a.act)}{summand})"
    if isinstance(a, DyCoefficients):
        return "frozen" if a.b is None else "batch"
    if isinstance(a, Norm):
        return "norm"
    if isinstance(a, PoolSpec):
        return f"pool({a.kernel},{a.stride},{a.padding})".replace(" ", "")
    if isinstance(a, tuple):
        return f"{type(a).__name__.lower()}"
    return "-" if a is None else str(a)


def cache(device: torch.device) -> PlanCache:
    """The cache of a device; a CPU has one per number of threads."""
    return _cache(device, torch.get_num_threads() if device.type == "cpu" else 0)


@lru_cache
def _cache(device: torch.device, threads: int) -> PlanCache:
    from fused_resnet.plan_cache import PlanCache, identity  # imported only when something is measured

    return PlanCache(identity(device))


def _choose(primitive: str, args: tuple[Any, ...]) -> Choice | None:
    """The choice from the cache, or measured now. None: nothing to measure, or a CUDA graph is being captured."""
    x, case = args[0], _case(primitive, args)
    device: torch.device = x.device
    text = signature(primitive, args)
    entry = cache(device).choices.get(text)
    if entry is None or not _usable(Choice.decode(entry["choice"]), primitive, case):
        if x.numel() == 0 or (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return None
        candidates = _candidates(primitive, case)
        if len(candidates) == 1:
            return Choice(candidates[0])
        choice, times = _measure(primitive, candidates, args)
        entry = cache(device).add(text, {"choice": choice.encode(), "ms": times}, instead_of=entry)
        for listener in listeners:
            listener(primitive, args, entry)
    about = args[_CONV[primitive][0]] if primitive in _CONV else None
    shape = tuple(args[_CONV[primitive][1]].shape) if primitive in _CONV else x.shape[1]
    _entries[(primitive, about, shape)] = entry
    choice = Choice.decode(entry["choice"])
    return choice if _usable(choice, primitive, case) else None


def _usable(choice: Choice, primitive: str, case: Case) -> bool:
    """Whether a cached choice can be used: its backend may be gone since."""
    if choice.parts is not None:
        return all(_usable(part, primitive, case) for part in choice.parts)
    module = load(choice.backend)[0] if choice.backend in NAMES else None
    return module is not None and _refusal(module, primitive, case) is None


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


# ---------------------------------------------------------------------------------------------------- measuring
def _candidates(primitive: str, case: Case) -> list[str]:
    """The backends that take the case, in order of preference."""
    modules = [(name, load(name)[0]) for name in NAMES]
    return [name for name, m in modules if m is not None and _refusal(m, primitive, case) is None]


def _measure(primitive: str, names: list[str], args: tuple[Any, ...]) -> tuple[Choice, dict[str, float]]:
    """The fastest choice, and the milliseconds of all candidates."""
    found = _times(primitive, names, args)
    ms = {label(choice): time for choice, time in found.items()}
    if primitive == "conv_backward" and args[_NEEDS[0]] and args[_NEEDS[1]]:
        for_input = _times(primitive, names, _with(args, {_NEEDS[1]: False}))
        for_weight = _times(primitive, names, _with(args, _WEIGHT_ONLY))
        parts = min(for_input, key=for_input.__getitem__), min(for_weight, key=for_weight.__getitem__)
        apart = Choice(_APART, parts=parts)
        found[apart] = ms[label(apart)] = for_input[parts[0]] + for_weight[parts[1]]
        for what, times in (("input", for_input), ("weight", for_weight)):
            ms |= {f"{what}: {label(choice)}": time for choice, time in times.items()}
    # among equals the first, which is preferred; aten is the last backend
    return min(found, key=found.__getitem__), ms


def label(choice: Choice) -> str:
    """The name of a choice among the measured times."""
    if choice.parts is not None:
        return "apart: " + " + ".join(label(part) for part in choice.parts)
    return choice.backend if choice.config is None else f"{choice.backend} {choice.config}"


def _times(primitive: str, names: list[str], args: tuple[Any, ...]) -> dict[Choice, float]:
    found: dict[Choice, float] = {}
    own = _own(primitive, args)
    want = _call(Choice("aten"), primitive, _own(primitive, args)) if "aten" in names else None
    for name in names:
        module: Any = load(name)[0]
        choices = [Choice(name)]
        try:
            if hasattr(module, "configurations"):
                choices += [Choice(name, c) for c in module.configurations(partial(_call, choices[0], primitive, own))]
            for choice in choices:
                if want is not None and name != "aten":
                    with _nan_filled():
                        got = _call(choice, primitive, _own(primitive, args))
                    error = _error(got, want)
                    del got
                    if not error <= _BOUND[args[0].dtype]:
                        warn_once(
                            f"{label(choice)} is not used for {signature(primitive, args)}: its result differs from "
                            f"aten's by {error:.2g} of its norm. Please report this"
                        )
                        continue
                found[choice] = milliseconds(partial(_call, choice, primitive, own), own[0].device)
        except Exception as error:  # the kernel does not compile here, or memory does not suffice
            if name == "aten":
                raise
            warn_once(f"backend {name!r} can't run {signature(primitive, args)}: {type(error).__name__}: {error}")
    return found


# The largest distance of a candidate's result from aten's, relative to its norm. It is far above rounding (which the
# tests check), so a refused candidate is broken: a miscompiled kernel, a driver, a backend that was not built for this
# chip.
_BOUND = {torch.float64: 1e-6, torch.float32: 2e-2, torch.bfloat16: 0.1, torch.float16: 5e-2}


@contextmanager
def _nan_filled() -> Iterator[None]:
    """New memory holds NaN within this context: memory of the previous candidate may already hold the right values."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _own(primitive: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A copy of ``add`` for each call, because a primitive may overwrite it."""
    if primitive != "conv_backward" or args[_ADD] is None:
        return args
    return _with(args, {_ADD: args[_ADD].clone(memory_format=torch.preserve_format)})


def _error(got: Any, want: Any) -> float:
    """The largest relative error of a result's images and weights, or 0. Sums may cancel, so they don't count."""
    errors = [0.0]
    for g, w in zip(tree_leaves(got), tree_leaves(want), strict=True):
        if isinstance(w, Tensor) and w.dim() == 4 and w.is_floating_point():
            if not isinstance(g, Tensor) or g.shape != w.shape:
                return float("inf")
            # both may hold NaN or Inf in the same places
            g, w = (t.detach().to(vector_dtype(t.dtype)) for t in (g, w))
            same = (g == w) | (g.isnan() & w.isnan())
            difference = torch.where(same, 0, g - w)
            errors.append(float(difference.norm() / w.nan_to_num(0, 0, 0).norm().clamp_min(1e-20)))
    return max(errors, key=lambda e: (e != e, e))


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median time of a call: on a GPU by events, with the L2 cache flushed between runs; on a CPU by the clock."""
    if device.type == "cuda":
        from triton.testing import do_bench

        with torch.cuda.device(device):
            median: float = do_bench(call, warmup=5, rep=20, return_mode="median")
        return median
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.02).median * 1e3
