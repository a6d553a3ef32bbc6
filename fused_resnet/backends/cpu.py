"""The compiled CPU backend: csrc/cpu, loops over csrc/bn_math.h between oneDNN's convolutions.

On a CPU without a fast 16-bit matrix unit, 16-bit convolutions are slower than float32 ones, so they are computed in
float32. The tensors between units stay 16-bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends import Backend, Call, Case, Packed, aten, primitives, warn_once
from fused_resnet.backends.cpu_steps import POST_OPS, Writer, identity, needs_pass, scalars, vector
from fused_resnet.backends.steps import Recorded
from fused_resnet.backends.values import DyCoefficients, Norm, Prologue, Sums, vectors_of
from fused_resnet.base import library
from fused_resnet.base.locks import Lock
from fused_resnet.spec import SHORTCUTS, Act, ConvSpec, PoolSpec, RowSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# oneDNN's names of the dtypes that only some CPUs compute in
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_ops, _mkldnn = torch.ops.fused_resnet_cpu, torch.ops.mkldnn


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


def _prologue(prologue: Prologue | None) -> tuple[Norm | None, Act]:
    return prologue if prologue is not None else (None, Act("identity"))


def _setting(call: primitives.RowForward | primitives.RowBackward | primitives.RowInference) -> tuple[Any, ...]:
    return *ints_and_reals(call.spec), compute_dtype(call.x.dtype), _gemm()


@lru_cache(maxsize=4096)
def ints_and_reals(spec: str) -> tuple[Tensor, Tensor]:
    """A row's spec as two vectors, in the order in which csrc/cpu/ops/row.cpp reads them."""
    row = RowSpec.decode(spec)
    ints: list[int] = [len(row.chains)]
    reals: list[float] = []
    for chain in row.chains:
        shortcut = chain.shortcut
        ints += [SHORTCUTS.index(shortcut.kind), chain.recompute]
        for pool in (chain.pool, shortcut.pool):
            ints.append(pool is not None)
            if pool is not None:
                ints += [*pool.kernel, *pool.stride, *pool.padding, pool.ceil_mode, pool.count_include_pad]
        ints += [*shortcut.stride, shortcut.channels, len(chain.all_units)]
        for unit in chain.all_units:
            conv = unit.conv or ConvSpec()
            ints += [unit.conv is not None, *conv.stride, *conv.padding, *conv.dilation, conv.groups, conv.bias]
            ints += [unit.act.index, unit.batch_stats, unit.bn_weight, unit.bn_bias]
            reals += [unit.act.param, unit.eps]
    return vector(ints, torch.int64), vector(reals, torch.float64)


@lru_cache(maxsize=4096)
def _flags(needs: tuple[bool, ...]) -> Tensor:
    return vector(needs, torch.bool)


# ---------------------------------------------------------------------------------------------------- inference
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
    return compute_dtype(call.x.dtype) == torch.float32 and _gemm()


def _free(call: primitives.ConvBiasAct) -> bool:
    """Whether an algorithm of our own may be as fast as others: not if the user lets float32 lose precision."""
    return call.x.dtype != torch.float32 or _gemm()


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


def _stem(call: primitives.ConvBiasAct, packed: Tensor, owned: bool, exact: bool) -> Tensor:
    return BACKEND.conv_pooled(call, Packed(packed, "stem"), _NO_POOL)


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
        return primitives.BnAct(y, identity(bias.numel(), y.dtype), act, residual).on(BACKEND)
    y = _with_post_ops(call, packed, owned)
    fmt = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return y.to(x.dtype).contiguous(memory_format=fmt)


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
_BY_NAME = {convolution.name: convolution for convolution in CONVOLUTIONS}


