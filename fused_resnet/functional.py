"""The stateless API: chains of conv -> BatchNorm -> act on tensors you hold.

Everything here validates its arguments before any kernel starts and leaves every tensor as it was when it refuses.
Running statistics are updated in place, as ``torch.nn.functional.batch_norm`` does, after the kernels have run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet.chain  # noqa: F401  (registers the operators)
from fused_resnet import checks, reference
from fused_resnet.spec import Act, ChainSpec, ConvSpec, PoolSpec, ShortcutSpec, UnitSpec, pair


@dataclass(eq=False)
class Unit:
    """One conv -> BatchNorm -> act of a chain: its tensors and what ``conv2d`` and ``batch_norm`` want to know.

    Args:
        weight: [out_channels, in_channels/groups, kH, kW], or None where somebody else's convolution came before.
        bn_weight, bn_bias: gamma and beta, [out_channels]; both None for BatchNorm without affine parameters.
        running_mean, running_var: [out_channels]; used when not ``training``, updated when ``training``; both or none.
        bias: the convolution's bias, [out_channels], or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
        act: a name of ``fused_resnet.spec.ACTIVATIONS``, a (name, parameter) pair or None.
        eps, momentum, training: as in ``torch.nn.functional.batch_norm``.
    """

    weight: Tensor | None = None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    bias: Tensor | None = None
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    act: str | tuple[str, float] | Act | None = "relu"
    eps: float = 1e-5
    momentum: float = 0.1
    training: bool = False


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str | tuple[str, float] | Act | None = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    max_pool: PoolSpec | None = None,
    recompute: bool = False,
) -> Tensor:
    """act(batch_norm(conv2d(x, weight)) [+ residual]) in one chain, optionally followed by a max-pool.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64; NCHW or channels_last, any strides.
        weight, bn_weight, bn_bias, running_mean, running_var, bias, stride, padding, dilation, groups, act, eps,
            momentum, training: see ``Unit``.
        residual: a summand of the output's shape, added before the activation.
        max_pool: ``PoolSpec.make(3, 2, 1)`` for the stem of a ResNet.
        recompute: keep x instead of the convolution's output for the backward, and convolve again there.

    Returns:
        [N, out_channels, oH, oW], x's dtype (autocast's inside autocast), x's layout.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.

    Source: ``F.relu(F.batch_norm(F.conv2d(...)))``; arXiv 1512.03385 section 3.4 (BN after each convolution, before
        the activation).
    """
    unit = Unit(
        weight, bn_weight, bn_bias, running_mean, running_var, bias, stride, padding, dilation, groups, act, eps,
        momentum, training,
    )  # fmt: skip
    checks.check_tensor("weight", weight)
    return _run(x, [unit], residual=residual, pool=max_pool, recompute=recompute)


def bn_act(
    x: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    act: str | tuple[str, float] | Act | None = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """act(batch_norm(x) [+ residual]), for an x that somebody else's convolution made.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64; NCHW or channels_last, any strides.
        residual: a summand of x's shape. The rest: see ``Unit``.

    Returns:
        x's shape, dtype and layout.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.

    Source: ``F.relu(F.batch_norm(x, ...) + residual)``.
    """
    unit = Unit(
        None, bn_weight, bn_bias, running_mean, running_var, act=act, eps=eps, momentum=momentum, training=training
    )
    return _run(x, [unit], residual=residual)


def residual_chain(
    x: Tensor,
    units: Sequence[Unit],
    *,
    shortcut: str | Unit | None = "identity",
    shortcut_stride: int | Sequence[int] = 1,
    shortcut_pool: PoolSpec | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A residual block: act_k(unit_k(... unit_1(x)) + shortcut(x)); the last unit's act comes after the add.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64; NCHW or channels_last, any strides.
        units: two for a basic block, three for a bottleneck; any number works.
        shortcut: "identity"; "pad", the paper's option A (x strided by ``shortcut_stride``, zero channels appended);
            a ``Unit`` without activation, the projection of options B and C; None for a plain block.
        shortcut_pool: an average pool before the projection (ResNet-D).
        residual: a summand of the output's shape instead of a shortcut (then ``shortcut=None``).

    Returns:
        [N, out_channels of the last unit, oH, oW], x's dtype (autocast's inside autocast), x's layout.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.

    Source: arXiv 1512.03385, equations (1) and (2), figures 2 and 5.
    """
    if not isinstance(units, Sequence) or not units:
        raise ValueError(f"units: expected at least one Unit, got {units!r}")
    for i, unit in enumerate(units):
        if not isinstance(unit, Unit):
            raise TypeError(f"units[{i}]: expected a Unit, got {type(unit).__name__}")
    if shortcut is not None and not isinstance(shortcut, str | Unit):
        raise TypeError(f"shortcut: expected a str, a Unit or None, got {shortcut!r}")
    if isinstance(shortcut, str) and shortcut not in ("identity", "pad"):
        raise ValueError(
            f"shortcut: expected 'identity', 'pad', a Unit (the projection) or None (plain, or with residual=...), "
            f"got {shortcut!r}"
        )
    if residual is not None and shortcut is not None:
        came = repr(shortcut) if isinstance(shortcut, str) else "a Unit"
        raise ValueError(f"residual: expected shortcut=None with it, got shortcut={came}")
    return _run(x, units, residual, shortcut, shortcut_stride, shortcut_pool)


