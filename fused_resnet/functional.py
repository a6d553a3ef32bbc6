"""The stateless API: chains of conv -> BatchNorm -> act on tensors you hold.

All functions validate their arguments before any kernel starts. If they refuse, every tensor stays as it was. After the
kernels they update running statistics in place, as ``torch.nn.functional.batch_norm`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet.chain  # noqa: F401  (registers the operators)
from fused_resnet import checks, joint, reference
from fused_resnet.arguments import flag, number, pair
from fused_resnet.spec import Act, ChainSpec, ConvSpec, PoolSpec, RowSpec, ShortcutSpec, UnitSpec
from fused_resnet.units import Chain, Unit

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Chain", "PoolSpec", "Unit", "bn_act", "conv_bn_act", "residual_chain", "residual_chains"]


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
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """act(batch_norm(conv2d(x, weight)) [+ residual]) in one chain, optionally followed by a max-pool.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64; NCHW or channels_last, any strides.
        weight, bn_weight, bn_bias, running_mean, running_var, bias: see ``Unit``.
        stride, padding, dilation, groups, act, eps, momentum, training, process_group: see ``Unit``.
        residual: a summand of the output's shape, added before the activation.
        max_pool: ``PoolSpec.make(3, 2, 1)`` for the stem of a ResNet.
        recompute: save x instead of the convolution's output for the backward, which convolves again.

    Returns:
        [N, out_channels, oH, oW], x's dtype (autocast's inside autocast), x's layout.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.

    Source: ``F.relu(F.batch_norm(F.conv2d(...)))``; arXiv 1512.03385 section 3.4 (BN after each convolution, before
        the activation).
    """
    unit = Unit(
        weight, bn_weight, bn_bias, running_mean, running_var, bias, stride, padding, dilation, groups, act, eps,
        momentum, training, process_group,
    )  # fmt: skip
    checks.check_tensor("weight", weight)
    return _run(x, [Chain([unit], None)], residual, max_pool, recompute)


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
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """act(batch_norm(x) [+ residual]), for an x from a convolution outside this package.

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
        None, bn_weight, bn_bias, running_mean, running_var, act=act, eps=eps, momentum=momentum, training=training,
        process_group=process_group,
    )  # fmt: skip
    return _run(x, [Chain([unit], None)], residual)


def residual_chain(
    x: Tensor,
    units: Sequence[Unit],
    *,
    shortcut: str | Unit | None = "identity",
    shortcut_stride: int | Sequence[int] = 1,
    shortcut_pool: PoolSpec | None = None,
    residual: Tensor | None = None,
    max_pool: PoolSpec | None = None,
    recompute: bool = False,
) -> Tensor:
    """A residual block: act_k(unit_k(... unit_1(x)) + shortcut(x)); the last unit's act comes after the add.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64; NCHW or channels_last, any strides.
        units: two for a basic block, three for a bottleneck; any number works.
        shortcut: "identity"; "pad", the paper's option A (x strided by ``shortcut_stride``, zero channels appended);
            a ``Unit`` without activation, the projection of options B and C; None for a plain block.
        shortcut_pool: an average pool before the projection (ResNet-D).
        residual: a summand of the output's shape instead of a shortcut (then ``shortcut=None``).
        max_pool: a max-pool after a chain without a summand, as in a stem: ``PoolSpec.make(3, 2, 1)``.
        recompute: the backward computes the first convolution's output again instead of saving it.

    Returns:
        [N, out_channels of the last unit, oH, oW], x's dtype (autocast's inside autocast), x's layout.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.

    Source: arXiv 1512.03385, equations (1) and (2), figures 2 and 5.
    """
    chain = Chain(units, shortcut, shortcut_stride, shortcut_pool)
    if residual is not None and shortcut is not None:
        came = repr(shortcut) if isinstance(shortcut, str) else "a Unit"
        raise ValueError(f"residual: expected shortcut=None with it, got shortcut={came}")
    return _run(x, [chain], residual, max_pool, recompute)


def residual_chains(x: Tensor, chains: Sequence[Chain]) -> Tensor:
    """Residual blocks in a row, a stage of a network: ``residual_chain`` of each, on the output of the one before.

    The numbers are those of one call per block. The backward has less traffic: the kernel that computes the gradient
    between two blocks also takes it through the add and the activation there.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64; NCHW or channels_last, any strides.
        chains: the blocks, first to last.

    Returns:
        [N, out_channels of the last unit, oH, oW], x's dtype (autocast's inside autocast), x's layout.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected, before anything runs.

    Source: arXiv 1512.03385, table 1: conv2_x to conv5_x.
    """
    if not isinstance(chains, Sequence) or not chains:
        raise ValueError(f"chains: expected at least one Chain, got {chains!r}")
    for i, chain in enumerate(chains):
        if not isinstance(chain, Chain):
            raise TypeError(f"chains[{i}]: expected a Chain, got {type(chain).__name__}")
    return _run(x, chains)


