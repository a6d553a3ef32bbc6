"""The compiled CPU backend: csrc/cpu, loops over csrc/bn_math.h between oneDNN's convolutions.

On a CPU without a fast 16-bit matrix unit, 16-bit convolutions are slower than float32 ones, so they are computed in
float32. The tensors between units stay 16-bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import Backend, Call, Case, Packed, aten, primitives, warn_once
from fused_resnet.backends.cpu_compute import compute_dtype, exact_products
from fused_resnet.backends.cpu_convolutions import BY_NAME, CONVOLUTIONS, is_depthwise, is_pointwise, stem
from fused_resnet.backends.cpu_steps import Writer, vector
from fused_resnet.backends.cpu_volumes import VOLUMES, inference_of
from fused_resnet.backends.steps import Recorded
from fused_resnet.backends.values import DyCoefficients, Norm, Prologue, Sums, vectors_of
from fused_resnet.base import library
from fused_resnet.spec import SHORTCUTS, Act, ConvSpec, PoolSpec, RowSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ops = torch.ops.fused_resnet_cpu


def _prologue(prologue: Prologue | None) -> tuple[Norm | None, Act]:
    return prologue if prologue is not None else (None, Act("identity"))


def _setting(call: primitives.RowForward | primitives.RowBackward | primitives.RowInference) -> tuple[Any, ...]:
    return *ints_and_reals(call.spec), compute_dtype(call.x.dtype), exact_products()


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
            ints += [unit.conv is not None, *conv.stride, *conv.padding, *conv.dilation, conv.groups, conv.products]
            ints += [conv.bias, unit.act.index, unit.batch_stats, unit.bn_weight, unit.bn_bias]
            reals += [unit.act.param, unit.eps]
    return vector(ints, torch.int64), vector(reals, torch.float64)


@lru_cache(maxsize=4096)
def _flags(needs: tuple[bool, ...]) -> Tensor:
    return vector(needs, torch.bool)


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
        if case.volume and issubclass(primitive, primitives.WholeRow):
            return "runs rows of volumes one primitive after the other"
        return None

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See ``compute_dtype``."""
        return compute_dtype(dtype)

    def algorithm(
        self, primitive: type[Call[Any]], x: Tensor, weight: Tensor, conv: ConvSpec, prologue: bool
    ) -> str | None:
        """csrc/cpu/ops/conv.cpp chooses it."""

        def name(kind: str) -> str | None:
            if x.dim() == 5:
                return VOLUMES.algorithm_of(kind, x, weight, conv, prologue)[0]
            compute = compute_dtype(x.dtype)
            return _ops.conv_algorithm(
                kind, x, weight, *conv.geometry, prologue, compute, exact_products(), conv.products
            )

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
        if call.x.dim() == 5:
            of = inference_of(call, values=False)
            return ["onednn"] if of is None else self.algorithms(of[1])
        return [convolution.name for convolution in CONVOLUTIONS if convolution.suits(call)]

    def prepack(self, call: primitives.ConvBiasAct, known: Sequence[Any] = (), algorithm: str = "") -> Packed | None:
        """The weight packed for the algorithm, or for the first of ``CONVOLUTIONS`` that takes the call; None for
        float64."""
        if torch.float64 in (call.x.dtype, call.weight.dtype):
            return None
        if call.x.dim() == 5:
            of = inference_of(call, values=False)
            if of is not None:
                found = self.prepack(of[1], [form for form in known if form.part == of[0].part], algorithm)
                return found and found._replace(part=of[0].part)
            algorithm = "onednn"
        if not algorithm:
            algorithm = next(convolution.name for convolution in CONVOLUTIONS if convolution.takes(call))
        name, _, _, pack, layout, _ = BY_NAME[algorithm]
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
        return self._run(call, packed, False, True)

    def conv_packed(self, call: primitives.ConvBiasAct, packed: Packed, owned: bool) -> Tensor:
        return self._run(call, packed, owned, False)

    @staticmethod
    def _run(call: primitives.ConvBiasAct, packed: Packed, owned: bool, exact: bool) -> Tensor:
        run = BY_NAME[packed.kind].run
        of = inference_of(call) if call.x.dim() == 5 else None
        return (
            run(call, packed.weight, owned, exact)
            if of is None
            else of[0].output(run(of[1], packed.weight, owned, exact))
        )

    def prepack_pooled(self, call: primitives.ConvBiasAct, pool: PoolSpec) -> Packed | None:
        conv, weight = call.conv, call.weight
        if call.x.dim() == 5 or not _ops.stem_suits(call.x, weight, conv.dilation, conv.groups, pool.kernel):
            return None
        return Packed(_ops.stem_prepack(weight), "stem")

    def conv_pooled(self, call: primitives.ConvBiasAct, packed: Packed, pool: PoolSpec) -> Tensor:
        return stem(call, packed.weight, pool)

    def in_bands(self, x: Tensor, weights: Sequence[Tensor], convs: Sequence[ConvSpec]) -> Sequence[str]:
        """A 1x1 convolution, a depthwise one, and a 1x1 convolution: csrc/cpu/ops/bands.h."""
        if x.dim() == 5:
            return ()
        kinds = [
            "gemm" if is_pointwise(*at) else "depthwise" if is_depthwise(*at) else "" for at in zip(weights, convs)
        ]
        if kinds[:2] != ["gemm", "depthwise"] or (x.dtype == torch.float32 and not exact_products()):
            return ()
        return kinds[: 2 + (kinds[2:] == ["gemm"])] if _ops.bands_suit(x, weights[0].shape[0]) else ()

    def frozen_row(self, recorded: Sequence[Recorded]) -> Callable[..., Tensor] | None:
        return Writer().row(recorded)

    def conv_bn_act(self, call: primitives.ConvBnAct) -> Tensor:
        if call.x.dim() == 5:
            return VOLUMES.conv_bn_act(call)
        return _ops.conv_bn_act(
            call.x, call.weight, *call.conv.geometry, vectors_of(call.norm, 2), *call.act.numbers, call.residual,
            compute_dtype(call.x.dtype), exact_products(), call.conv.products,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ training
    def conv_stats(self, call: primitives.ConvStats) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if call.x.dim() == 5:
            return VOLUMES.conv_stats(call)
        norm, act = _prologue(call.prologue)
        return _ops.conv_stats(
            call.x, call.weight, *call.conv.geometry, vectors_of(norm, 2), *act.numbers, call.stats,
            compute_dtype(call.x.dtype), exact_products(), call.conv.products,
        )  # fmt: skip

    def conv_backward(self, call: primitives.ConvBackward) -> primitives.Gradients:
        if call.x.dim() == 5:
            return VOLUMES.conv_backward(call)
        norm, act = _prologue(call.prologue)
        dx, dw, s0, s1 = _ops.conv_backward(
            call.dz, call.y, call.coef.vectors, call.x, vectors_of(norm, 3), *act.numbers, call.weight,
            *call.conv.geometry, call.need_input, call.need_weight, call.add, compute_dtype(call.x.dtype),
            exact_products(), call.conv.products,
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
