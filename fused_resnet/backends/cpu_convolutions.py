"""The algorithms that the CPU backend has for convolutions of inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends import loaded, primitives
from fused_resnet.backends.cpu_compute import compute_dtype, exact_products
from fused_resnet.backends.cpu_steps import POST_OPS, identity, needs_pass, scalars
from fused_resnet.base.layouts import layout_of
from fused_resnet.spec import Act, ConvSpec, PoolSpec

_ops, _mkldnn = torch.ops.fused_resnet_cpu, torch.ops.mkldnn
_NO_POOL = PoolSpec.make(1)


class Convolution(NamedTuple):
    """An algorithm for the convolutions of inference.

    Attributes:
        name: what ``explain`` calls it; the first word names the step of a recorded row. suits: whether it can run the
            call. takes: whether it is expected to be the fastest; asked only where nothing is measured. pack: packs the
            call's weight. layout: a packed weight's layout, which may depend on x; None: there is one.
        run: (call, packed weight, owned, exact) -> the result. ``owned``: it may overwrite the residual. ``exact``: NaN
            goes where PyTorch's activations send it.
    """

    name: str
    suits: Callable[[primitives.ConvBiasAct], bool]
    takes: Callable[[primitives.ConvBiasAct], bool]
    pack: Callable[[primitives.ConvBiasAct], Tensor]
    layout: Callable[[Tensor], bytes] | None
    run: Callable[[primitives.ConvBiasAct, Tensor, bool, bool], Tensor]


def _in_float(call: primitives.ConvBiasAct) -> bool:
    return compute_dtype(call.x.dtype) == torch.float32 and exact_products()


def _free(call: primitives.ConvBiasAct) -> bool:
    """Whether an algorithm of our own may be as fast as others: not if the user lets float32 lose precision."""
    return call.x.dtype != torch.float32 or exact_products()


def _suits_winograd(call: primitives.ConvBiasAct) -> bool:
    return _free(call) and _ops.winograd_suits(call.x, call.weight, *call.conv.geometry)


def _suits_gemm(call: primitives.ConvBiasAct) -> bool:
    return _free(call) and _ops.gemm_suits(call.x, call.weight, call.conv.groups)


def _suits_depthwise(call: primitives.ConvBiasAct) -> bool:
    return _free(call) and _ops.depthwise_suits(call.x, call.weight, call.conv.groups)


def _suits_grouped(call: primitives.ConvBiasAct) -> bool:
    return _free(call) and _ops.grouped_suits(call.x, call.weight, call.conv.dilation, call.conv.groups)


def _suits_stem(call: primitives.ConvBiasAct) -> bool:
    conv = call.conv
    suits = _free(call) and _ops.stem_suits(call.x, call.weight, conv.dilation, conv.groups, _NO_POOL.kernel)
    return suits and call.residual is None


def is_pointwise(weight: Tensor, conv: ConvSpec) -> bool:
    alone = weight.shape[2:] == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    return alone and weight.shape[1] % 2 == 0  # products of bfloat16 take pairs


def is_depthwise(weight: Tensor, conv: ConvSpec) -> bool:
    return conv.groups == weight.shape[0] and weight.shape[1] == 1


def _takes_gemm(call: primitives.ConvBiasAct) -> bool:
    return _in_float(call) and _suits_gemm(call) and call.weight.shape[2:] == (1, 1) and call.conv.stride == (1, 1)


def _winograd(call: primitives.ConvBiasAct, packed: Tensor, owned: bool, exact: bool) -> Tensor:
    return _ops.winograd_bias_act(call.x, packed, call.bias, call.conv.padding[0], *call.act.numbers, call.residual)


def _by_product(call: primitives.ConvBiasAct, packed: Tensor, owned: bool, exact: bool) -> Tensor:
    x, conv, out = call.x, call.conv, call.residual
    if out is None or not owned:
        shape = conv.out_shape(x.shape, call.weight.shape)
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    _ops.gemm_bias_act(x, packed, call.bias, *conv.geometry[:3], *call.act.numbers, call.residual, out)
    return out


def stem(call: primitives.ConvBiasAct, packed: Tensor, pool: PoolSpec) -> Tensor:
    """The convolution with its max-pool; its output is never written to memory."""
    return _ops.stem_bias_act_max_pool(
        call.x, packed, call.bias, call.conv.stride, call.conv.padding, *call.act.numbers, *pool.window,
    )  # fmt: skip


def _stem(call: primitives.ConvBiasAct, packed: Tensor, owned: bool, exact: bool) -> Tensor:
    return stem(call, packed, _NO_POOL)


def _depthwise(call: primitives.ConvBiasAct, packed: Tensor, owned: bool, exact: bool) -> Tensor:
    where = call.conv.geometry[:3]
    return _ops.depthwise_bias_act(call.x, packed, call.bias, *where, *call.act.numbers, call.residual)


def _grouped(call: primitives.ConvBiasAct, packed: Tensor, owned: bool, exact: bool) -> Tensor:
    where = call.conv.geometry[:2]
    return _ops.grouped_bias_act(call.x, packed, call.bias, *where, *call.act.numbers, call.residual)


def _onednn_weight(call: primitives.ConvBiasAct) -> Tensor:
    x, conv = call.x, call.conv
    return _mkldnn._reorder_convolution_weight(
        call.weight.to(compute_dtype(x.dtype)), conv.padding, conv.stride, conv.dilation, conv.groups, list(x.shape)
    )


def _onednn_layout(packed: Tensor) -> bytes:
    """oneDNN's description of a tensor's layout, without its uninitialised bytes.

    It is int ndims, int64 dims[12], int data_type, 4 bytes of uninitialised padding, and the rest. If a later version
    has another structure, equal layouts compare as different, and weights are kept twice.
    """
    description = _mkldnn._get_mkldnn_serialized_md(packed).numpy(force=True).tobytes()
    return bytes(description[:108] + description[112:])


def _onednn(call: primitives.ConvBiasAct, packed: Tensor, owned: bool, exact: bool) -> Tensor:
    x, bias, act, residual = call.x, call.bias, call.act, call.residual
    assert bias is not None
    # oneDNN's relu turns NaN into 0: acceptable for a frozen model (docs/limits.md says so), not in training
    if (exact and act.name != "identity") or needs_pass(act, residual is not None):
        y = _onednn(call.replace(act=Act("identity"), residual=None), packed, False, False)
        return primitives.BnAct(y, identity(bias.numel(), y.dtype), act, residual).on(loaded("cpu"))
    y = _with_post_ops(call, packed, owned)
    return y.to(x.dtype).contiguous(memory_format=layout_of(x))


def _with_post_ops(call: primitives.ConvBiasAct, packed: Tensor, owned: bool) -> Tensor:
    compute, conv, act = compute_dtype(call.x.dtype), call.conv, call.act
    assert call.bias is not None
    x, bias = call.x.to(compute), call.bias.to(compute)
    where = (conv.padding, conv.stride, conv.dilation, conv.groups)
    if call.residual is None:
        name = POST_OPS[act.name][0]
        return _mkldnn._convolution_pointwise(x, packed, bias, *where, name, scalars(act), "")
    unary = "relu" if act.name == "relu" else None
    r = call.residual.to(compute)
    if owned or r is not call.residual:
        y = _mkldnn._convolution_pointwise_.binary(r, x, packed, bias, *where, "add", 1.0, unary, [], "")
    else:
        y = _mkldnn._convolution_pointwise.binary(x, r, packed, bias, *where, "add", 1.0, unary, [], "")
    return y


# Where nothing is measured, the first that takes a call runs it. Which instruction sets an algorithm is for is part of
# what suits it.
CONVOLUTIONS = (
    Convolution(
        "winograd",
        _suits_winograd,
        lambda call: _in_float(call) and _ops.winograd_tile(call.x, call.weight, *call.conv.geometry) == 4,
        lambda call: _ops.winograd_prepack(call.weight, 4),
        None,
        _winograd,
    ),
    Convolution(
        "winograd F(2x2)",
        _suits_winograd,
        lambda call: False,
        lambda call: _ops.winograd_prepack(call.weight, 2),
        None,
        _winograd,
    ),
    Convolution("gemm", _suits_gemm, _takes_gemm, lambda call: _ops.gemm_prepack(call.weight), None, _by_product),
    Convolution(
        "depthwise",
        _suits_depthwise,
        _suits_depthwise,
        lambda call: _ops.depthwise_prepack(call.weight),
        None,
        _depthwise,
    ),
    Convolution(
        "grouped",
        _suits_grouped,
        lambda call: False,
        lambda call: _ops.grouped_prepack(call.weight, call.conv.groups),
        None,
        _grouped,
    ),
    Convolution("stem", _suits_stem, lambda call: False, lambda call: _ops.stem_prepack(call.weight), None, _stem),
    Convolution("onednn", lambda call: True, lambda call: True, _onednn_weight, _onednn_layout, _onednn),
)
BY_NAME = {convolution.name: convolution for convolution in CONVOLUTIONS}
