"""Chains in a row, built of ``chains``' shapes: each one's output has the shape of the next one's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import chains
import torch
from torch import Tensor

from fused_resnet import reference
from fused_resnet.chain.operators import unit_shapes
from fused_resnet.spec import RowSpec

# (shape, how many times as wide as the first chain's ``width``): a stage of basic blocks, of bottlenecks, and so on.
ROWS: dict[str, tuple[tuple[str, int], ...]] = {
    "basic_stage": (("basic_projection", 1), ("basic", 2), ("basic", 2)),
    "bottleneck_stage": (("bottleneck_projection", 2), ("bottleneck", 2)),
    "projection_last": (("basic", 1), ("basic_projection", 1)),
    "projections": (("bottleneck_projection", 1), ("basic_projection", 2)),
    "resnet_d": (("bottleneck", 1), ("resnet_d", 2), ("bottleneck", 2)),
    "option_a": (("basic", 1), ("option_a", 1), ("basic", 2)),
    "one_unit": (("conv_identity", 1), ("conv_1x1_identity", 1), ("conv_identity", 1)),
    "plain": (("plain", 1), ("plain", 1)),
    "convs": (("conv", 1), ("conv_asymmetric", 2), ("dilated", 4)),
}


@dataclass(frozen=True)
class Row:
    """What ``chains.Chain`` is, of several."""

    parts: tuple[chains.Chain, ...]

    @property
    def spec(self) -> RowSpec:
        return RowSpec(tuple(part.spec for part in self.parts))

    @property
    def param_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return [shape for part in self.parts for shape in part.param_shapes]

    @property
    def names(self) -> list[str]:
        """x, then the parameters as "<chain>.<unit>.<name>"."""
        return ["x", *(f"{i}.{name}" for i, part in enumerate(self.parts) for name in part.names[2:])]


def make(
    row: str, act: str = "relu", mode: str = "batch", width: int = 2, batch: int = 2, size: tuple[int, int] = (4, 3)
) -> Row:
    """The row of that name."""
    parts: list[chains.Chain] = []
    channels = 0
    for shape, times in ROWS[row]:
        part = chains.make(shape, act, mode, width * times, batch, size)
        assert not parts or part.x_shape[1] == channels, f"{row}: {shape}"
        parts.append(part)
        meta = [torch.empty(s, device="meta") for _, s in part.param_shapes]
        shapes = unit_shapes(torch.empty(part.x_shape, device="meta"), meta, part.spec)
        _, channels, *size_ = shapes[len(part.spec.units) - 1]
        size = (size_[0], size_[1])
    return Row(tuple(parts))


def draw(row: Row, margin: float = 1e-5) -> chains.Tensors:
    """float64 tensors, no value nearer than ``margin`` to a kink: each chain's parameters are drawn until its values,
    from the real output of the chain before, keep away."""
    x: Tensor | None = None
    first: Tensor | None = None
    params: list[Tensor] = []
    for part in row.parts:
        t = chains.draw(part, margin, given=x)
        first = t.x if first is None else first
        x = reference.chain(t.x, None, t.params, part.spec).out
        params += t.params
    assert first is not None and x is not None
    return chains.Tensors(first, None, params, torch.randn_like(x) + 0.1)


def leaves(row: Row, t: chains.Tensors) -> list[Tensor]:
    """x and the parameters, all that can learn wanting a gradient; strides kept."""
    learn = [True, *(not name.startswith("running") for name, _ in row.param_shapes)]
    return [v.detach().requires_grad_(need) for v, need in zip([t.x, *t.params], learn, strict=True)]


def one_by_one(x: Tensor, residual: None, params: Sequence[Tensor], spec: RowSpec) -> Tensor:
    """The same chains, an operator each."""
    for chain, p in zip(spec.chains, spec.split(params), strict=True):
        x = torch.ops.fused_resnet.chain(x, None, p, chain.encode())[0]
    return x


def run(row: Row, t: chains.Tensors, op: object = None) -> dict[str, Tensor]:
    """out and every gradient by name, of the operator or of ``op(x, residual, params, spec)``."""
    inputs = leaves(row, t)
    if op is None:
        out = torch.ops.fused_resnet.chain(inputs[0], None, inputs[1:], row.spec.encode())[0]
    else:
        assert callable(op)
        out = op(inputs[0], None, inputs[1:], row.spec)
        out = out.out if isinstance(out, reference.ChainResult) else out
    named = [(n, v) for n, v in zip(row.names, inputs, strict=True) if v.requires_grad]
    grads = torch.autograd.grad(out, [v for _, v in named], t.dout)
    return {"out": out.detach()} | {f"d {n}": g for (n, _), g in zip(named, grads, strict=True)}


def plain(x: Tensor, residual: None, params: Sequence[Tensor], spec: RowSpec) -> Tensor:
    """What a user writes without this package."""
    for chain, p in zip(spec.chains, spec.split(params), strict=True):
        x = chains.plain(x, None, p, chain).out
    return x


def truth(row: Row, t: chains.Tensors) -> dict[str, Tensor]:
    """The same from ``reference`` by autograd, in float64."""
    return run(row, t.map(lambda v: v.double()), reference.row)


def cast(row: Row, t: chains.Tensors, dtype: torch.dtype, fmt: torch.memory_format) -> chains.Tensors:
    """As ``chains.cast``."""
    return chains.cast(row, t, dtype, fmt)  # type: ignore[arg-type]


def reduction(row: Row) -> int:
    """Terms of the longest sum behind an element."""
    return max(map(chains.reduction, row.parts))
