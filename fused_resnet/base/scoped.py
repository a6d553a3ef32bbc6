"""A context variable that has a value within a ``with`` block of one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def scoped(variable: ContextVar[T | None], value: T) -> Iterator[T]:
    """``variable`` is ``value`` within the context, then what it was before."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)
