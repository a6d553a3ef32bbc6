"""Dynamo's captures, which take most of a test's time, made cheaper."""

from __future__ import annotations

import gc


def cheaper() -> None:
    """Garbage is looked for among what tests make, less often, and not after each capture: little of what a capture
    makes is any. Dynamo does not time a new graph's guards for its log, for which it flushes the processor's caches."""
    import torch._dynamo.guards

    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    torch._dynamo.config.run_gc_after_compile = False
    torch._dynamo.guards.profile_guard_manager = lambda *args: 0.0
