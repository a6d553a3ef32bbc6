"""PyTorch's own convolutions between Triton's memory-bound passes.

The triton backend serves the memory-bound primitives.
"""

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
    """The reason why Triton's kernels can't run, or None: the passes are Triton's."""
    return triton.unavailable()


def refuse(primitive: str, case: Case) -> str | None:
    """The reason why the passes refuse the case, or None. Every convolution is taken."""
    if case.device == "cpu" and not (INTERPRET and forced() == "cudnn"):
        return "on a CPU only in Triton's interpreter (TRITON_INTERPRET=1) and by use_backend('cudnn')"
    return triton.refuse_pass(case)
