"""The choice by preference: the first of ``backends.NAMES`` that is available and takes the case."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import COMPANIONS, NAMES, OPTIONAL, BackendUnavailable, Case, forced, load
from fused_resnet.spec import ConvSpec


def case_of(x: Tensor, conv: ConvSpec | None = None, weight: Tensor | None = None) -> Case:
    """The case of a call, from its tensors."""
    kernel = (weight.shape[2], weight.shape[3]) if weight is not None else (1, 1)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return Case(x.device.type, x.dtype, channels_last, conv, kernel)


def pick(primitive: str, case: Case) -> Any:
    """The backend module that serves this primitive by preference.

    Raises:
        BackendUnavailable: ``use_backend`` asks for one that refuses the case.
    """
    return _pick(primitive, case, forced())[0]


def why(primitive: str, case: Case) -> tuple[str, dict[str, str]]:
    """The name of the backend that serves, and the reasons of preferred backends that refuse."""
    module, reasons = _pick(primitive, case, forced())
    return _name(module), reasons


def _name(module: Any) -> str:
    name: str = module.__name__.rsplit(".", 1)[-1]
    return name


def _order(primitive: str, only: str | None) -> tuple[str, ...]:
    if only is None:
        return NAMES
    return (only, *COMPANIONS.get(only, ()), *(("aten",) if primitive in OPTIONAL else ()))


@lru_cache(maxsize=4096)
def _pick(primitive: str, case: Case, only: str | None) -> tuple[Any, dict[str, str]]:
    reasons: dict[str, str] = {}
    for name in _order(primitive, only):
        # a backend requested by name may count meta tensors even if it can't run here
        module, reason = load(name, to_run=case.device != "meta" or only is None)
        if module is not None:
            refusal = refusal_of(module, primitive, case)
            if refusal is None:
                return module, reasons
            reason = refusal
        reasons[name] = reason
    raise BackendUnavailable(f"{primitive} on {case}: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))


def refusal_of(module: Any, primitive: str, case: Case) -> str | None:
    if not hasattr(module, primitive):
        return f"does not implement {primitive}"
    reason: str | None = module.refuse(primitive, case)
    return reason