# ---------------------------------------------------------------------------------------------------- the one way in
def _run(
    x: Tensor,
    units: Sequence[Unit],
    residual: Tensor | None = None,
    shortcut: str | Unit | None = None,
    shortcut_stride: int | Sequence[int] = 1,
    shortcut_pool: PoolSpec | None = None,
    pool: PoolSpec | None = None,
    recompute: bool = False,
) -> Tensor:
    checks.check_tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions [N, C, H, W], got shape {tuple(x.shape)}")
    projection = shortcut if isinstance(shortcut, Unit) else None
    everyone = [*units, projection] if projection is not None else list(units)
    keys = tuple(_key(u, i) for i, u in enumerate(everyone))
    if projection is not None:
        kind = "projection"
    elif residual is not None:
        kind = "tensor"
    else:
        kind = shortcut if isinstance(shortcut, str) else "none"
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute: expected a bool, got {recompute!r}")
    plan: tuple[Any, ...] = (
        keys,
        kind,
        _hashable(shortcut_stride),
        _pool_key("shortcut_pool", shortcut_pool),
        _channels(units[-1], x) if kind == "pad" else 0,
        _pool_key("max_pool", pool),
        recompute,
    )
    text = _text(*plan)
    # a constant object is opaque to the compiler's guards, so it traces the making of one
    spec = _chain_spec(*plan) if torch.compiler.is_compiling() else ChainSpec.decode(text)
    checks.check_chain(x, residual, everyone, spec)

    x, residual = _autocast(x, residual, everyone)
    params = [getattr(u, name) for u, s in zip(everyone, spec.all_units, strict=True) for name in s.param_names]
    if 0 in x.shape:
        return _plain(x, residual, everyone, spec)
    if spec.frozen and not _wants_grad(x, residual, params):
        return torch.ops.fused_resnet.chain_inference(x, residual, params, text)
    outs = torch.ops.fused_resnet.chain(x, residual, params, text)
    n_y = sum(u.conv is not None for u in spec.all_units) - int(spec.recompute)
    stats = iter(outs[1 + n_y :])
    if not in_backward():
        for unit, s, size in zip(everyone, spec.all_units, _counts(x, everyone, spec), strict=True):
            if s.batch_stats:
                _update_running(unit, next(stats), next(stats), size)
    return outs[0]


def _chain_spec(
    keys: tuple[tuple[Any, ...], ...],
    kind: str,
    stride: int | tuple[int, ...],
    shortcut_pool: tuple[Any, ...] | None,
    channels: int,
    pool: tuple[Any, ...] | None,
    recompute: bool,
) -> ChainSpec:
    specs = [_unit_spec(*key) for key in keys]
    unit = specs.pop() if kind == "projection" else None
    average, tail = (PoolSpec(*p) if p is not None else None for p in (shortcut_pool, pool))
    shortcut = ShortcutSpec(kind, unit, average, pair(stride, "shortcut_stride", 1), channels)  # type: ignore[arg-type]
    return ChainSpec(tuple(specs), shortcut, tail, recompute)


def _text(*plan: Any) -> str:
    """The chain's spec as operators take it; a constant of a compiled graph, so the arguments are plain tuples."""
    try:
        return _cached_text(plan, repr(plan))
    except TypeError:  # something that can't be hashed: made again, it says what is wrong with it
        return _chain_spec(*plan).encode()


@lru_cache(maxsize=4096)
def _cached_text(plan: tuple[Any, ...], spelled: str) -> str:
    """``spelled``: 1, 1.0 and True are equal, and one of them is an error."""
    return _chain_spec(*plan).encode()


