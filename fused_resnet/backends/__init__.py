"""The registry of backends: their names, whether they can be used here, and which one is requested by name.

``primitives`` defines the functions and types of a backend; this module re-exports its names.
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

# The planner prefers them in this order if it has measured nothing. "aten" takes every case on every device.
NAMES = ("cuda", "cudnn", "triton", "cpu", "aten")
# Backends that serve the primitives which a backend requested by name lacks: cuDNN has no memory-bound ones.
COMPANIONS = {"cudnn": ("triton",)}
# Primitives on vectors of C elements. A backend that lacks them uses aten's, under ``use_backend`` too.
OPTIONAL = ("bn_fold", "bn_coefficients")


class BackendUnavailable(RuntimeError):
    """The backend requested by name can't be used; the message says which backend, for what, and why."""


@lru_cache
def load(name: str, to_run: bool = True) -> tuple[ModuleType | None, str]:
    """The backend's module and "ok", or None and the reason. The module is imported at its first use.

    ``to_run=False``: returns the module even if its kernels can't run here; meta tensors need no kernels.
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
    """Every backend with "ok" or the reason why it can't be used here, in order of preference.

    Example:
        >>> fused_resnet.backends()
        {'cuda': 'not built: ...', 'cudnn': 'no GPU: ...', 'triton': 'no GPU: ...', 'cpu': 'ok', 'aten': 'ok'}
    """
    return {name: load(name)[1] for name in NAMES}


_forced: ContextVar[str | None] = ContextVar("fused_resnet_backend", default=None)


def forced() -> str | None:
    """The backend that ``use_backend`` requests, or None."""
    return _forced.get()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context every primitive runs on the named backend; a case that it can't take is an error.

    Contexts nest. A context holds for the current thread, and for the backward passes that start in it.

    Args:
        name: "cuda", "cudnn", "triton", "cpu" or "aten".

    Raises:
        ValueError: the name is unknown. BackendUnavailable: the backend can't be used here, or (later, at the call)
            it refuses a case; the message says why.
    """
    module, reason = load(name)
    if module is None:
        raise BackendUnavailable(f"backend {name!r}: {reason}")
    with forced_again(name):
        yield


@contextmanager
def forced_again(name: str | None) -> Iterator[None]:
    """Requests again what ``use_backend`` requested in the forward: the backward may run on another thread."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def warn_lost_speed(message: str, stacklevel: int = 3) -> None:
    """Warns, as often as Python's filters show it. FUSED_RESNET_QUIET=1 silences it."""
    if os.environ.get("FUSED_RESNET_QUIET") != "1":
        warnings.warn(message, UserWarning, stacklevel=stacklevel)


@lru_cache
def warn_once(message: str) -> None:
    """``warn_lost_speed``, once per process and message."""
    warn_lost_speed(message, 4)
