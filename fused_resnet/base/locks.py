"""A lock that a forked child finds free: what every lock of the package is.

A child has the thread that forked and no other. A lock that another thread held stays locked in it for ever, so the
child gets new ones. What such a lock guards must be whole between any two of the holder's statements: a child may begin
in the middle, and do again what was begun. Source: Python's ``logging``, which does so for its handlers' locks.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Lock:
    """``with lock.held(): ...``; the thread that holds it may take it again."""

    def __init__(self) -> None:
        self._renew()
        _locks.add(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within this context no other thread of the process holds the lock."""
        with self._lock:  # in a child forked in here, the parent's lock, which this thread does hold
            yield


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in _locks:
        lock._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)


def wait_before_forks(lock: Any) -> None:
    """Lets a fork wait until no other thread holds the lock of another package, whose state a child needs whole."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
