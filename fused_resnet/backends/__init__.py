"""The registry of backends: which there are, whether they can be used here, and which one was asked for by name.

What a backend offers is in ``primitives``; its names are handed on here.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType

from fused_resnet.backends.primitives import (
    Case,
    Closing,
    DyCoefficients,
    Norm,
    Primitives,
    Prologue,
    Sums,
    allow_tf32,
    vector_dtype,
)

__all__ = [
    "COMPANIONS",
    "NAMES",
    "OPTIONAL",
    "BackendUnavailable",
    "Case",
    "Closing",
    "DyCoefficients",
    "Norm",
    "Primitives",
    "Prologue",
    "Sums",
    "allow_tf32",
    "backends",
    "forced",
    "forced_again",
    "load",
    "use_backend",
    "vector_dtype",
    "warn_lost_speed",
    "warn_once",
]

# In the order in which the planner prefers them where it has measured nothing; "aten" takes every case on every device.
NAMES = ("cuda", "cudnn", "triton", "cpu", "aten")
# Whose kernels serve what a backend asked for by name does not have: cuDNN has no memory-bound ones.
COMPANIONS = {"cudnn": ("triton",)}
# Primitives on vectors of C elements: a backend that has none of its own uses aten's, by ``use_backend`` too.
OPTIONAL = ("bn_fold", "bn_coefficients")


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and can't serve; the message says which, what and why."""


@lru_cache
def load(name: str, to_run: bool = True) -> tuple[ModuleType | None, str]:
    """The backend's module and "ok", or None and the reason. Imports nothing before it is asked.

    ``to_run=False``: also where its kernels can't run; meta tensors need none.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    try:
        module = importlib.import_module(f"fused_resnet.backends.{name}")
    except ModuleNotFoundError as missing:
        if missing.name != f"fused_resnet.backends.{name}":
            return None, f"not available: {missing}"
        return None, "not part of this version"
    reason: str | None = module.unavailable() if to_run else None
    return (None, reason) if reason else (module, "ok")


def backends() -> dict[str, str]:
    """Every backend and "ok" or the reason why it can't be used here, best first.

    Example:
        >>> fused_resnet.backends()
        {'cuda': 'not built: ...', 'cudnn': 'no GPU: ...', 'triton': 'no GPU: ...', 'cpu': 'ok', 'aten': 'ok'}
    """
    return {name: load(name)[1] for name in NAMES}


_forced: ContextVar[str | None] = ContextVar("fused_resnet_backend", default=None)


def forced() -> str | None:
    """The backend that ``use_backend`` asks for, if any."""
    return _forced.get()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context every primitive runs on the named backend, and what it can't take is an error.

    Calls nest; a context holds for the current thread (and the backward passes that start in it).

    Args:
        name: "cuda", "cudnn", "triton", "cpu" or "aten".

    Raises:
        ValueError: an unknown name. BackendUnavailable: the backend can't be used here, or (later, at the call)
            refuses a case; the message says why.
    """
    module, reason = load(name)
    if module is None:
        raise BackendUnavailable(f"backend {name!r}: {reason}")
    with forced_again(name):
        yield


@contextmanager
def forced_again(name: str | None) -> Iterator[None]:
    """What ``use_backend`` asked for when the forward ran, for its backward, which may run on another thread."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def warn_lost_speed(message: str, stacklevel: int = 3) -> None:
    """A warning, as often as Python's filters show it; FUSED_RESNET_QUIET=1 silences it."""
    if os.environ.get("FUSED_RESNET_QUIET") != "1":
        warnings.warn(message, UserWarning, stacklevel=stacklevel)


@lru_cache
def warn_once(message: str) -> None:
    """``warn_lost_speed``, once per process and message."""
    warn_lost_speed(message, 4)
