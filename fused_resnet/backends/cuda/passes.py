"""The memory-bound primitives launch the kernels of csrc/cuda. ``refuse`` gives the cases that these do not take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import Backend, Call, Case, forced, primitives
from fused_resnet.backends.values import DyCoefficients, Norm, Sums, vectors_of
from fused_resnet.base import library

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ops = torch.ops.fused_resnet_cuda
# Tests that compile the kernels for a CPU set this (tests/support/cuda_build.py).
ON_CPU = False


def _built() -> bool:
    """Whether the compiled extension contains the CUDA operators."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("fused_resnet_cuda::bn_act", "CUDA")


class Passes(Backend):
    """The memory-bound primitives of the ``cuda`` backend."""

    def unavailable(self) -> str | None:
        """The reason why no kernel can run here, or None."""
        if reason := library.unavailable():
            return reason
        if ON_CPU:
            return None
        if not _built():
            return (
                "not built: the compiled extension has no CUDA part (FUSED_RESNET_CUDA=1 at build says what it lacks)"
            )
        if not torch.cuda.is_available():
            return "no GPU: torch.cuda.is_available() is False"
        if status := library.cuda_status():
            major, minor = torch.cuda.get_device_capability()
            built = library.build_info()["cuda_archs"]
            return f"built for {built}, can't run on this GPU (compute capability {major}.{minor}): {status}"
        return None

    def refuse(self, primitive: type[Call[Any]], case: Case) -> str | None:
        """The reason why this case is refused, or None."""
        if case.device == "cpu" and not (ON_CPU and forced() == "cuda"):
            return "runs on CUDA devices, not on cpu"
        if case.device not in ("cpu", "cuda"):
            return f"runs on CUDA devices, not on {case.device}"
        if case.dtype not in _DTYPES:
            return f"takes float32, bfloat16, float16 and float64, not {str(case.dtype).removeprefix('torch.')}"
        if not case.channels_last:
            return "takes channels_last tensors: model.to(memory_format=torch.channels_last)"
        return None

    def bn_stats(self, call: primitives.BnStats) -> tuple[Tensor, Tensor]:
        mean, var = _ops.bn_stats(call.y)
        return mean, var

    def bn_act(self, call: primitives.BnAct) -> Tensor:
        return _ops.bn_act(
            call.y, vectors_of(call.norm, 2), *call.act.numbers, call.residual, vectors_of(call.residual_norm, 2)
        )

    def bn_act_backward(self, call: primitives.BnActBackward) -> tuple[Tensor, Sums, Sums | None]:
        """dout in y's dtype."""
        dz, *sums = _ops.bn_act_backward(
            call.dout, call.y, vectors_of(call.norm, 3), *call.act.numbers, call.residual,
            vectors_of(call.residual_norm, 3),
        )  # fmt: skip
        third = call.residual is not None and call.residual_norm is not None
        return dz, Sums(sums[0], sums[1]), Sums(sums[0], sums[2]) if third else None

    def bn_backward(self, call: primitives.BnBackward) -> Tensor:
        """dz in y's dtype."""
        return _ops.bn_backward(call.dz, call.y, call.coef.vectors)

    def bn_act_max_pool(self, call: primitives.BnActMaxPool) -> tuple[Tensor, Tensor]:
        out, argmax = _ops.bn_act_max_pool(call.y, vectors_of(call.norm, 2), *call.act.numbers, *call.pool.window)
        return out, argmax

    def bn_act_max_pool_backward(self, call: primitives.BnActMaxPoolBackward) -> tuple[Tensor, Sums]:
        """dout in y's dtype."""
        dz, *sums = _ops.bn_act_max_pool_backward(
            call.dout, call.argmax, call.y, vectors_of(call.norm, 3), *call.act.numbers, *call.pool.window
        )
        return dz, Sums(*sums)

    def bn_fold(self, call: primitives.BnFold) -> Norm:
        return Norm(*_ops.bn_fold(call.mean, call.var, call.weight, call.bias, call.conv_bias, call.eps))

    def bn_coefficients(self, call: primitives.BnCoefficients) -> tuple[Tensor, DyCoefficients]:
        norm = call.norm
        dgamma, b, c = _ops.bn_coefficients(norm.scale, norm.rstd, *call.sums, call.count)
        if call.count is None:
            return dgamma, DyCoefficients(norm.scale, None, None, norm.center)
        return dgamma, DyCoefficients(norm.scale, b, c, norm.center)