# ---------------------------------------------------------------------------------------------------- the backend
class Cpu(Backend):
    """Takes float32, bfloat16, float16 and float64 on the CPU."""

    name = "cpu"
    packs = True

    def unavailable(self) -> str | None:
        """The reason why the extension can't be used, or None."""
        reason = library.unavailable()
        if reason is not None:
            warn_once(f"fused_resnet runs without its compiled extension, which costs speed on a CPU ({reason})")
        return reason

    def refuse(self, primitive: type[Call[Any]], case: Case) -> str | None:
        """The reason why this case is refused, or None."""
        if case.device != "cpu":
            return f"tensors are on {case.device}, not on the CPU"
        if case.dtype not in _DTYPES:
            return f"dtype {case.dtype}"
        return None

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See ``compute_dtype``."""
        return compute_dtype(dtype)

    def algorithm(
        self, primitive: type[Call[Any]], x: Tensor, weight: Tensor, conv: ConvSpec, prologue: bool
    ) -> str | None:
        """csrc/cpu/ops/conv.cpp chooses it."""

        def name(kind: str) -> str:
            compute = compute_dtype(x.dtype)
            return _ops.conv_algorithm(kind, x, weight, *conv.geometry, prologue, compute, _gemm())

        if primitive is primitives.ConvStats:
            return name("fprop")
        if primitive is primitives.ConvBackward:
            dgrad, wgrad = name("dgrad"), name("wgrad")
            return dgrad if dgrad == wgrad else f"{dgrad} for the input, {wgrad} for the weight"
        return None

    # ------------------------------------------------------------------------------------------------ inference
    def algorithms(self, call: primitives.ConvBiasAct) -> Sequence[str]:
        if torch.float64 in (call.x.dtype, call.weight.dtype):
            return ()
        return [convolution.name for convolution in CONVOLUTIONS if convolution.suits(call)]

    def prepack(self, call: primitives.ConvBiasAct, known: Sequence[Any] = (), algorithm: str = "") -> Packed | None:
        """The weight packed for the algorithm, or for the first of ``CONVOLUTIONS`` that takes the call; None for
        float64."""
        if torch.float64 in (call.x.dtype, call.weight.dtype):
            return None
        if not algorithm:
            algorithm = next(convolution.name for convolution in CONVOLUTIONS if convolution.takes(call))
        name, _, _, pack, layout, _ = _BY_NAME[algorithm]
        same = [form for form in known if isinstance(form, Packed) and form.kind == name]
        if same and layout is None:
            return same[0]
        packed = Packed(pack(call), name)
        if layout is None:
            return packed
        return next((form for form in same if layout(form.weight) == layout(packed.weight)), packed)

    def conv_bias_act(self, call: primitives.ConvBiasAct) -> Tensor:
        packed = self.prepack(call)
        if packed is None:
            return aten.BACKEND.conv_bias_act(call)
        return _BY_NAME[packed.kind].run(call, packed.weight, False, True)

    def conv_packed(self, call: primitives.ConvBiasAct, packed: Packed, owned: bool) -> Tensor:
        return _BY_NAME[packed.kind].run(call, packed.weight, owned, False)

    def prepack_pooled(self, call: primitives.ConvBiasAct, pool: PoolSpec) -> Packed | None:
        conv, weight = call.conv, call.weight
        if not _ops.stem_suits(call.x, weight, conv.dilation, conv.groups, pool.kernel):
            return None
        return Packed(_ops.stem_prepack(weight), "stem")

    def conv_pooled(self, call: primitives.ConvBiasAct, packed: Packed, pool: PoolSpec) -> Tensor:
        """The convolution's output is never written to memory."""
        return _ops.stem_bias_act_max_pool(
            call.x, packed.weight, call.bias, call.conv.stride, call.conv.padding, *call.act.numbers, *pool.window,
        )  # fmt: skip

    def frozen_row(self, recorded: Sequence[Recorded]) -> Callable[..., Tensor] | None:
        return Writer().row(recorded)

    def conv_bn_act(self, call: primitives.ConvBnAct) -> Tensor:
        return _ops.conv_bn_act(
            call.x, call.weight, *call.conv.geometry, vectors_of(call.norm, 2), *call.act.numbers, call.residual,
            compute_dtype(call.x.dtype), _gemm(),
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ training
    def conv_stats(self, call: primitives.ConvStats) -> tuple[Tensor, Tensor | None, Tensor | None]:
        norm, act = _prologue(call.prologue)
        return _ops.conv_stats(
            call.x, call.weight, *call.conv.geometry, vectors_of(norm, 2), *act.numbers, call.stats,
            compute_dtype(call.x.dtype), _gemm(),
        )  # fmt: skip

    def conv_backward(self, call: primitives.ConvBackward) -> primitives.Gradients:
        norm, act = _prologue(call.prologue)
        dx, dw, s0, s1 = _ops.conv_backward(
            call.dz, call.y, call.coef.vectors, call.x, vectors_of(norm, 3), *act.numbers, call.weight,
            *call.conv.geometry, call.need_input, call.need_weight, call.add, compute_dtype(call.x.dtype), _gemm(),
        )  # fmt: skip
        if not call.need_input or call.before is None:
            return dx, dw, None, None
        if call.closing is None:
            return dx, dw, Sums(s0, s1), None
        dz, sums, summand_sums = self.bn_act_backward(primitives.BnActBackward(dx, *call.closing))
        return dz, dw, sums, summand_sums

    def bn_stats(self, call: primitives.BnStats) -> tuple[Tensor, Tensor]:
        return _ops.bn_stats(call.y)

    def bn_act(self, call: primitives.BnAct) -> Tensor:
        norms = vectors_of(call.norm, 2), vectors_of(call.residual_norm, 2)
        return _ops.bn_act(call.y, norms[0], *call.act.numbers, call.residual, norms[1], call.y.dtype)

    def bn_act_backward(self, call: primitives.BnActBackward) -> tuple[Tensor, Sums, Sums | None]:
        dz, s0, s1, s2 = _ops.bn_act_backward(
            call.dout, call.y, vectors_of(call.norm, 3), *call.act.numbers, call.residual,
            vectors_of(call.residual_norm, 3),
        )  # fmt: skip
        return dz, Sums(s0, s1), Sums(s0, s2) if call.residual_norm is not None else None

    def bn_backward(self, call: primitives.BnBackward) -> Tensor:
        return _ops.bn_backward(call.dz, call.y, call.coef.vectors, call.y.dtype)

    def bn_act_max_pool(self, call: primitives.BnActMaxPool) -> tuple[Tensor, Tensor]:
        pool = call.pool
        return _ops.bn_act_max_pool(call.y, vectors_of(call.norm, 2), *call.act.numbers, *pool.window)

    def bn_act_max_pool_backward(self, call: primitives.BnActMaxPoolBackward) -> tuple[Tensor, Sums]:
        y, pool = call.y, call.pool
        dz, s0, s1 = _ops.bn_act_max_pool_backward(
            call.dout, call.argmax, y, vectors_of(call.norm, 3), *call.act.numbers, *pool.window,
            compute_dtype(y.dtype),
        )  # fmt: skip
        return dz, Sums(s0, s1)

    def bn_fold(self, call: primitives.BnFold) -> Norm:
        return Norm(*_ops.bn_fold(call.mean, call.var, call.weight, call.bias, call.conv_bias, call.eps))

    def bn_coefficients(self, call: primitives.BnCoefficients) -> tuple[Tensor, DyCoefficients]:
        norm = call.norm
        dgamma, b, c = _ops.bn_coefficients(norm.scale, norm.rstd, *call.sums, call.count)
        return dgamma, DyCoefficients(norm.scale, b, c, norm.center)

    # ------------------------------------------------------------------------------------------------ whole rows
    def row_forward(self, call: primitives.RowForward) -> list[Tensor]:
        return _ops.row_forward(call.x, call.residual, call.params, *_setting(call))

    def row_backward(self, call: primitives.RowBackward) -> list[Tensor]:
        ints, reals, *setting = _setting(call)
        return _ops.row_backward(
            call.dout, call.x, call.residual, call.weights, call.saved, ints, reals, _flags(tuple(call.needs)), *setting
        )

    def row_inference(self, call: primitives.RowInference) -> Tensor:
        return _ops.row_inference(call.x, call.residual, call.params, *_setting(call))


BACKEND = Cpu()
