"""The compiled CUDA backend: csrc/cuda, NHWC, NVIDIA sm_80 and up; no warm-up, no compiler at run time.

The memory-bound primitives are our kernels (``passes``). The convolutions between them are PyTorch's (cuDNN), or
CUTLASS's (``cutlass``) if these are built in and the planner has measured them to be faster.
"""

from __future__ import annotations

from fused_resnet.backends.cuda import passes
from fused_resnet.backends.cuda.cutlass import Convolutions, configurations, configured
from fused_resnet.backends.cuda.passes import (
    bn_act,
    bn_act_backward,
    bn_act_max_pool,
    bn_act_max_pool_backward,
    bn_backward,
    bn_coefficients,
    bn_fold,
    bn_stats,
    refuse,
    unavailable,
)

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

_convolutions = Convolutions(passes)
conv_bias_act = _convolutions.conv_bias_act
conv_stats = _convolutions.conv_stats
conv_backward = _convolutions.conv_backward
