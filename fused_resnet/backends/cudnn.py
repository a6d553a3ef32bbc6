"""PyTorch's own convolutions between Triton's memory-bound passes; the memory-bound primitives themselves are the
triton backend's."""

from __future__ import annotations

from fused_resnet.backends import Case, forced, triton
from fused_resnet.backends.library_conv import Convolutions
from fused_resnet.backends.triton import INTERPRET

__all__ = ["INTERPRET", "conv_backward", "conv_bias_act", "conv_stats", "refuse", "unavailable"]

_convolutions = Convolutions(triton)
conv_bias_act = _convolutions.conv_bias_act
conv_stats = _convolutions.conv_stats
conv_backward = _convolutions.conv_backward


def unavailable() -> str | None:
    """Where Triton's kernels can't run, neither can the passes."""
    return triton.unavailable()


def refuse(primitive: str, case: Case) -> str | None:
    """What the passes can't take; convolutions of any kind are taken."""
    if case.device == "cpu" and not (INTERPRET and forced() == "cudnn"):
        return "on a CPU only in Triton's interpreter (TRITON_INTERPRET=1) and by use_backend('cudnn')"
    return triton.refuse_pass(case)
