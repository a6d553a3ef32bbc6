"""PyTorch's own convolutions (cuDNN, MIOpen) between passes of ours: what a convolution's prologue and epilogue would
do happens in memory-bound Triton kernels before and after it.

The strongest rival of a fused convolution wherever the library's is faster than ours by more than those passes cost.
The memory-bound primitives themselves are the triton backend's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet.backends import Case, Closing, DyCoefficients, Norm, Prologue, Sums, forced, triton
from fused_resnet.backends.triton import INTERPRET, bn_act, bn_act_backward, bn_backward, bn_stats
from fused_resnet.spec import Act, ConvSpec

__all__ = ["INTERPRET", "conv_backward", "conv_bias_act", "conv_stats", "refuse", "unavailable"]
_IDENTITY = Act("identity")


def unavailable() -> str | None:
    """Where Triton's kernels can't run, neither can the passes."""
    return triton.unavailable()


def refuse(primitive: str, case: Case) -> str | None:
    """What the passes can't take; convolutions of any kind are taken."""
    if case.device == "cpu" and not (INTERPRET and forced() == "cudnn"):
        return "on a CPU only in Triton's interpreter (TRITON_INTERPRET=1) and by use_backend('cudnn')"
    return triton.refuse_pass(case)


def _conv(x: Tensor, weight: Tensor, conv: ConvSpec) -> Tensor:
    weight = weight.to(x.dtype, memory_format=torch.channels_last)
    y = torch.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return y.contiguous(memory_format=torch.channels_last)


def conv_bias_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvSpec, act: Act, residual: Tensor | None
) -> Tensor:
    """See ``Primitives.conv_bias_act``."""
    y = _conv(x, weight, conv)
    if bias is None and act == _IDENTITY and residual is None:
        return y
    one = torch.ones(y.shape[1], device=y.device)
    shift = torch.zeros_like(one) if bias is None else bias.float()
    return bn_act(y, Norm(one, shift, one, one), act, residual)


def conv_stats(
    x: Tensor, weight: Tensor, conv: ConvSpec, prologue: Prologue | None, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``Primitives.conv_stats``."""
    y = _conv(x if prologue is None else bn_act(x, *prologue), weight, conv)
    return (y, *bn_stats(y)) if stats else (y, None, None)


def conv_backward(
    dz: Tensor,
    y: Tensor,
    coef: DyCoefficients,
    x: Tensor,
    prologue: Prologue | None,
    weight: Tensor,
    conv: ConvSpec,
    need_input: bool,
    need_weight: bool,
    add: Tensor | None,
    closing: Closing | None = None,
) -> tuple[Tensor | None, Tensor | None, Sums | None, Sums | None]:
    """See ``Primitives.conv_backward``."""
    # the input's values matter to the weight's gradient only
    a = x if prologue is None or not need_weight else bn_act(x, *prologue)
    da, dw, _ = torch.ops.aten.convolution_backward(
        bn_backward(dz, y, coef), a, weight.to(x.dtype, memory_format=torch.channels_last), None, conv.stride,
        conv.padding, conv.dilation, False, (0, 0), conv.groups, (need_input, need_weight, False),
    )  # fmt: skip
    dw = dw.to(weight.dtype) if need_weight else None
    if not need_input:
        return None, dw, None, None
    if add is not None:
        da = da.add_(add) if add.is_set_to(dz) else add.add_(da)
    closing = Closing.before(x, prologue, closing)
    if closing is None:
        return da, dw, None, None
    previous, sums, summand_sums = bn_act_backward(da.contiguous(memory_format=torch.channels_last), *closing)
    return previous, dw, sums, summand_sums
