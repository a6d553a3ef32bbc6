"""Checks and encodes chains (``checked``), then runs them and updates the running statistics (``run_checked``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import reference
from fused_resnet.base.arguments import flag, number
from fused_resnet.base.layouts import channels_last
from fused_resnet.chain import checks, choice, signals
from fused_resnet.chain.encoding import Row, Rows, chain_key, chain_spec, encoded
from fused_resnet.chain.forward import memory_format
from fused_resnet.chain.operators import transformed, unit_shapes
from fused_resnet.chain.units import Chain, Unit
from fused_resnet.spec import ChainSpec, PoolSpec, RowSpec, UnitSpec


def checked(
    x: Tensor,
    chains: Sequence[Chain],
    residual: Tensor | None = None,
    pool: PoolSpec | None = None,
    recompute: bool = False,
    rows: Rows | None = None,
) -> Row:
    """The chains' specs, for ``run_checked``. ``residual``, ``pool`` and ``recompute`` are only for a single chain.

    ``rows``: keeps what was encoded, for calls that differ only in their tensors.

    Raises:
        TypeError, ValueError: a chain does not take these tensors.
    """
    checks.check_tensor("x", x)
    if x.dim() not in (4, 5):
        raise ValueError(
            f"x: expected 4 dimensions [N, C, H, W], 3 [N, C, L] or 5 [N, C, D, H, W], got shape {tuple(x.shape)}"
        )
    flag(recompute, "recompute")
    if type(x) is not Tensor:  # a tracer's tensor: its sizes may be symbols
        rows = None
    about = rows.key(chains, x.shape[1], recompute) if rows is not None else None
    known = rows.known.get(about) if rows is not None else None
    row = known if known is not None else Row()
    shape = tuple(x.shape)
    for i, chain in enumerate(chains):
        if known is None:
            key = chain_key(chain, shape, residual, pool, recompute)
            row.keys.append(key)
            # the compiler's guards can't handle a constant object, so it traces the making of one
            compiled = torch.compiler.is_compiling()
            row.specs.append(chain_spec(*key) if compiled else RowSpec.decode(encoded(key)).chains[0])
        where = f"chain {i}, " if len(chains) > 1 else ""
        shape = checks.check_chain(x, shape, residual, chain.everyone, row.specs[i], where)
    if rows is not None and known is None:
        rows.keep(about, row)
    return row


def run(
    x: Tensor,
    chains: Sequence[Chain],
    residual: Tensor | None = None,
    pool: PoolSpec | None = None,
    recompute: bool = False,
) -> Tensor:
    """Checks and runs the chains; arguments and errors as of ``checked``.

    x may be a signal [N, C, L] too. A max-pool of volumes is PyTorch's, after the chain.
    """
    checks.check_tensor("x", x)
    if x.dim() == 3:
        chains, residual = [signals.chain(chain) for chain in chains], signals.input(residual)
        return signals.output(run(signals.input(x), chains, residual, signals.pool(pool), recompute))
    if x.dim() == 5 and isinstance(pool, PoolSpec):
        return F.max_pool3d(run(x, chains, residual, None, recompute), *pool.window, ceil_mode=pool.ceil_mode)
    return run_checked(x, chains, residual, checked(x, chains, residual, pool, recompute))


def run_checked(x: Tensor, chains: Sequence[Chain], residual: Tensor | None, row: Row) -> Tensor:
    """Runs chains with the specs that ``checked`` gave.

    Volumes run in channels_last, for which the kernels are, and come back in the layout in which PyTorch's convolutions
    would return them.
    """
    if x.dim() == 4 or memory_format(x, _weights(chains)) != torch.contiguous_format:
        return _run(x, chains, residual, row)
    fmt = channels_last(x)
    residual = None if residual is None else residual.contiguous(memory_format=fmt)
    return _run(x.contiguous(memory_format=fmt), chains, residual, row).contiguous()


def _run(x: Tensor, chains: Sequence[Chain], residual: Tensor | None, row: Row) -> Tensor:
    specs = row.specs
    # with a process group an empty batch still takes part in the statistics, for which the others wait
    empty = 0 in x.shape and not any(unit.group for spec in specs for unit in spec.all_units)
    if empty or transformed():
        for chain, spec in zip(chains, specs, strict=True):
            x = _plain(*_autocast(x, residual, chain.units[0]), chain, spec)
        return x
    # Chains whose input and parameters need no gradient run outside the row, because a row saves every intermediate.
    # Without a convolution at the start of each chain there is no row.
    alone = 0 if all(spec.units[0].conv is not None for spec in specs) else len(chains)
    while alone < len(chains) and not _wants_grad(x, residual, _params([chains[alone]], [specs[alone]])):
        alone += 1
    # Those that save nothing, because all their statistics are the running ones, run together.
    frozen = all(spec.frozen for spec in specs[:alone]) and all(spec.units[0].conv is not None for spec in specs)
    step = max(alone, 1) if frozen else 1
    for i in range(0, alone, step):
        x = run_row(x, chains[i : i + step], residual, row, i)
    return x if alone == len(chains) else run_row(x, chains[alone:], residual, row, alone)


def run_row(x: Tensor, chains: Sequence[Chain], residual: Tensor | None, row: Row, begin: int) -> Tensor:
    """Calls one operator, and updates the running statistics. The chains are those of the row from ``begin`` on."""
    end = begin + len(chains)
    specs = row.specs[begin:end]
    x, residual = _autocast(x, residual, chains[0].units[0])
    params = _params(chains, specs)
    text = choice.text(x, params, row, begin, end)
    if all(spec.frozen for spec in specs) and not _wants_grad(x, residual, params):
        return torch.ops.fused_resnet.chain_inference(x, residual, params, text)
    out, *kept = torch.ops.fused_resnet.chain(x, residual, params, text)
    if in_backward():
        return out
    saved = kept[len(chains) - 1 :]
    starts = [x, *kept[: len(chains) - 1]]
    for start, chain, spec in zip(starts, chains, specs, strict=True):
        vectors, saved = saved[spec.n_convs :], saved[spec.n_saved :]
        for unit, s, size in zip(chain.everyone, spec.all_units, _counts(start, chain, spec), strict=True):
            (_, _, mean, _, *stats), vectors = vectors[: s.n_vectors], vectors[s.n_vectors :]
            if s.batch_stats:
                _update_running(unit, mean, stats[0], size if s.group is None else stats[1])
    return out


def _weights(chains: Sequence[Chain]) -> list[Tensor]:
    return [unit.weight for chain in chains for unit in chain.everyone if unit.weight is not None]


def _params(chains: Sequence[Chain], specs: Sequence[ChainSpec]) -> list[Tensor]:
    return [
        getattr(u, name)
        for chain, spec in zip(chains, specs, strict=True)
        for u, s in zip(chain.everyone, spec.all_units, strict=True)
        for name in s.param_names
    ]


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
    return [math.prod(shape[2:], start=shape[0]) for shape in unit_shapes(x, _params([chain], [spec]), spec)]


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


def _plain(x: Tensor, residual: Tensor | None, chain: Chain, spec: ChainSpec) -> Tensor:
    """Runs a chain by PyTorch's own functions.

    For an empty batch or image they define the result and the statistics. torch.func's transforms have rules for them.
    """
    units = iter(chain.everyone)

    def norm(y: Tensor, p: dict[str, Tensor], s: UnitSpec) -> tuple[Tensor, None]:
        u = next(units)
        tensors = u.running_mean, u.running_var, u.bn_weight, u.bn_bias
        return F.batch_norm(y, *tensors, s.batch_stats, u.momentum, s.eps), None

    return reference.chain(x, residual, _params([chain], [spec]), spec, norm).out
