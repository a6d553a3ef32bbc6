"""The registry of backends: their names, whether they can be used here, and which one is requested by name.

``primitives`` defines the calls that backends take, ``values`` their arguments, ``backend`` what a backend is; this
module re-exports their names.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from fused_resnet.backends.backend import Backend, Packed
from fused_resnet.backends.primitives import (
    BnAct,
    BnActBackward,
    BnActMaxPool,
    BnActMaxPoolBackward,
    BnBackward,
    BnCoefficients,
    BnFold,
    BnStats,
    Call,
    ConvBackward,
    ConvBiasAct,
    ConvBnAct,
    ConvStats,
    RowBackward,
    RowForward,
    RowInference,
)
from fused_resnet.backends.values import (
    Case,
    Closing,
    DyCoefficients,
    Norm,
    Prologue,
    Sums,
    allow_tf32,
    text_of,
    vector_dtype,
)
from fused_resnet.base.scoped import scoped

# The planner prefers them in this order if it has measured nothing. "aten" takes every case on every device.
NAMES = ("cuda", "cudnn", "triton", "cpu", "aten")


class BackendUnavailable(RuntimeError):
    """The backend requested by name can't be used; the message says which backend, for what, and why."""


@lru_cache
def load(name: str, to_run: bool = True) -> tuple[Backend | None, str]:
    """The backend and "ok", or None and the reason. Its module is imported at its first use.

    ``to_run=False``: returns it even if its kernels can't run here; meta tensors need no kernels.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    try:
        module = importlib.import_module(f"fused_resnet.backends.{name}")
    except ModuleNotFoundError as missing:
        if missing.name != f"fused_resnet.backends.{name}":
            return None, f"not available: {missing}"
        return None, "not part of this version"
    backend: Backend = module.BACKEND
    reason = backend.unavailable() if to_run else None
    return (None, reason) if reason else (backend, "ok")


def loaded(name: str) -> Backend:
    """The backend of this name.

    Raises:
        BackendUnavailable: it can't be used here; the message says why.
    """
    backend, reason = load(name)
    if backend is None:
        raise BackendUnavailable(f"backend {name!r}: {reason}")
    return backend


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
    loaded(name)
    with forced_again(name):
        yield


def forced_again(name: str | None) -> AbstractContextManager[Any]:
    """Requests again what ``use_backend`` requested in the forward: the backward may run on another thread."""
    return scoped(_forced, name)


def warn_lost_speed(message: str, stacklevel: int = 3) -> None:
    """Warns, as often as Python's filters show it. FUSED_RESNET_QUIET=1 silences it."""
    if os.environ.get("FUSED_RESNET_QUIET") != "1":
        warnings.warn(message, UserWarning, stacklevel=stacklevel)


@lru_cache
def warn_once(message: str) -> None:
    """``warn_lost_speed``, once per process and message."""
    warn_lost_speed(message, 4)
