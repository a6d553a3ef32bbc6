"""Which backend serves which primitive, and why not the others.

The choice is the first of ``backends.NAMES`` that is available and takes the case; ``use_backend`` overrides it and
turns a refusal into an error. Choices are cached per (primitive, case), so they cost a dictionary look-up.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import NAMES, BackendUnavailable, Case, forced, load
from fused_resnet.spec import ConvSpec


def case_of(x: Tensor, conv: ConvSpec | None = None, weight: Tensor | None = None) -> Case:
    """What backends decide by, read off the tensors."""
    kernel = (weight.shape[2], weight.shape[3]) if weight is not None else (1, 1)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return Case(x.device.type, x.dtype, channels_last, conv, kernel)


def pick(primitive: str, case: Case) -> Any:
    """The backend module that serves this primitive here.

    Raises:
        BackendUnavailable: ``use_backend`` asks for one that refuses the case.
    """
    return _pick(primitive, case, forced())[0]


def why(primitive: str, case: Case) -> tuple[str, dict[str, str]]:
    """The name of the backend that serves, and the reasons of those that were preferred and don't."""
    module, reasons = _pick(primitive, case, forced())
    return module.__name__.rsplit(".", 1)[-1], reasons


@lru_cache(maxsize=4096)
def _pick(primitive: str, case: Case, only: str | None) -> tuple[Any, dict[str, str]]:
    reasons: dict[str, str] = {}
    for name in (only,) if only else NAMES:
        module, reason = load(name)
        if module is not None:
            refusal = (
                module.refuse(primitive, case) if hasattr(module, primitive) else f"does not implement {primitive}"
            )
            if refusal is None:
                return module, reasons
            reason = refusal
        reasons[name] = reason
    raise BackendUnavailable(f"{primitive} on {case}: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))
