"""Convolutions of volumes on a CPU: oneDNN's, between the passes of csrc/cpu."""

from __future__ import annotations

from torch import Tensor

from fused_resnet.backends import Backend, loaded, primitives
from fused_resnet.backends.cpu_compute import compute_dtype
from fused_resnet.backends.library_conv import Convolutions
from fused_resnet.spec import ConvSpec


class Volumes(Convolutions):
    """The convolution primitives of the ``cpu`` backend for [N, C, D, H, W].

    16-bit volumes are convolved in the dtype that ``compute_dtype`` gives.
    """

    name = "cpu"

    @property
    def passes(self) -> Backend:
        return loaded("cpu")

    def conv_bn_act(self, call: primitives.ConvBnAct) -> Tensor:
        y = self.convolution(call.x, call.weight, call.conv)
        return primitives.BnAct(y, call.norm, call.act, call.residual).on(self.passes)

    def convolution(self, x: Tensor, weight: Tensor, conv: ConvSpec) -> Tensor:
        return super().convolution(x.to(compute_dtype(x.dtype)), weight, conv).to(x.dtype)

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
        compute = compute_dtype(x.dtype)
        if compute == x.dtype:
            return super().gradients(dy, x, weight, conv, needs, add, spare)
        dy, a, weight = (t.to(compute) for t in (dy, x, weight))
        dx, dw = super().gradients(dy, a, weight, conv, needs, None if add is None else add.to(compute), True)
        return None if dx is None else dx.to(x.dtype), dw


VOLUMES = Volumes()
