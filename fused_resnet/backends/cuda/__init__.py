"""The compiled CUDA backend: csrc/cuda, NHWC, NVIDIA sm_80 and up; no warm-up, no compiler at run time.

The memory-bound primitives are our kernels (``passes``). The convolutions between them are PyTorch's (cuDNN), or
CUTLASS's (``cutlass``) if these are built in and the planner has measured them to be faster.
"""

from __future__ import annotations

from fused_resnet.backends.cuda.cutlass import Convolutions
from fused_resnet.backends.cuda.passes import Passes


class Cuda(Passes, Convolutions):
    """Takes float32, bfloat16, float16 and float64 in channels_last; convolutions of any kind."""

    name = "cuda"


BACKEND = Cuda()
