"""Triton kernels, NHWC: NVIDIA sm_80 and up, AMD gfx942; in Triton's interpreter on a CPU, for tests.

One file per kernel family: conv_fprop, conv_dgrad, conv_wgrad, norm, pool, vectors, reduce; the formulas are in
formulas.py; runtime.py launches kernels and counts traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import astuple
from typing import Any

import torch

from fused_resnet.backends import Case, forced
from fused_resnet.backends.triton import configs
from fused_resnet.backends.triton.conv import conv_backward, conv_bias_act, conv_stats
from fused_resnet.backends.triton.norm import bn_act, bn_act_backward, bn_backward, bn_stats
from fused_resnet.backends.triton.pool import bn_act_max_pool, bn_act_max_pool_backward
from fused_resnet.backends.triton.runtime import INTERPRET
from fused_resnet.backends.triton.vectors import bn_coefficients, bn_fold

__all__ = [
    "bn_act",
    "bn_act_backward",
    "bn_act_max_pool",
    "bn_act_max_pool_backward",
    "bn_backward",
    "bn_coefficients",
    "bn_fold",
    "bn_stats",
    "configurations",
    "configured",
    "conv_backward",
    "conv_bias_act",
    "conv_stats",
    "refuse",
    "unavailable",
]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """The reason why no kernel can run here, or None."""
    if INTERPRET:
        return None
    if not torch.cuda.is_available():
        return (
            "no GPU: torch.cuda.is_available() is False (TRITON_INTERPRET=1 interprets the kernels on a CPU, for tests)"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"needs compute capability 8.0, this GPU has {major}.{minor}"
    return None


def configurations(call: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """The configurations that the planner may try for a call: each kernel's other configurations, one kernel at a time.

    The call runs once, to find out which kernels it starts.
    """
    with configs.asked() as problems:
        result = call()
    device = next(t.device for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor))
    target = configs.target_of(device)
    return [
        (problem.kind, astuple(config))
        for problem in problems
        for config in configs.candidates(problem, target)[1:]
    ]  # fmt: skip


def configured(config: tuple[Any, ...]) -> AbstractContextManager[None]:
    """Within this context kernels run with one of ``configurations``."""
    kind, values = config
    return configs.use(**{kind: configs.Config(*values)})


def refuse(primitive: str, case: Case) -> str | None:
    """The reason why this case is refused, or None."""
    if case.device == "cpu" and not (INTERPRET and forced() in ("triton", "cudnn")):
        return "on a CPU only in Triton's interpreter (TRITON_INTERPRET=1) and by use_backend('triton')"
    if case.conv is not None and case.conv.groups != 1:
        return f"takes convolutions without groups, not groups={case.conv.groups}"
    return refuse_pass(case)


def refuse_pass(case: Case) -> str | None:
    """The reason why a memory-bound kernel can't take this case, or None."""
    if case.device not in ("cpu", "cuda", "meta"):
        return f"runs on CUDA and ROCm devices, not on {case.device}"
    if case.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {str(case.dtype).removeprefix('torch.')}"
    if not case.channels_last:
        return "takes channels_last tensors: model.to(memory_format=torch.channels_last)"
    return None
