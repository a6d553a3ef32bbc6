"""Measures whether this package is faster than PyTorch's own operators, on this machine, once per signature.

On a CPU a chain saves passes over its convolutions' raw outputs, but it adds overhead per call. Which of the two weighs
more depends on sizes, dtypes, threads and the processor, so no constant of one machine decides here. The caller
(``fusion/choosing.py`` for chains, ``frozen/forward.py`` for frozen units) describes its case by a text and passes its
candidates and PyTorch's as calls. They are timed in turns. The answer is kept in the process, and in the planner's file
for later processes. FUSED_RESNET_PLAN=preference measures nothing: chains run at any size.

A measurement runs in the caller's thread, outside its inference mode. A second thread would have OpenMP threads of its
own, more than there are cores, and both candidates would take twice as long, not in proportion. If the caller has hooks
on saved tensors, runs a backward, or has a mode that sees every operator, the measurement runs in a separate thread,
which these do not affect. It reads no random state.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends import forced
from fused_resnet.base import layouts
from fused_resnet.base.locks import Lock
from fused_resnet.base.scoped import scoped
from fused_resnet.planner.dispatch import cache_of, plan

_always: ContextVar[bool | None] = ContextVar("fused_resnet_always", default=False)
Call = Callable[[], Any]
Calls = Callable[[int], tuple[Call, ...]]


@dataclass(frozen=True)
class Cold:
    """A call that is timed as a network's call: its weights come from memory.

    Attributes:
        call: what is timed. before: runs right before it, after other memory was read, and brings into the cache what
            the network's call before leaves there: the images, and the code.
    """

    call: Call
    before: Call

    def __call__(self) -> Any:
        return self.call()


# The fewest and the most rounds. After the fewest, no round starts after this many seconds.
ROUNDS, ROUNDS_S = (2, 15), 0.04
# Below this share of PyTorch's time ours counts as faster; above it is a tie.
TIE = 0.98
# A tie goes to chains with gradients, because they keep less for the backward, and to packed weights.
TIE_TO_OURS = 1.0
# A call that takes so many times as long as the fastest is not timed again: after one round, two, three, and more. What
# is left is timed the more often.
_HOPELESS = (1.5, 1.5, 1.2, 1.1)
# Bytes that are read between cold calls: about those of a network's weights.
_OTHERS = 32 << 20


class Measured(NamedTuple):
    """Whether ours is faster, the milliseconds of both, and which of our calls is the fastest."""

    pays: bool
    ours: float
    plain: float
    which: int = 0

    def __str__(self) -> str:
        return f"{'chains' if self.pays else 'plain'} (chains {self.ours:.3g} ms, plain {self.plain:.3g})"


# The answer if nothing is measured.
CHAINS = Measured(True, math.nan, math.nan)


def has_choice() -> bool:
    """Whether PyTorch's operators may run now: not inside ``chains_always``, and not if a backend is requested."""
    return not _always.get() and forced() is None


def chains_always() -> AbstractContextManager[Any]:
    """Chains run at any size within this context, for checks of their results."""
    return scoped(_always, True)


def size(shape: Sequence[int], dtype: torch.dtype) -> str:
    """The text of images in a signature: batches in powers of two, areas in steps of the square root of two."""
    n, c, *image = shape
    area = round(2 * math.log2(math.prod(image))) / 2
    return f"{str(dtype).removeprefix('torch.')} {1 << (n - 1).bit_length()}x{c}x2^{area:g}"


