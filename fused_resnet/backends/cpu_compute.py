"""The dtype in which the CPU backend computes convolutions."""

from __future__ import annotations

import os
import time
from functools import lru_cache

import torch

from fused_resnet.base.locks import Lock

# oneDNN's names of the dtypes that only some CPUs compute in
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_mkldnn = torch.ops.mkldnn


@lru_cache
def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which convolutions of ``dtype`` are computed here.

    For 16-bit tensors this is float32 if a float32 convolution is faster, as on a CPU without a 16-bit matrix unit. One
    convolution is timed in both dtypes, once per process. FUSED_RESNET_CPU_COMPUTE=float32 or native overrides the
    timing, except for a dtype that oneDNN can't compute in here.
    """
    wish = os.environ.get("FUSED_RESNET_CPU_COMPUTE", "auto")
    if wish not in ("auto", "float32", "native"):
        raise ValueError(f"FUSED_RESNET_CPU_COMPUTE: expected auto, float32 or native, got {wish!r}")
    if dtype not in _NAMES:
        return dtype
    computes = getattr(_mkldnn, f"_is_mkldnn_{_NAMES[dtype]}_supported", lambda: False)
    if wish == "float32" or not computes():
        return torch.float32
    if wish == "native":
        return dtype
    with _timing.held():  # concurrent threads get one answer, and their timings do not overlap
        return _faster(dtype)


_timing = Lock()


@lru_cache
def _faster(dtype: torch.dtype) -> torch.dtype:
    return dtype if _seconds(dtype) < 0.9 * _seconds(torch.float32) else torch.float32


def _seconds(dtype: torch.dtype) -> float:
    """The time of the fastest of five 3x3 convolutions of 128 channels at 28x28."""
    with torch.no_grad():
        x = torch.ones(2, 128, 28, 28, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.ones(128, 128, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            torch.conv2d(x, w, None, 1, 1)
            times.append(time.perf_counter() - start)
    return min(times[1:])


def exact_products() -> bool:
    """Whether a 1x1 convolution may run as a matrix product: not if the user lets products lose precision."""
    return torch.get_float32_matmul_precision() == "highest"
