"""Measures seconds, bytes saved for the backward pass and peak memory, and computes quantiles."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Any]
QUANTILES = {"median": 0.5, "p20": 0.2, "p80": 0.8}


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """The median, 20th and 80th percentile, interpolated linearly."""
    values = torch.tensor(samples, dtype=torch.float64)
    return {name: float(torch.quantile(values, q)) for name, q in QUANTILES.items()}


# ---------------------------------------------------------------------------------------------------- time
def seconds(step: Step, device: torch.device, calls: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds per call over ``calls`` calls in a row. A GPU is timed by its own events.

    ``clock``: ``time.thread_time`` excludes a busy machine's other work, from steps that take one thread.
    """
    if device.type == "cuda":
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        first.record()
        for _ in range(calls):
            step()
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1e3 / calls
    start = clock()
    for _ in range(calls):
        step()
    return (clock() - start) / calls


def interleaved(
    steps: Mapping[str, Step],
    device: torch.device,
    *,
    repeats: tuple[int, int],
    budget_s: float,
    sample_s: float = 0.1,
    clock: Callable[[], float] = time.perf_counter,
    agreed: Callable[[float], float] = lambda value: value,
    rest_s: float = 0.0,
) -> dict[str, list[float]]:
    """Times every step once per round. Each round starts with another step.

    So a slow phase of the machine, and the caches that the previous step leaves, affect all steps alike.

    Args:
        repeats: the fewest and the most rounds. budget_s: after the fewest, no round starts after this many seconds,
            and none at all after as many times this as there are fewest rounds: some steps take a minute each.
        sample_s: a quicker step is called as often as fits into this time. clock: as of ``seconds``.
        agreed: gives the value on which processes that take every step together agree, and waits for all of them.
        rest_s: before a sample, nothing runs for so long, and then one call that is not timed. For steps of libraries
            with threads of their own, which spin for a while after a call.

    Returns:
        Name -> seconds per call, one value per round.
    """
    names = list(steps)
    calls = {}
    for name, step in steps.items():
        once = seconds(step, device, 1, clock)
        if once < sample_s:  # time it again: the first call also allocated, packed weights and chose kernels
            once = seconds(step, device, 1, clock)
        calls[name] = max(1, round(sample_s / max(once, 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(repeats[1]):
        if done and agreed(time.perf_counter() - start) > budget_s * (1 if done >= repeats[0] else repeats[0]):
            break
        for i in range(len(names)):
            name = names[(done + i) % len(names)]
            if rest_s:
                time.sleep(rest_s)
                steps[name]()
            agreed(0)  # all start together
            found[name].append(agreed(seconds(steps[name], device, calls[name], clock)))
    return found


def figures(times_s: Sequence[float], images: int, plain_s: Sequence[float]) -> dict[str, Any]:
    """The figures of a step that takes ``images`` and these times, beside one that takes ``plain_s`` (may be empty)."""
    return {
        "images_per_s": quantiles([images / t for t in times_s]),
        "ms_per_step": quantiles([1e3 * t for t in times_s]),
        "speedup": quantiles(ratios(plain_s, times_s)) if plain_s else None,
    }


def ratios(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """The factors by which ``other`` is faster than ``base``, one per round."""
    return [b / o for b, o in zip(base, other, strict=True)]


# ---------------------------------------------------------------------------------------------------- memory
def saved_bytes(forward: Step, without: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward()``: each distinct storage counts once and whole.

    Args:
        forward: returns the tensor that backward starts from. without: parameters and buffers, which exist anyway.
    """
    ignored = {t.untyped_storage().data_ptr() for t in without}
    kept: dict[int, torch.UntypedStorage] = {}  # keeps storages alive, so that no address is used again

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del out
    return total


def _resident(key: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(f"{key}:"))
    return int(line.split()[1]) << 10


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """The rise of memory while ``step`` runs.

    On a GPU it is the caching allocator's memory, under Linux the process's resident pages. None: the system does not
    provide it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise free pages that the C library keeps would hide the step's need
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # the peak starts again from now
        before = _resident("VmRSS")
        step()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None
