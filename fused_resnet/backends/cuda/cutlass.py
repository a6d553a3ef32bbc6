"""CUTLASS's convolutions for sm_90a in the place of PyTorch's, between the passes of the ``cuda`` backend.

This module chooses nothing. The planner may try these convolutions (``configurations``) and impose them
(``configured``). Without that every convolution is PyTorch's. csrc/cuda/conv.h lists them; csrc/cuda/conv_sm90.cu
decides which cases they take.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import Call, ConvBiasAct, allow_tf32, library_conv
from fused_resnet.backends.backend import Config
from fused_resnet.base.scoped import scoped
from fused_resnet.spec import Act, ConvSpec

Asked = tuple[str, Tensor, Tensor, ConvSpec]  # kind, x, weight, conv
_ops = torch.ops.fused_resnet_cuda
# A configuration: "cutlass fprop", "cutlass dgrad" or "cutlass wgrad", and the rows and columns of a block's tile.
_imposed: ContextVar[Config | None] = ContextVar("fused_resnet_cutlass_config", default=None)
_asked: ContextVar[list[Asked] | None] = ContextVar("fused_resnet_cutlass_asked", default=None)


def refuse(kind: str, x: Tensor, weight: Tensor, conv: ConvSpec) -> str | None:
    """The reason why CUTLASS can't compute this here, or None.

    Args:
        kind: "fprop"; "dgrad": the gradient of x; "wgrad": the gradient of the weight.
        x: [N, C, H, W], channels_last. weight: [K, C, R, S]. conv: its stride, padding, dilation, groups.
    """
    if not built(x.device.type):
        return "not built: needs nvidia-cutlass and 9.0a in TORCH_CUDA_ARCH_LIST at build"
    if x.is_cuda and (chip := torch.cuda.get_device_capability(x.device)) != (9, 0):
        return f"made for compute capability 9.0 (Hopper), this GPU has {chip[0]}.{chip[1]}"
    if x.dim() != 4:
        return "takes images of two dimensions, not of three"
    if x.dtype == torch.float32 and not allow_tf32(x.dtype):
        return "computes float32 in tf32, which torch.backends.cudnn.conv.fp32_precision does not allow"
    return _ops.conv_why_not(kind, x, weight, *conv.geometry)


def built(device: str) -> bool:
    """Whether the compiled extension contains CUTLASS's convolutions ("cpu": whether a test's stand-in does)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("fused_resnet_cuda::conv_bias_act", device.upper())


class Convolutions(library_conv.Convolutions):
    """See ``library_conv.Convolutions``. CUTLASS's epilogue, where used, applies bias, residual, act and ``add``."""

    def configurations(self, call: Call[Any]) -> list[Config]:
        """CUTLASS's tiles for one of the call's convolutions at a time. Runs the call, to find out which it makes."""
        if not (built("cuda") or built("cpu")):
            return []
        with scoped(_asked, []) as convolutions:
            call.on(self)
        found: list[Config] = []
        for kind, x, weight, conv in convolutions:
            if refuse(kind, x, weight, conv) is None:
                flat = _ops.conv_tiles(kind, x)
                found += [(f"cutlass {kind}", m, n) for m, n in zip(flat[::2], flat[1::2], strict=True)]
        return list(dict.fromkeys(found))

    def configured(self, config: Config) -> AbstractContextManager[Any]:
        """Within this context (and thread) convolutions of one kind run with one of ``configurations``.

        Convolutions that the configuration can't take run as they would without the context.
        """
        return scoped(_imposed, config)

    def conv_bias_act(self, call: ConvBiasAct) -> Tensor:
        y = _fprop(call)
        return super().conv_bias_act(call) if y is None else y

    def convolution(self, x: Tensor, weight: Tensor, conv: ConvSpec) -> Tensor:
        """See ``library_conv.Convolutions``."""
        y = _fprop(ConvBiasAct(x, weight, None, conv, Act("identity"), None))
        return super().convolution(x, weight, conv) if y is None else y

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
        """See ``library_conv.Convolutions``; the weight's gradient is in float32."""
        dx = dw = None
        if needs[0]:
            dx = _run(
                ("dgrad", x, weight, conv),
                lambda tile: _ops.conv_backward_input(dy, weight, x.shape[2:], *conv.geometry, add, tile),
            )
        if needs[1]:
            dw = _run(
                ("wgrad", x, weight, conv),
                lambda tile: _ops.conv_backward_weight(dy, x, weight.shape[2:], *conv.geometry, tile),
            )
        left = (needs[0] and dx is None, needs[1] and dw is None)
        if any(left):
            others = super().gradients(dy, x, weight, conv, left, add, spare)
            dx, dw = others[0] if left[0] else dx, others[1] if left[1] else dw
        return dx, dw


def _fprop(call: ConvBiasAct) -> Tensor | None:
    x, weight, conv, act = call.x, call.weight, call.conv, call.act
    return _run(
        ("fprop", x, weight, conv),
        lambda tile: _ops.conv_bias_act(
            x, library_conv.as_operand(weight, x), call.bias, *conv.geometry, *act.numbers,
            call.residual, tile,
        ),
    )  # fmt: skip


def _run(asked: Asked, launch: Callable[[tuple[int, ...]], Tensor | None]) -> Tensor | None:
    """``launch(tile)`` if a tile is imposed on this kind of convolution and can take it, else None."""
    if (convolutions := _asked.get()) is not None:
        convolutions.append(asked)
    kind, x, *_ = asked
    config = _imposed.get()
    if config is None or config[0] != f"cutlass {kind}" or x.dim() != 4:
        return None
    if x.dtype == torch.float32 and not allow_tf32(x.dtype):
        return None
    return launch(config[1:])  # None: the batch, another than the measured one, is too large or empty
