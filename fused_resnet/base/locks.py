"""The lock that the whole package uses. A forked child finds it free.

A child has only the thread that forked. A lock that another thread held would stay locked in it for ever, so the child
gets new locks. The data that such a lock guards must be consistent between any two of the holder's statements: a child
may start from the middle and do the work again. Source: Python's ``logging``, which does the same for its handlers'
locks.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Lock:
    """A lock for ``with lock.held(): ...``. The thread that holds it may take it again."""

    def __init__(self) -> None:
        self._renew()
        _locks.add(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within this context no other thread of the process holds the lock."""
        with self._lock:  # a child forked inside this block has the parent's lock, which this thread holds
            yield


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in _locks:
        lock._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)


def wait_before_forks(lock: Any) -> None:
    """Makes a fork wait until no other thread holds another package's lock: the child needs its state whole."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
