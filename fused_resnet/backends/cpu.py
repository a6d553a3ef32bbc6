"""The compiled CPU backend: csrc/cpu, loops over csrc/bn_math.h between oneDNN's convolutions.

On a CPU without a fast 16-bit matrix unit, 16-bit convolutions are slower than float32 ones, so they are computed in
float32. The tensors between units stay 16-bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends import Case, Closing, DyCoefficients, Norm, Prologue, Sums, warn_once
from fused_resnet.base.locks import Lock
from fused_resnet.spec import Act, ConvSpec, PoolSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# oneDNN's names of the dtypes that only some CPUs compute in
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# oneDNN's names of the activations that its convolutions can apply: (name, scalars)
_POST_OPS = {
    "identity": ("none", ()),
    "relu": ("relu", ()),
    "leaky_relu": ("leaky_relu", ("param",)),
    "sigmoid": ("sigmoid", ()),
    "silu": ("swish", ()),
    "relu6": ("hardtanh", (0.0, 6.0)),
    "hardswish": ("hardswish", ()),
}
_ops, _mkldnn = torch.ops.fused_resnet_cpu, torch.ops.mkldnn


def unavailable() -> str | None:
    """The reason why the extension can't be used, or None."""
    if os.environ.get("FUSED_RESNET_NO_EXT") == "1":
        reason = "switched off: FUSED_RESNET_NO_EXT=1"
    else:
        try:
            from fused_resnet import _C  # noqa: F401

            return None
        except ImportError as error:
            reason = f"the compiled extension is not built: {error}"
    warn_once(f"fused_resnet runs without its compiled extension, which costs speed on a CPU ({reason})")
    return reason


def refuse(primitive: str, case: Case) -> str | None:
    """Takes float32, bfloat16, float16 and float64 on the CPU."""
    if case.device != "cpu":
        return f"tensors are on {case.device}, not on the CPU"
    if case.dtype not in _DTYPES:
        return f"dtype {case.dtype}"
    return None


# ---------------------------------------------------------------------------------------------------- compute dtype
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


def _gemm() -> bool:
    """Whether a 1x1 convolution may run as a matrix product: not if the user lets products lose precision."""
    return torch.get_float32_matmul_precision() == "highest"


def _act(act: Act) -> tuple[int, float]:
    return act.index, act.param


def _pair(norm: Norm | None) -> list[Tensor]:
    return [norm.scale, norm.shift] if norm is not None else []


def _triple(norm: Norm | None) -> list[Tensor]:
    return [norm.scale, norm.shift, norm.center] if norm is not None else []


def _coef(c: DyCoefficients) -> list[Tensor]:
    return [c.a] if c.b is None or c.c is None else [c.a, c.b, c.c, c.center]


# ---------------------------------------------------------------------------------------------------- primitives
class Packed(NamedTuple):
    """A weight in the layout of the convolution that uses it: oneDNN's, Winograd's or our own for 1x1."""

    weight: Tensor
    kind: Literal["onednn", "winograd", "pointwise"]


def prepack(weight: Tensor, conv: ConvSpec, x: Tensor, known: Sequence[Any] = ()) -> Packed | None:
    """The weight packed for inputs like x; None for float64, which is not packed.

    If one of ``known`` (packed earlier, for other inputs) has the same layout, that one is returned.
    """
    if weight.dtype == torch.float64:
        return None
    where = (conv.stride, conv.padding, conv.dilation, conv.groups)
    others = [form for form in known if isinstance(form, Packed)]
    if compute_dtype(x.dtype) == torch.float32 and _gemm():
        tile = _ops.winograd_tile(x, weight, *where)
        if tile:
            same = [form for form in others if form.kind == "winograd"]
            return same[0] if same else Packed(_ops.winograd_prepack(weight, tile), "winograd")
        if _ops.pointwise_suits(x, weight, conv.stride, conv.padding, conv.groups):
            same = [form for form in others if form.kind == "pointwise"]
            return same[0] if same else Packed(_ops.direct_prepack(weight), "pointwise")
    weight = weight.to(compute_dtype(x.dtype))
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight, conv.padding, conv.stride, conv.dilation, conv.groups, list(x.shape)
    )
    same = [form for form in others if form.kind == "onednn" and _layout(form.weight) == _layout(packed)]
    return same[0] if same else Packed(packed, "onednn")


