"""The reference in plain PyTorch: every formula of a chain, readable beside the paper (arXiv 1512.03385), not fast.

Autograd differentiates all of it, so the gradients of these functions are the reference too. Imports only torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fused_resnet.spec import Act, ChainSpec, ConvSpec, RowSpec, ShortcutSpec, UnitSpec

# The table of activations: act(z, parameter) by PyTorch's own functions.
ACT: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda z, p: z,
    "relu": lambda z, p: F.relu(z),
    "leaky_relu": lambda z, p: F.leaky_relu(z, p),
    "elu": lambda z, p: F.elu(z, p),
    "sigmoid": lambda z, p: torch.sigmoid(z),
    "silu": lambda z, p: F.silu(z),
    "relu6": lambda z, p: F.relu6(z),
    "hardswish": lambda z, p: F.hardswish(z),
    "gelu": lambda z, p: F.gelu(z),
    "gelu_tanh": lambda z, p: F.gelu(z, approximate="tanh"),
    "mish": lambda z, p: F.mish(z),
    "softplus": lambda z, p: F.softplus(z, p),
    "tanh": lambda z, p: torch.tanh(z),
    "hardsigmoid": lambda z, p: F.hardsigmoid(z),
    "hardtanh": lambda z, p: F.hardtanh(z, -p, p),
    "selu": lambda z, p: F.selu(z),
    "celu": lambda z, p: F.celu(z, p),
}


# By the dimensions of x: those of two and of three spatial dimensions.
CONV: dict[int, Callable[..., Tensor]] = {4: F.conv2d, 5: F.conv3d}
AVG_POOL: dict[int, Callable[..., Tensor]] = {4: F.avg_pool2d, 5: F.avg_pool3d}
Stats = tuple[Tensor, Tensor]
Normalise = Callable[[Tensor, dict[str, Tensor], "UnitSpec"], tuple[Tensor, Stats | None]]


class ChainResult(NamedTuple):
    """out, and per unit (projection last) the batch's mean and biased variance; None if running ones were used."""

    out: Tensor
    stats: list[Stats | None]


def act(z: Tensor, a: Act) -> Tensor:
    """act(z), any shape."""
    return ACT[a.name](z, a.param)


def conv(x: Tensor, p: dict[str, Tensor], c: ConvSpec) -> Tensor:
    """y = conv(x, W) (+ b): torch.nn.functional.conv2d or conv3d, in x's dtype."""
    bias = p["bias"].to(x.dtype) if "bias" in p else None
    return CONV[x.dim()](x, p["weight"].to(x.dtype), bias, *c.geometry)


class _JointSum(torch.autograd.Function):
    """The sum over the processes of a group. Its gradient is summed too: it is that of the sum of all their losses."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: str) -> Tensor:
        ctx.group = group
        return all_reduce(t, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _JointSum.apply(g, ctx.group), None


def all_reduce(t: Tensor, group: str) -> Tensor:
    """The sum of every process's ``t``, with the same bits in all processes."""
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.all_reduce(t.contiguous(), "sum", group))


def _per_channel(v: Tensor, y: Tensor) -> Tensor:
    """A vector [C] that broadcasts to y."""
    return v.view(-1, *[1] * (y.dim() - 2))


def batch_stats(y: Tensor, group: str | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel over N, H, W and over the processes of a group (given by name)."""
    dims = [0, *range(2, y.dim())]

    def total(t: Tensor) -> Tensor:
        return t if group is None else _JointSum.apply(t, group)

    count = total(y.new_full((), y.numel() // y.shape[1]))
    mean = total(y.sum(dims)) / count
    return mean, total((y - _per_channel(mean, y)).square().sum(dims)) / count


def normalise(y: Tensor, p: dict[str, Tensor], unit: UnitSpec) -> tuple[Tensor, Stats | None]:
    """z = gamma * (y - mean) / sqrt(var + eps) + beta, and the statistics if they are this batch's."""
    stats = batch_stats(y, unit.group) if unit.batch_stats else None
    mean, var = stats if stats is not None else (p["running_mean"], p["running_var"])
    z = (y - _per_channel(mean, y)) / _per_channel(torch.sqrt(var + unit.eps), y)
    if unit.bn_weight:
        z = z * _per_channel(p["bn_weight"], y)
    if unit.bn_bias:
        z = z + _per_channel(p["bn_bias"], y)
    return z, stats


def shortcut_input(x: Tensor, shortcut: ShortcutSpec) -> Tensor:
    """x after a shortcut without parameters: option A's strided, zero-padded x, or ResNet-D's average pool."""
    if shortcut.kind == "pad":
        x = x[:, :, *(slice(None, None, s) for s in shortcut.stride)]
        return F.pad(x, (*[0, 0] * len(shortcut.stride), 0, shortcut.channels - x.shape[1]))
    if shortcut.pool is not None:
        p = shortcut.pool
        return AVG_POOL[x.dim()](x, *p.window, p.ceil_mode, p.count_include_pad)
    return x


def chain(
    x: Tensor, residual: Tensor | None, params: Sequence[Tensor], spec: ChainSpec, norm: Normalise = normalise
) -> ChainResult:
    """The whole chain: a_i = act_i(BN_i(conv_i(a_{i-1}))), out = act(BN_k(...) + shortcut(x)), then the max-pool.

    Args:
        x: [N, C, H, W] or [N, C, D, H, W], any layout. residual: the summand of a "tensor" shortcut. params: the flat
        list for ``spec.split``. norm: computes z, in the order of the units, the projection last.
    """
    parts = spec.split(params)
    stats = []
    a = x
    for unit, p in zip(spec.units, parts, strict=False):
        y = conv(a, p, unit.conv) if unit.conv is not None else a
        z, s = norm(y, p, unit)
        stats.append(s)
        a = act(z, unit.act)
    if spec.shortcut.kind != "none":
        summand = residual if spec.shortcut.kind == "tensor" else shortcut_input(x, spec.shortcut)
        assert summand is not None
        if spec.shortcut.unit is not None:
            assert spec.shortcut.unit.conv is not None
            summand, s = norm(conv(summand, parts[-1], spec.shortcut.unit.conv), parts[-1], spec.shortcut.unit)
            stats.append(s)
        a = act(z + summand, spec.units[-1].act)
    if spec.pool is not None:
        a = F.max_pool2d(a, *spec.pool.window)
    return ChainResult(a, stats)


def row(x: Tensor, residual: Tensor | None, params: Sequence[Tensor], spec: RowSpec) -> ChainResult:
    """Runs chains one after the other. Returns the statistics of all units in order."""
    stats = []
    for chain_spec, p in zip(spec.chains, spec.split(params), strict=True):
        x, more = chain(x, residual, p, chain_spec)
        stats += more
    return ChainResult(x, stats)