def images(shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Random images from a separate generator."""
    made = torch.empty(shape, dtype=dtype)
    if channels_last:
        made = torch.empty(shape, dtype=dtype, memory_format=layouts.channels_last(made))
    return made.normal_(generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------- the answer
_known: dict[tuple[int, str], Measured] = {}
_measuring = Lock()


class _Thread(threading.local):
    """``measures``: whether a measurement runs in this thread."""

    measures = False


_thread = _Thread()


def faster(text: str, images: int, calls: Calls, call_s: float, tie: float = TIE) -> Measured:
    """The answer for a signature: from this process, from the planner's file, or measured now.

    It never changes within a process.

    Args:
        text: everything that the times depend on, except the machine, the number of threads and the versions.
        images: the batch. calls: maps a batch of at most that size to our calls and, last, PyTorch's, ready to be
            timed; see ``Cold``; may run in another thread. call_s: the seconds that one timed call should take; of a
            larger batch a part is timed. tie: ours is the answer below this share of PyTorch's time.

    Returns:
        The measurement. ``CHAINS`` if nothing is measured, or if PyTorch's call raises: then chains report the error.
    """
    key = torch.get_num_threads(), text
    if key not in _known:
        if plan() == "preference":
            return CHAINS
        # Concurrent threads get one answer, and their timings do not overlap. A measurement may ask for another one: of
        # a convolution in a row that is timed. It may run in another thread than the one that holds the lock.
        with nullcontext() if _thread.measures else _measuring.held():
            if key not in _known:
                found = _kept(text) or _measured(partial(_timed, images, calls, call_s, tie))
                if found is not None:
                    _known[key] = _keep(text, found)
    return _known.get(key, CHAINS)


def known(text: str) -> Measured | None:
    """The answer for a signature that this process has asked for."""
    return _known.get((torch.get_num_threads(), text))


def _kept(text: str) -> Measured | None:
    entry = cache_of(torch.device("cpu")).choices.get(text)
    if entry is None:
        return None
    try:
        choice, ms = entry["choice"], entry["ms"]
        return Measured(choice["chains"], ms["chains"], ms["plain"], choice.get("which", 0))
    except (KeyError, TypeError):  # another program wrote the file
        return None


def _keep(text: str, found: Measured) -> Measured:
    """Stores an answer. Returns the valid one: another process may have been first."""
    if math.isfinite(found.ours):
        choice = {"chains": found.pays} | ({"which": found.which} if found.which else {})
        entry = {"choice": choice, "ms": {"chains": found.ours, "plain": found.plain}}
        cache_of(torch.device("cpu")).add(text, entry)
    return _kept(text) or found


def forget() -> None:
    """Drops this process's answers."""
    _known.clear()


# ---------------------------------------------------------------------------------------------------- measuring
_PLAIN = -1  # the number of PyTorch's call


def _measured(timed: Callable[[], Measured]) -> Measured | None:
    found: list[Measured] = []

    def work() -> None:
        before, _thread.measures = _thread.measures, True
        try:
            found.append(timed())
        except Exception:  # PyTorch's call raises: the caller's own call will report it
            pass
        finally:
            _thread.measures = before

    if not _watched():
        with torch.inference_mode(False):  # inference tensors can't require gradients
            work()
        return found[0] if found else None
    threads = torch.get_num_threads()

    def with_threads() -> None:
        own = torch.get_num_threads()
        if own != threads:
            torch.set_num_threads(threads)
        try:
            work()
        finally:
            if own != threads:
                torch.set_num_threads(own)

    try:
        thread = threading.Thread(target=with_threads, name="fused_resnet measures")
        thread.start()
        thread.join()
    except RuntimeError:  # an interpreter that is shutting down starts no threads
        pass
    return found[0] if found else None


def _watched() -> bool:
    """Whether the caller's hooks or modes would see, or change, a measurement in its thread."""
    return bool(
        torch._C._current_graph_task_id() != -1
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.is_anomaly_enabled()
    )


def _timed(images: int, calls: Calls, call_s: float, tie: float) -> Measured:
    """The smallest of several interleaved times of each call."""
    # with one thread the thread's CPU time, which excludes the machine's other work
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    others = cache(partial(torch.ones, _OTHERS // 4))

    def seconds(call: Call) -> float:
        if isinstance(call, Cold):
            others().sum()
            call.before()
        start = clock()
        call()
        return clock() - start

    few, *ours, plain = _begun(images, calls)
    part = min(images, max(few, math.ceil(few * call_s / max(seconds(plain), 1e-6))))
    if part > few:
        *ours, plain = calls(part)
        plain()
    able: dict[int, Call] = {}
    for number, call in enumerate(ours):
        with suppress(Exception):  # a case that PyTorch takes and we refuse runs plain
            call()
            able[number] = call
    if not able:
        return Measured(False, math.inf, seconds(plain) * 1e3)
    turns = [*able.items(), (_PLAIN, plain)]
    best = {number: math.inf for number, _ in turns}
    start = clock()
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and (len(turns) == 1 or clock() - start > ROUNDS_S):
            break
        for number, call in turns if done % 2 else reversed(turns):
            best[number] = min(best[number], seconds(call))
        hopeless = _HOPELESS[min(done, len(_HOPELESS) - 1)] * min(best.values())
        turns = [turn for turn in turns if best[turn[0]] < hopeless]
    which = min(able, key=best.__getitem__)
    return Measured(best[which] < tie * best[_PLAIN], best[which] * 1e3, best[_PLAIN] * 1e3, which)


def _begun(images: int, calls: Calls) -> tuple[Any, ...]:
    """The number of images, one, or two if one has no statistics, and the calls for them. PyTorch's has run once."""
    try:
        made = calls(1)
        made[-1]()
        return 1, *made
    except ValueError:
        few = min(images, 2)
        made = calls(few)
        made[-1]()
        return few, *made
