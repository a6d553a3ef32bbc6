"""The memory-bound primitives: launches of the kernels of csrc/cuda; when they can run, and what they take."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import Case, DyCoefficients, Norm, Sums, forced
from fused_resnet.spec import Act, PoolSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ops = torch.ops.fused_resnet_cuda
# Set by tests that have compiled the kernels for a CPU (tests/support/cuda_build.py).
ON_CPU = False


def _built() -> bool:
    """Whether the compiled extension has the operators' CUDA part."""
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key("fused_resnet_cuda::bn_act", "CUDA")
    return found


def unavailable() -> str | None:
    """The reason why no kernel can run here, or None."""
    if os.environ.get("FUSED_RESNET_NO_EXT") == "1":
        return "switched off: FUSED_RESNET_NO_EXT=1"
    try:
        from fused_resnet import _C
    except ImportError as error:
        return f"the compiled extension is not built, or for another torch: {error}"
    if ON_CPU:
        return None
    if not _built():
        return "not built: the compiled extension has no CUDA part (FUSED_RESNET_CUDA=1 at build says what it lacks)"
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    if status := _C.cuda_status():
        major, minor = torch.cuda.get_device_capability()
        built = _C.build_info()["cuda_archs"]
        return f"built for {built}, can't run on this GPU (compute capability {major}.{minor}): {status}"
    return None


def refuse(primitive: str, case: Case) -> str | None:
    """Takes float32, bfloat16, float16 and float64 in channels_last; convolutions of any kind."""
    if case.device == "cpu" and not (ON_CPU and forced() == "cuda"):
        return "runs on CUDA devices, not on cpu"
    if case.device not in ("cpu", "cuda"):
        return f"runs on CUDA devices, not on {case.device}"
    if case.dtype not in _DTYPES:
        return f"takes float32, bfloat16, float16 and float64, not {str(case.dtype).removeprefix('torch.')}"
    if not case.channels_last:
        return "takes channels_last tensors: model.to(memory_format=torch.channels_last)"
    return None


def _act(act: Act) -> tuple[int, float]:
    return act.index, act.param


def _pair(norm: Norm | None) -> list[Tensor]:
    return [norm.scale, norm.shift] if norm is not None else []


def _triple(norm: Norm | None) -> list[Tensor]:
    return [norm.scale, norm.shift, norm.center] if norm is not None else []


def _window(pool: PoolSpec) -> tuple[Any, ...]:
    return pool.kernel, pool.stride, pool.padding


def bn_stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """See ``Primitives.bn_stats``."""
    mean, var = _ops.bn_stats(y)
    return mean, var


def bn_act(
    y: Tensor, norm: Norm, act: Act, residual: Tensor | None = None, residual_norm: Norm | None = None
) -> Tensor:
    """See ``Primitives.bn_act``."""
    out: Tensor = _ops.bn_act(y, _pair(norm), *_act(act), residual, _pair(residual_norm))
    return out


def bn_act_backward(
    dout: Tensor, y: Tensor, norm: Norm, act: Act, residual: Tensor | None = None, residual_norm: Norm | None = None
) -> tuple[Tensor, Sums, Sums | None]:
    """See ``Primitives.bn_act_backward``; dout in y's dtype."""
    dz, *sums = _ops.bn_act_backward(dout, y, _triple(norm), *_act(act), residual, _triple(residual_norm))
    third = residual is not None and residual_norm is not None
    return dz, Sums(sums[0], sums[1]), Sums(sums[0], sums[2]) if third else None


def bn_backward(dz: Tensor, y: Tensor, coef: DyCoefficients) -> Tensor:
    """See ``Primitives.bn_backward``; dz in y's dtype."""
    frozen = coef.b is None or coef.c is None
    dy: Tensor = _ops.bn_backward(dz, y, [coef.a] if frozen else [coef.a, coef.b, coef.c, coef.center])
    return dy


def bn_act_max_pool(y: Tensor, norm: Norm, act: Act, pool: PoolSpec) -> tuple[Tensor, Tensor]:
    """See ``Primitives.bn_act_max_pool``."""
    out, argmax = _ops.bn_act_max_pool(y, _pair(norm), *_act(act), *_window(pool))
    return out, argmax


def bn_act_max_pool_backward(
    dout: Tensor, argmax: Tensor, y: Tensor, norm: Norm, act: Act, pool: PoolSpec
) -> tuple[Tensor, Sums]:
    """See ``Primitives.bn_act_max_pool_backward``; dout in y's dtype."""
    dz, *sums = _ops.bn_act_max_pool_backward(dout, argmax, y, _triple(norm), *_act(act), *_window(pool))
    return dz, Sums(*sums)


def bn_fold(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, conv_bias: Tensor | None, eps: float
) -> Norm:
    """See ``Primitives.bn_fold``."""
    return Norm(*_ops.bn_fold(mean, var, weight, bias, conv_bias, eps))


def bn_coefficients(norm: Norm, sums: Sums, count: int | None) -> tuple[Tensor, DyCoefficients]:
    """See ``Primitives.bn_coefficients``."""
    dgamma, b, c = _ops.bn_coefficients(norm.scale, norm.rstd, *sums, count)
    if count is None:
        return dgamma, DyCoefficients(norm.scale, None, None, norm.center)
    return dgamma, DyCoefficients(norm.scale, b, c, norm.center)