# ---------------------------------------------------------------------------------------------------- the one way in
def _run(
    x: Tensor,
    chains: Sequence[Chain],
    residual: Tensor | None = None,
    pool: PoolSpec | None = None,
    recompute: bool = False,
) -> Tensor:
    """Checks and runs the chains. ``residual``, ``pool`` and ``recompute`` are only for a single chain."""
    checks.check_tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions [N, C, H, W], got shape {tuple(x.shape)}")
    flag(recompute, "recompute")
    plans, specs = [], []
    shape = tuple(x.shape)
    for i, chain in enumerate(chains):
        plan = _plan(chain, shape[1], residual, pool, recompute)
        # the compiler's guards can't handle a constant object, so it traces the making of one
        spec = _chain_spec(*plan) if torch.compiler.is_compiling() else RowSpec.decode(_text(plan)).chains[0]
        where = f"chain {i}, " if len(chains) > 1 else ""
        shape = checks.check_chain(x, shape, residual, chain.everyone, spec, where)
        plans.append(plan)
        specs.append(spec)

    # with a process group an empty batch still takes part in the statistics, for which the others wait
    empty = 0 in x.shape and not any(unit.group for spec in specs for unit in spec.all_units)
    if empty or fused_resnet.chain.transformed():
        for chain, spec in zip(chains, specs, strict=True):
            x = _plain(*_autocast(x, residual, chain.units[0]), chain.everyone, spec)
        return x
    # Chains whose input and parameters need no gradient run outside the row, because a row saves every intermediate.
    # Without a convolution at the start of each chain there is no row.
    alone = 0 if all(spec.units[0].conv is not None for spec in specs) else len(chains)
    while alone < len(chains) and not _wants_grad(x, residual, _params([chains[alone]], [specs[alone]])):
        alone += 1
    for i in range(alone):
        x = _row(x, chains[i : i + 1], residual, plans[i : i + 1], specs[i : i + 1])
    return x if alone == len(chains) else _row(x, chains[alone:], residual, plans[alone:], specs[alone:])


def _row(
    x: Tensor,
    chains: Sequence[Chain],
    residual: Tensor | None,
    plans: Sequence[tuple[Any, ...]],
    specs: Sequence[ChainSpec],
) -> Tensor:
    """Calls one operator, and updates the running statistics."""
    x, residual = _autocast(x, residual, chains[0].units[0])
    params = _params(chains, specs)
    text = _text(*plans)
    if len(chains) == 1 and specs[0].frozen and not _wants_grad(x, residual, params):
        return torch.ops.fused_resnet.chain_inference(x, residual, params, text)
    out, *kept = torch.ops.fused_resnet.chain(x, residual, params, text)
    if in_backward():
        return out
    stats = kept[len(chains) - 1 :]
    starts = [x, *kept[: len(chains) - 1]]
    for start, chain, spec in zip(starts, chains, specs, strict=True):
        of_chain, stats = iter(stats[spec.n_convs : spec.n_saved]), stats[spec.n_saved :]
        for unit, s, size in zip(chain.everyone, spec.all_units, _counts(start, chain, spec), strict=True):
            if s.batch_stats:
                _update_running(unit, next(of_chain), next(of_chain), size if s.group is None else next(of_chain))
    return out


def _params(chains: Sequence[Chain], specs: Sequence[ChainSpec]) -> list[Tensor]:
    return [
        getattr(u, name)
        for chain, spec in zip(chains, specs, strict=True)
        for u, s in zip(chain.everyone, spec.all_units, strict=True)
        for name in s.param_names
    ]


def _plan(
    chain: Chain, channels: int, residual: Tensor | None, pool: PoolSpec | None, recompute: bool
) -> tuple[Any, ...]:
    """A chain's hyper-parameters, the arguments of ``_chain_spec``."""
    projection = isinstance(chain.shortcut, Unit)
    if projection:
        kind = "projection"
    elif residual is not None:
        kind = "tensor"
    else:
        kind = chain.shortcut if isinstance(chain.shortcut, str) else "none"
    weight = chain.units[-1].weight
    return (
        tuple(_key(u, i) for i, u in enumerate(chain.everyone)),
        kind,
        pair(chain.shortcut_stride, "shortcut_stride", 1),
        _pool_key("shortcut_pool", chain.shortcut_pool),
        (weight.shape[0] if weight is not None else channels) if kind == "pad" else 0,
        _pool_key("max_pool", pool),
        recompute,
    )


