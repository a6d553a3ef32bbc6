"""PyTorch's own convolutions (cuDNN, MIOpen) between our memory-bound passes.

Passes before and after a convolution do the work of its prologue and epilogue. This beats a fused convolution wherever
the library's convolution is faster than ours by more than the passes cost. All backends that have the passes share this
composition. A backend that also has plain convolutions overrides ``convolution`` and ``gradients``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import Closing, DyCoefficients, Norm, Prologue, Sums, vector_dtype
from fused_resnet.spec import Act, ConvSpec

_IDENTITY = Act("identity")


class Convolutions:
    """``conv_bias_act``, ``conv_stats`` and ``conv_backward`` of ``Primitives``, for channels_last tensors.

    Args:
        passes: a module with ``bn_act``, ``bn_act_backward``, ``bn_backward`` and ``bn_stats``.
    """

    def __init__(self, passes: Any) -> None:
        self.passes = passes

    def conv_bias_act(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvSpec, act: Act, residual: Tensor | None
    ) -> Tensor:
        """See ``Primitives.conv_bias_act``."""
        y = self.convolution(x, weight, conv)
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
        y = self.convolution(x if prologue is None else self.passes.bn_act(x, *prologue), weight, conv)
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
        # only the weight's gradient needs the input's values
        a = x if prologue is None or not need_weight else self.passes.bn_act(x, *prologue)
        dy = self.passes.bn_backward(dz, y, coef)
        spare = add is not None and not add.is_set_to(dz)
        da, dw = self.gradients(dy, a, as_operand(weight, x.dtype), conv, (need_input, need_weight), add, spare)
        dw = None if dw is None else dw.to(weight.dtype)
        if da is None:
            return None, dw, None, None
        closing = Closing.before(x, prologue, closing)
        if closing is None:
            return da, dw, None, None
        da = da.contiguous(memory_format=torch.channels_last)
        previous, sums, summand_sums = self.passes.bn_act_backward(da, *closing)
        return previous, dw, sums, summand_sums

    def convolution(self, x: Tensor, weight: Tensor, conv: ConvSpec) -> Tensor:
        """conv(x, W), channels_last; W of any dtype."""
        y = torch.conv2d(
            x, as_operand(weight, x.dtype), None, conv.stride, conv.padding, conv.dilation, conv.groups
        )  # fmt: skip
        return y.contiguous(memory_format=torch.channels_last)

    def gradients(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        conv: ConvSpec,
        needs: tuple[bool, bool],
        add: Tensor | None,
        spare: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of a plain convolution that ``needs`` names: the input's + add, and the weight's.

        Their dtype is x's or wider. ``spare``: add may be overwritten.
        """
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups, (*needs, False)
        )
        if needs[0] and add is not None:
            dx = add.add_(dx) if spare else dx.add_(add)
        return dx if needs[0] else None, dw if needs[1] else None


def as_operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the layout that a convolution of channels_last tensors takes."""
    return weight.to(dtype, memory_format=torch.channels_last)
