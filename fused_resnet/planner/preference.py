"""The choice by preference: the first of ``backends.NAMES`` that is available and takes the case."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fused_resnet.backends import NAMES, Backend, BackendUnavailable, Call, Case, forced, load


def pick(primitive: type[Call[Any]], case: Case) -> Backend:
    """The backend that serves this primitive by preference.

    Raises:
        BackendUnavailable: ``use_backend`` asks for one that refuses the case.
    """
    return _served(primitive, case)[0]


def why(primitive: type[Call[Any]], case: Case) -> tuple[str, dict[str, str]]:
    """The name of the backend that serves, and the reasons of preferred backends that refuse."""
    backend, reasons = _served(primitive, case)
    return backend.name, reasons


def _served(primitive: type[Call[Any]], case: Case) -> tuple[Backend, dict[str, str]]:
    return _pick(primitive, case, forced())  # type: ignore[arg-type]  # mypy takes no class for hashable


def _order(primitive: type[Call[Any]], only: str | None) -> tuple[str, ...]:
    if only is None:
        return NAMES
    requested, _ = load(only, to_run=False)
    companions = requested.companions if requested is not None else ()
    return (only, *companions, *(("aten",) if primitive.vector else ()))


@lru_cache(maxsize=4096)
def _pick(primitive: type[Call[Any]], case: Case, only: str | None) -> tuple[Backend, dict[str, str]]:
    reasons: dict[str, str] = {}
    for name in _order(primitive, only):
        # a backend requested by name may count meta tensors even if it can't run here
        backend, reason = load(name, to_run=case.device != "meta" or only is None)
        if backend is not None:
            refusal = backend.declines(primitive, case)
            if refusal is None:
                return backend, reasons
            reason = refusal
        reasons[name] = reason
    raise BackendUnavailable(f"{primitive.name} on {case}: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))