def _chain_spec(
    keys: tuple[tuple[Any, ...], ...],
    kind: str,
    stride: tuple[int, int],
    shortcut_pool: tuple[Any, ...] | None,
    channels: int,
    pool: tuple[Any, ...] | None,
    recompute: bool,
) -> ChainSpec:
    specs = [_unit_spec(*key) for key in keys]
    unit = specs.pop() if kind == "projection" else None
    average, tail = (PoolSpec(*p) if p is not None else None for p in (shortcut_pool, pool))
    shortcut = ShortcutSpec(kind, unit, average, stride, channels)  # type: ignore[arg-type]
    return ChainSpec(tuple(specs), shortcut, tail, recompute)


def _text(*plans: tuple[Any, ...]) -> str:
    """The row's spec as text, for operators. It is a constant of a compiled graph, so ``plans`` are plain tuples."""
    return _cached_text(plans)


@lru_cache(maxsize=4096)
def _cached_text(plans: tuple[tuple[Any, ...], ...]) -> str:
    return RowSpec(tuple(_chain_spec(*plan) for plan in plans)).encode()


def _unit_spec(conv: tuple[Any, ...] | None, act: tuple[str, float], *rest: Any) -> UnitSpec:
    return UnitSpec(ConvSpec(*conv) if conv is not None else None, Act(*act), *rest)


# Like torch.compiler.assume_constant_result, but without importing all of torch._dynamo.
_text._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _key(unit: Unit, index: int) -> tuple[Any, ...]:
    """A unit's hyper-parameters, the arguments of ``_unit_spec``."""
    checks.check_arguments(unit, index)
    conv = None
    if unit.weight is not None:
        c = ConvSpec.make(
            unit.weight.shape, unit.stride, unit.padding, unit.dilation, unit.groups, unit.bias is not None
        )
        conv = (c.stride, c.padding, c.dilation, c.groups, c.bias)
    act, eps = Act.make(unit.act), number(unit.eps, "eps")
    group = joint.name_of(unit.process_group) if unit.training else None
    has = (unit.bn_weight is not None, unit.bn_bias is not None)
    return conv, (act.name, act.param), eps, unit.training, *has, group


def _pool_key(name: str, pool: PoolSpec | None) -> tuple[Any, ...] | None:
    if pool is None:
        return None
    if not isinstance(pool, PoolSpec):
        raise TypeError(f"{name}: expected a PoolSpec or None, got {pool!r}")
    return pool.kernel, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad


def _autocast(x: Tensor, residual: Tensor | None, first: Unit) -> tuple[Tensor, Tensor | None]:
    """Casts x and residual to autocast's dtype inside autocast. Weights stay; kernels round them on use."""
    if not checks.autocasts(x) or x.dtype == torch.float64:
        return x, residual
    dtype = torch.get_autocast_dtype(x.device.type) if first.weight is not None else x.dtype
    return x.to(dtype), residual.to(dtype) if residual is not None else None


def _wants_grad(x: Tensor, residual: Tensor | None, params: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *params))


def in_backward() -> bool:
    """Whether this forward runs inside a backward pass.

    Then it is a checkpoint's recomputation, and the first forward has updated the running statistics.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _counts(x: Tensor, chain: Chain, spec: ChainSpec) -> list[int]:
    """The number of values per channel of each unit's y."""
    return [n * h * w for n, _, h, w in fused_resnet.chain.unit_shapes(x, _params([chain], [spec]), spec)]


@torch.no_grad()
def _update_running(unit: Unit, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    """running = (1 - momentum) running + momentum new, with the unbiased variance and the convolution's bias."""
    if unit.running_mean is None or unit.running_var is None or (isinstance(count, int) and count == 0):
        return
    if unit.bias is not None:
        mean = mean + unit.bias
    momentum = number(unit.momentum, "momentum")
    unit.running_mean.lerp_(mean.to(unit.running_mean.dtype), momentum)
    unit.running_var.lerp_((var * (count / (count - 1))).to(unit.running_var.dtype), momentum)


def _plain(x: Tensor, residual: Tensor | None, units: Sequence[Unit], spec: ChainSpec) -> Tensor:
    """Runs a chain by PyTorch's own functions.

    For an empty batch or image they define the result and the statistics. torch.func's transforms have rules for them.
    """

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