def _unit_spec(
    conv: tuple[Any, ...] | None, act: str | tuple[str, float] | None, eps: float, training: bool, affine: bool
) -> UnitSpec:
    return UnitSpec(ConvSpec.make(*conv) if conv is not None else None, Act.make(act), eps, training, affine)


# What torch.compiler.assume_constant_result does, without its import of all of torch._dynamo.
_text._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _hashable(value: int | Sequence[int] | str) -> int | tuple[int, ...] | str:
    return tuple(value) if isinstance(value, list | torch.Size) else value  # type: ignore[return-value]


def _channels(unit: Unit, x: Tensor) -> int:
    return unit.weight.shape[0] if unit.weight is not None else x.shape[1]


def _key(unit: Unit, index: int) -> tuple[Any, ...]:
    """A unit's hyper-parameters, as ``_unit_spec`` takes them."""
    checks.check_arguments(unit, index)
    conv = None
    if unit.weight is not None:
        size, geometry = tuple(unit.weight.shape), (unit.stride, unit.padding, unit.dilation)
        conv = (size, *(_hashable(v) for v in geometry), unit.groups, unit.bias is not None)
    act = (unit.act.name, unit.act.param) if isinstance(unit.act, Act) else unit.act
    return conv, act, unit.eps, bool(unit.training), unit.bn_weight is not None


def _pool_key(name: str, pool: PoolSpec | None) -> tuple[Any, ...] | None:
    if pool is None:
        return None
    if not isinstance(pool, PoolSpec):
        raise TypeError(f"{name}: expected a PoolSpec or None, got {pool!r}")
    return pool.kernel, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad


def _autocast(x: Tensor, residual: Tensor | None, units: Sequence[Unit]) -> tuple[Tensor, Tensor | None]:
    """Inside autocast the chain works in autocast's dtype; weights stay and are rounded where they are used."""
    if not checks.autocasts(x) or x.dtype == torch.float64:
        return x, residual
    dtype = torch.get_autocast_dtype(x.device.type) if units[0].weight is not None else x.dtype
    return x.to(dtype), residual.to(dtype) if residual is not None else None


def _wants_grad(x: Tensor, residual: Tensor | None, params: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *params))


def in_backward() -> bool:
    """Whether this forward runs inside a backward pass: a checkpointed block computed again, whose running statistics
    have been updated when it ran first."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _counts(x: Tensor, units: Sequence[Unit], spec: ChainSpec) -> list[int]:
    """Values per channel of each unit's y."""
    params = [getattr(u, name) for u, s in zip(units, spec.all_units, strict=True) for name in s.param_names]
    return [n * h * w for n, _, h, w in fused_resnet.chain.unit_shapes(x, params, spec)]


@torch.no_grad()
def _update_running(unit: Unit, mean: Tensor, var: Tensor, count: int) -> None:
    """running = (1 - momentum) running + momentum new, with the unbiased variance and the convolution's bias."""
    if unit.running_mean is None or unit.running_var is None:
        return
    if unit.bias is not None:
        mean = mean + unit.bias
    unit.running_mean.lerp_(mean.to(unit.running_mean.dtype), unit.momentum)
    unit.running_var.lerp_((var * (count / (count - 1))).to(unit.running_var.dtype), unit.momentum)


def _plain(x: Tensor, residual: Tensor | None, units: Sequence[Unit], spec: ChainSpec) -> Tensor:
    """No batch or no pixels: PyTorch's own functions decide what comes out and what becomes of the statistics."""

    def unit(h: Tensor, u: Unit, s: UnitSpec) -> Tensor:
        if u.weight is not None and s.conv is not None:
            h = reference.conv(
                h,
                {"weight": u.weight.to(h.dtype)} | ({"bias": u.bias.to(h.dtype)} if u.bias is not None else {}),
                s.conv,
            )
        return F.batch_norm(h, u.running_mean, u.running_var, u.bn_weight, u.bn_bias, s.batch_stats, u.momentum, s.eps)

    h = x
    for i, (u, s) in enumerate(zip(units[: len(spec.units)], spec.units, strict=True)):
        h = unit(h, u, s)
        if i + 1 < len(spec.units):
            h = reference.act(h, s.act)
    if spec.shortcut.kind != "none":
        summand = residual if spec.shortcut.kind == "tensor" else reference.shortcut_input(x, spec.shortcut)
        assert summand is not None
        h = h + (unit(summand, units[-1], spec.shortcut.unit) if spec.shortcut.unit is not None else summand)
    h = reference.act(h, spec.units[-1].act)
    return F.max_pool2d(h, spec.pool.kernel, spec.pool.stride, spec.pool.padding) if spec.pool is not None else h