def _layout(packed: Tensor) -> bytes:
    """oneDNN's description of a tensor's layout, without its uninitialised bytes.

    It is int ndims, int64 dims[12], int data_type, 4 bytes of uninitialised padding, and the rest. If a later version
    has another structure, equal layouts compare as different, and weights are kept twice.
    """
    description = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy(force=True).tobytes()
    return bytes(description[:108] + description[112:])


def conv_bias_act(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor,
    conv: ConvSpec,
    act: Act,
    residual: Tensor | None,
    inplace: bool = False,
) -> Tensor:
    """See ``Primitives.conv_bias_act``. Bias, add and act are oneDNN's post-ops, or part of Winograd's output
    transform.

    ``weight`` may be packed, for this or another input. With ``inplace`` the result may overwrite the residual.
    """
    if not isinstance(weight, Packed):
        if x.dtype == torch.float64:
            from fused_resnet.backends import aten

            return aten.conv_bias_act(x, weight, bias, conv, act, residual)
        packed = prepack(weight, conv, x)
        assert packed is not None
    else:
        packed = weight
    if packed.kind == "pointwise":
        out = residual
        if out is None or not inplace:
            shape = (x.shape[0], bias.shape[0], *x.shape[2:])
            out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        _ops.pointwise_bias_act(x, packed.weight, bias, *_act(act), residual, out)
        return out
    if packed.kind == "winograd":
        y: Tensor = _ops.winograd_bias_act(x, packed.weight, bias, conv.padding[0], *_act(act), residual)
        return y
    compute = compute_dtype(x.dtype)
    # oneDNN's relu turns NaN into 0: acceptable for a frozen model (docs/limits.md says so), not in training
    exact = packed is not weight and act.name != "identity"
    if exact or act.name not in _POST_OPS or (residual is not None and act.name not in ("identity", "relu")):
        # a separate pass does what oneDNN's post-ops can't
        one = torch.ones_like(bias)
        y = conv_bias_act(x, packed, bias, conv, Act("identity"), None)
        out = _ops.bn_act(y, [one, torch.zeros_like(one)], *_act(act), residual, [], y.dtype)
        return out
    y = _onednn(x.to(compute), packed.weight, bias.to(compute), conv, act, residual, inplace)
    fmt = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return y.to(x.dtype).contiguous(memory_format=fmt)


def _onednn(
    x: Tensor, packed: Tensor, bias: Tensor, conv: ConvSpec, act: Act, residual: Tensor | None, inplace: bool
) -> Tensor:
    """oneDNN's convolution with its post-ops, in x's dtype. With ``inplace`` the result overwrites the residual."""
    where = (conv.padding, conv.stride, conv.dilation, conv.groups)
    if residual is None:
        name, scalars = _POST_OPS[act.name]
        values = [act.param if s == "param" else s for s in scalars]
        y: Tensor = _mkldnn._convolution_pointwise(x, packed, bias, *where, name, values, "")
        return y
    unary = "relu" if act.name == "relu" else None
    r = residual.to(x.dtype)
    if inplace or r is not residual:
        y = _mkldnn._convolution_pointwise_.binary(r, x, packed, bias, *where, "add", 1.0, unary, [], "")
    else:
        y = _mkldnn._convolution_pointwise.binary(x, r, packed, bias, *where, "add", 1.0, unary, [], "")
    return y


def conv_bn_act(x: Tensor, weight: Tensor, norm: Norm, conv: ConvSpec, act: Act, residual: Tensor | None) -> Tensor:
    """A unit in inference that is not frozen: act(norm(conv(x, W)) [+ residual]).

    The norm is not folded into W, because W may change before the next call. Folding and packing it would cost more
    than the pass that they save, over an output still in cache.
    """
    out: Tensor = _ops.conv_bn_act(
        x, weight, conv.stride, conv.padding, conv.dilation, conv.groups, _pair(norm), *_act(act), residual,
        compute_dtype(x.dtype), _gemm(),
    )  # fmt: skip
    return out


def prepack_stem(weight: Tensor, conv: ConvSpec, x: Tensor, pool: PoolSpec) -> Tensor | None:
    """The weight packed for ``conv_bias_act_max_pool``; None if a separate pass for the pool is faster."""
    if not _ops.stem_suits(x, weight, conv.dilation, conv.groups, pool.kernel):
        return None
    packed: Tensor = _ops.direct_prepack(weight)
    return packed


