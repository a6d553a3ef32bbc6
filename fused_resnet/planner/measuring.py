"""Times every candidate for a primitive on its arguments, and compares its result with that of ``aten``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fused_resnet.backends import NAMES, Call, load, loaded, vector_dtype, warn_once
from fused_resnet.planner.choice import APART, Choice, call_choice, label


def candidates_for(call: Call[Any]) -> list[str]:
    """The backends that take the call, in order of preference."""
    backends = [backend for name in NAMES if (backend := load(name)[0]) is not None]
    return [backend.name for backend in backends if backend.declines(type(call), call.case) is None]


def measure(call: Call[Any], names: list[str]) -> tuple[Choice, dict[str, float]]:
    """The fastest choice, and the milliseconds of all candidates."""
    found = _times(call, names)
    ms = {label(choice): time for choice, time in found.items()}
    if call.parts is not None:
        for_input, for_weight = (_times(part, names) for part in call.parts)
        parts = min(for_input, key=for_input.__getitem__), min(for_weight, key=for_weight.__getitem__)
        apart = Choice(APART, parts=parts)
        found[apart] = ms[label(apart)] = for_input[parts[0]] + for_weight[parts[1]]
        for what, times in (("input", for_input), ("weight", for_weight)):
            ms |= {f"{what}: {label(choice)}": time for choice, time in times.items()}
    # among equals the first, which is preferred; aten is the last backend
    return min(found, key=found.__getitem__), ms


def _times(call: Call[Any], names: list[str]) -> dict[Choice, float]:
    found: dict[Choice, float] = {}
    own = call.again()
    want = call_choice(Choice("aten"), call.again()) if "aten" in names else None
    for name in names:
        try:
            choices = [Choice(name), *(Choice(name, c) for c in loaded(name).configurations(own))]
            for choice in choices:
                if want is not None and name != "aten":
                    with _nan_filled():
                        got = call_choice(choice, call.again())
                    error = _error(got, want)
                    del got
                    if not error <= _BOUND[call.like.dtype]:
                        warn_once(
                            f"{label(choice)} is not used for {call.signature}: its result differs from aten's by "
                            f"{error:.2g} of its norm. Please report this"
                        )
                        continue
                found[choice] = milliseconds(partial(call_choice, choice, own), call.like.device)
        except Exception as error:  # the kernel does not compile here, or memory does not suffice
            if name == "aten":
                raise
            warn_once(f"backend {name!r} can't run {call.signature}: {type(error).__name__}: {error}")
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


def _error(got: Any, want: Any) -> float:
    """The largest relative error of a result's images and weights, or 0. Sums may cancel, so they don't count."""
    errors = [0.0]
    for g, w in zip(tree_leaves(got), tree_leaves(want), strict=True):
        if isinstance(w, Tensor) and w.dim() >= 4 and w.is_floating_point():
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
            return do_bench(call, warmup=5, rep=20, return_mode="median")
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.02).median * 1e3
