"""Triton kernels, NHWC: NVIDIA sm_80 and up, AMD gfx942; in Triton's interpreter on a CPU, for tests.

One file per kernel family: conv_fprop, conv_dgrad, conv_wgrad, norm, pool, vectors, reduce; the formulas are in
formulas.py; runtime.py launches kernels and counts traffic.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import astuple
from typing import Any

import torch

from fused_resnet.backends import Backend, Call, Case, forced
from fused_resnet.backends.backend import Config
from fused_resnet.backends.triton import configs, conv, norm, pool, vectors
from fused_resnet.backends.triton.runtime import INTERPRET

__all__ = ["BACKEND", "INTERPRET", "refuse_pass"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse_pass(case: Case) -> str | None:
    """The reason why a memory-bound kernel can't take this case, or None."""
    if case.device not in ("cpu", "cuda", "meta"):
        return f"runs on CUDA and ROCm devices, not on {case.device}"
    if case.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {str(case.dtype).removeprefix('torch.')}"
    if not case.channels_last:
        return "takes channels_last tensors: model.to(memory_format=torch.channels_last)"
    return None


class Triton(Backend):
    """Every primitive is a function of its kernel's file."""

    name = "triton"

    conv_bias_act = staticmethod(conv.conv_bias_act)
    conv_stats = staticmethod(conv.conv_stats)
    conv_backward = staticmethod(conv.conv_backward)
    bn_stats = staticmethod(norm.bn_stats)
    bn_act = staticmethod(norm.bn_act)
    bn_act_backward = staticmethod(norm.bn_act_backward)
    bn_backward = staticmethod(norm.bn_backward)
    bn_act_max_pool = staticmethod(pool.bn_act_max_pool)
    bn_act_max_pool_backward = staticmethod(pool.bn_act_max_pool_backward)
    bn_fold = staticmethod(vectors.bn_fold)
    bn_coefficients = staticmethod(vectors.bn_coefficients)

    def unavailable(self) -> str | None:
        """The reason why no kernel can run here, or None."""
        if INTERPRET:
            return None
        if not torch.cuda.is_available():
            return (
                "no GPU: torch.cuda.is_available() is False "
                "(TRITON_INTERPRET=1 interprets the kernels on a CPU, for tests)"
            )
        if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            major, minor = torch.cuda.get_device_capability()
            return f"needs compute capability 8.0, this GPU has {major}.{minor}"
        return None

    def refuse(self, primitive: type[Call[Any]], case: Case) -> str | None:
        """The reason why this case is refused, or None."""
        if case.device == "cpu" and not (INTERPRET and forced() in ("triton", "cudnn")):
            return "on a CPU only in Triton's interpreter (TRITON_INTERPRET=1) and by use_backend('triton')"
        if case.conv is not None and case.volume:
            return "takes convolutions of two dimensions, not of three"
        if case.conv is not None and case.conv.groups != 1:
            return f"takes convolutions without groups, not groups={case.conv.groups}"
        return refuse_pass(case)

    def configurations(self, call: Call[Any]) -> list[Config]:
        """Each kernel's other configurations, one kernel at a time. Runs the call, to find out which it starts."""
        with configs.asked() as problems:
            call.on(self)
        target = configs.target_of(call.like.device)
        return [
            (problem.kind, astuple(config))
            for problem in problems
            for config in configs.candidates(problem, target)[1:]
        ]  # fmt: skip

    def configured(self, config: Config) -> AbstractContextManager[Any]:
        """Within this context kernels run with one of ``configurations``."""
        kind, values = config
        return configs.use(**{kind: configs.Config(*values)})


BACKEND = Triton()