def conv_bias_act_max_pool(x: Tensor, packed: Tensor, bias: Tensor, conv: ConvSpec, act: Act, pool: PoolSpec) -> Tensor:
    """A stem in inference: max-pool(act(conv(x, W) + b)). The convolution's output is never written to memory.

    ``packed``: from ``prepack_stem`` for an input like x.
    """
    out: Tensor = _ops.stem_bias_act_max_pool(
        x, packed, bias, conv.stride, conv.padding, *_act(act), pool.kernel, pool.stride, pool.padding
    )
    return out


def conv_stats(
    x: Tensor, weight: Tensor, conv: ConvSpec, prologue: Prologue | None, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``Primitives.conv_stats``."""
    norm, act = prologue if prologue is not None else (None, Act("identity"))
    out: tuple[Any, Any, Any] = _ops.conv_stats(
        x, weight, conv.stride, conv.padding, conv.dilation, conv.groups, _pair(norm), *_act(act), stats,
        compute_dtype(x.dtype), _gemm(),
    )  # fmt: skip
    return out


def bn_stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """See ``Primitives.bn_stats``."""
    out: tuple[Tensor, Tensor] = _ops.bn_stats(y)
    return out


def bn_act(
    y: Tensor, norm: Norm, act: Act, residual: Tensor | None = None, residual_norm: Norm | None = None
) -> Tensor:
    """See ``Primitives.bn_act``."""
    out: Tensor = _ops.bn_act(y, _pair(norm), *_act(act), residual, _pair(residual_norm), y.dtype)
    return out


def bn_act_backward(
    dout: Tensor, y: Tensor, norm: Norm, act: Act, residual: Tensor | None = None, residual_norm: Norm | None = None
) -> tuple[Tensor, Sums, Sums | None]:
    """See ``Primitives.bn_act_backward``."""
    dz, s0, s1, s2 = _ops.bn_act_backward(dout, y, _triple(norm), *_act(act), residual, _triple(residual_norm))
    return dz, Sums(s0, s1), Sums(s0, s2) if residual_norm is not None else None


def bn_backward(dz: Tensor, y: Tensor, coef: DyCoefficients) -> Tensor:
    """See ``Primitives.bn_backward``."""
    out: Tensor = _ops.bn_backward(dz, y, _coef(coef), y.dtype)
    return out


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
    norm, act = prologue if prologue is not None else (None, Act("identity"))
    dx, dw, s0, s1 = _ops.conv_backward(
        dz, y, _coef(coef), x, _triple(norm), *_act(act), weight, conv.stride, conv.padding, conv.dilation, conv.groups,
        need_input, need_weight, add, compute_dtype(x.dtype), _gemm(),
    )  # fmt: skip
    if not need_input or (prologue is None and closing is None):
        return dx, dw, None, None
    if closing is None:
        return dx, dw, Sums(s0, s1), None
    dz, sums, summand_sums = bn_act_backward(dx, *closing)
    return dz, dw, sums, summand_sums


def bn_act_max_pool(y: Tensor, norm: Norm, act: Act, pool: PoolSpec) -> tuple[Tensor, Tensor]:
    """See ``Primitives.bn_act_max_pool``."""
    out: tuple[Tensor, Tensor] = _ops.bn_act_max_pool(
        y, _pair(norm), *_act(act), pool.kernel, pool.stride, pool.padding
    )
    return out


def bn_act_max_pool_backward(
    dout: Tensor, argmax: Tensor, y: Tensor, norm: Norm, act: Act, pool: PoolSpec
) -> tuple[Tensor, Sums]:
    """See ``Primitives.bn_act_max_pool_backward``."""
    dz, s0, s1 = _ops.bn_act_max_pool_backward(
        dout, argmax, y, _triple(norm), *_act(act), pool.kernel, pool.stride, pool.padding, compute_dtype(y.dtype)
    )
    return dz, Sums(s0, s1)


def bn_fold(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, conv_bias: Tensor | None, eps: float
) -> Norm:
    """See ``Primitives.bn_fold``."""
    return Norm(*_ops.bn_fold(mean, var, weight, bias, conv_bias, eps))


def bn_coefficients(norm: Norm, sums: Sums, count: int | None) -> tuple[Tensor, DyCoefficients]:
    """See ``Primitives.bn_coefficients``."""
    dgamma, b, c = _ops.bn_coefficients(norm.scale, norm.rstd, *sums, count)
    return dgamma, DyCoefficients(norm.scale, b, c, norm.center)
