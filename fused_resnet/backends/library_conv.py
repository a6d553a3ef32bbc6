"""PyTorch's own convolutions (cuDNN, MIOpen, oneDNN) between our memory-bound passes.

Passes before and after a convolution do the work of its prologue and epilogue. This beats a fused convolution wherever
the library's convolution is faster than ours by more than the passes cost. All backends that have the passes share this
composition. A backend that also has plain convolutions overrides ``convolution`` and ``gradients``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet.backends import Backend, Norm, primitives, vector_dtype
from fused_resnet.base.layouts import layout_of
from fused_resnet.reference import CONV
from fused_resnet.spec import Act, ConvSpec

_IDENTITY = Act("identity")


class Convolutions(Backend):
    """The convolution primitives of images and volumes, by PyTorch's convolutions and the passes of a backend.

    Results have the operands' dtype and layout. The convolutions run in the dtype that ``compute_dtype`` gives.
    """

    @property
    def passes(self) -> Backend:
        """The backend whose ``bn_act``, ``bn_act_backward``, ``bn_backward`` and ``bn_stats`` run: itself."""
        return self

    def conv_bias_act(self, call: primitives.ConvBiasAct) -> Tensor:
        y = self.convolution(call.x, call.weight, call.conv)
        if call.bias is None and call.act == _IDENTITY and call.residual is None:
            return y
        wide = vector_dtype(y.dtype)
        one = torch.ones(y.shape[1], dtype=wide, device=y.device)
        shift = torch.zeros_like(one) if call.bias is None else call.bias.to(wide)
        return primitives.BnAct(y, Norm(one, shift, one, one), call.act, call.residual).on(self.passes)

    def conv_stats(self, call: primitives.ConvStats) -> tuple[Tensor, Tensor | None, Tensor | None]:
        a = call.x if call.prologue is None else primitives.BnAct(call.x, *call.prologue).on(self.passes)
        y = self.convolution(a, call.weight, call.conv)
        return (y, *primitives.BnStats(y).on(self.passes)) if call.stats else (y, None, None)

    def conv_backward(self, call: primitives.ConvBackward) -> primitives.Gradients:
        x, weight, add = call.x, call.weight, call.add
        # only the weight's gradient needs the input's values
        a = x if call.prologue is None or not call.need_weight else primitives.BnAct(x, *call.prologue).on(self.passes)
        dy = primitives.BnBackward(call.dz, call.y, call.coef).on(self.passes)
        spare = add is not None and not add.is_set_to(call.dz)
        needs = (call.need_input, call.need_weight)
        dy, a = (t.to(self.compute_dtype(x.dtype)) for t in (dy, a))
        da, dw = self.gradients(dy, a, as_operand(weight, a), call.conv, needs, add, spare)
        dw = None if dw is None else dw.to(weight.dtype)
        if da is None:
            return None, dw, None, None
        da, closing = da.to(x.dtype), call.before
        if closing is None:
            return da, dw, None, None
        da = da.contiguous(memory_format=layout_of(x))
        previous, sums, summand_sums = primitives.BnActBackward(da, *closing).on(self.passes)
        return previous, dw, sums, summand_sums

    def convolution(self, x: Tensor, weight: Tensor, conv: ConvSpec) -> Tensor:
        """conv(x, W); W of any dtype."""
        a = x.to(self.compute_dtype(x.dtype))
        y = CONV[x.dim()](a, as_operand(weight, a), None, *conv.geometry)
        return y.to(x.dtype).contiguous(memory_format=layout_of(x))

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
            dy, x, weight, None, conv.stride, conv.padding, conv.dilation, False, [0] * len(conv.stride), conv.groups,
            (*needs, False),
        )  # fmt: skip
        if needs[0] and add is not None:
            dx = add.add_(dx) if spare else dx.add_(add)
        return dx if needs[0] else None, dw if needs[1] else None


def as_operand(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the dtype and the layout in which a convolution of x takes it."""
    return weight.to(x.dtype, memory_format=layout_of(x))
