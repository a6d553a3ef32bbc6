"""PyTorch's own convolutions (cuDNN, MIOpen) between memory-bound passes of ours: what a convolution's prologue and
epilogue would do happens in passes before and after it.

The strongest rival of a fused convolution wherever the library's is faster than ours by more than those passes cost.
One composition for every backend that has the passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import Closing, DyCoefficients, Norm, Prologue, Sums, vector_dtype
from fused_resnet.spec import Act, ConvSpec

_IDENTITY = Act("identity")


class Convolutions:
    """``conv_bias_act``, ``conv_stats`` and ``conv_backward`` of ``Primitives``, of channels_last tensors.

    Args:
        passes: a module with ``bn_act``, ``bn_act_backward``, ``bn_backward`` and ``bn_stats``.
    """

    def __init__(self, passes: Any) -> None:
        self.passes = passes

    def conv_bias_act(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvSpec, act: Act, residual: Tensor | None
    ) -> Tensor:
        """See ``Primitives.conv_bias_act``."""
        y = _conv(x, weight, conv)
        if bias is None and act == _IDENTITY and residual is None:
            return y
        wide = vector_dtype(y.dtype)
        one = torch.ones(y.shape[1], dtype=wide, device=y.device)
        shift = torch.zeros_like(one) if bias is None else bias.to(wide)
        out: Tensor = self.passes.bn_act(y, Norm(one, shift, one, one), act, residual)
        return out

    def conv_stats(
        self, x: Tensor, weight: Tensor, conv: ConvSpec, prologue: Prologue | None, stats: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See ``Primitives.conv_stats``."""
        y = _conv(x if prologue is None else self.passes.bn_act(x, *prologue), weight, conv)
        return (y, *self.passes.bn_stats(y)) if stats else (y, None, None)

    def conv_backward(
        self,
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
        a = x if prologue is None or not need_weight else self.passes.bn_act(x, *prologue)
        da, dw, _ = torch.ops.aten.convolution_backward(
            self.passes.bn_backward(dz, y, coef), a, weight.to(x.dtype, memory_format=torch.channels_last), None,
            conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups, (need_input, need_weight, False),
        )  # fmt: skip
        dw = dw.to(weight.dtype) if need_weight else None
        if not need_input:
            return None, dw, None, None
        if add is not None:
            da = da.add_(add) if add.is_set_to(dz) else add.add_(da)
        closing = Closing.before(x, prologue, closing)
        if closing is None:
            return da, dw, None, None
        da = da.contiguous(memory_format=torch.channels_last)
        previous, sums, summand_sums = self.passes.bn_act_backward(da, *closing)
        return previous, dw, sums, summand_sums


def _conv(x: Tensor, weight: Tensor, conv: ConvSpec) -> Tensor:
    weight = weight.to(x.dtype, memory_format=torch.channels_last)
    y = torch.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return y.contiguous(memory_format=torch.channels_last)
