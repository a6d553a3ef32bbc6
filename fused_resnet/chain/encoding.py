"""Encodes a chain's hyper-parameters: as a key of plain tuples, as a spec, as the text that operators take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from fused_resnet.base.arguments import integers, number
from fused_resnet.chain import checks, sync
from fused_resnet.chain.units import Chain, Unit
from fused_resnet.spec import Act, ChainSpec, ConvSpec, PoolSpec, RowSpec, ShortcutSpec, UnitSpec


def chain_key(
    chain: Chain, x: Sequence[int], residual: Tensor | None, pool: PoolSpec | None, recompute: bool
) -> tuple[Any, ...]:
    """A chain's hyper-parameters, the arguments of ``chain_spec``. ``x``: the shape of its input."""
    dims = len(x) - 2
    projection = isinstance(chain.shortcut, Unit)
    if projection:
        kind = "projection"
    elif residual is not None:
        kind = "tensor"
    else:
        kind = chain.shortcut if isinstance(chain.shortcut, str) else "none"
    weight = chain.units[-1].weight
    return (
        tuple(_key(u, i, dims) for i, u in enumerate(chain.everyone)),
        kind,
        integers(chain.shortcut_stride, "shortcut_stride", 1, dims),
        _pool_key("shortcut_pool", chain.shortcut_pool),
        (weight.shape[0] if weight is not None else x[1]) if kind == "pad" else 0,
        _pool_key("max_pool", pool),
        recompute,
    )


class Rows:
    """The encoded rows of one place in a network, where chains differ from call to call only in their tensors.

    What their tensors and the call decide is the key of a row; the rest is encoded once.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Row] = {}

    @staticmethod
    def key(chains: Sequence[Chain], channels: int, recompute: bool) -> Any:
        """The properties of a call on which its row depends."""
        units = [unit for chain in chains for unit in chain.everyone]
        shapes = [None if unit.weight is None else unit.weight.shape for unit in units]
        return channels, recompute, *shapes, *(sync.name_of(unit.process_group) for unit in units)

    def keep(self, key: Any, row: Row) -> None:
        if len(self.known) >= _KEPT:
            self.known.clear()
        self.known[key] = row


# Rows that one place keeps.
_KEPT = 16


class Row:
    """The specs of chains and their keys, and the texts of parts of the row.

    Attributes:
        choices: for a kind of input the text with the algorithms that are the fastest for it (``choice.py``).
    """

    def __init__(self) -> None:
        self.keys: list[tuple[Any, ...]] = []
        self.specs: list[ChainSpec] = []
        self.texts: dict[tuple[int, int], str] = {}
        self.choices: dict[Any, str] = {}

    def text(self, begin: int, end: int) -> str:
        """The text of the chains from ``begin`` to before ``end``, for operators."""
        found = self.texts.get((begin, end))
        if found is None:
            found = self.texts[begin, end] = encoded(*self.keys[begin:end])
        return found

    def text_with(self, begin: int, end: int, products: Iterable[int]) -> str:
        """The same with ``ConvSpec.products`` of every unit that has a convolution, in the order of the units."""
        of = iter(products)
        return encoded(*((tuple(_with(unit, of) for unit in units), *rest) for units, *rest in self.keys[begin:end]))


def _with(unit: tuple[Any, ...], products: Iterator[int]) -> tuple[Any, ...]:
    conv, *rest = unit
    return unit if conv is None else ((*conv, next(products)), *rest)


def _key(unit: Unit, index: int, dims: int) -> tuple[Any, ...]:
    """A unit's hyper-parameters, the arguments of ``_unit_spec``."""
    checks.check_arguments(unit, index, dims)
    conv = None
    if unit.weight is not None:
        c = ConvSpec.make(
            unit.weight.shape, unit.stride, unit.padding, unit.dilation, unit.groups, unit.bias is not None
        )
        conv = (*c.geometry, c.bias)
    act, eps = Act.make(unit.act), number(unit.eps, "eps")
    group = sync.name_of(unit.process_group) if unit.training else None
    has = (unit.bn_weight is not None, unit.bn_bias is not None)
    return conv, (act.name, act.param), eps, unit.training, *has, group


def _pool_key(name: str, pool: PoolSpec | None) -> tuple[Any, ...] | None:
    if pool is None:
        return None
    if not isinstance(pool, PoolSpec):
        raise TypeError(f"{name}: expected a PoolSpec or None, got {pool!r}")
    return *pool.window, pool.ceil_mode, pool.count_include_pad


def chain_spec(
    keys: tuple[tuple[Any, ...], ...],
    kind: str,
    stride: tuple[int, ...],
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


def _unit_spec(conv: tuple[Any, ...] | None, act: tuple[str, float], *rest: Any) -> UnitSpec:
    return UnitSpec(ConvSpec(*conv) if conv is not None else None, Act(*act), *rest)


def encoded(*keys: tuple[Any, ...]) -> str:
    """The row's spec as text, for operators. It is a constant of a compiled graph, so ``plans`` are plain tuples."""
    return _cached_text(keys)


# Like torch.compiler.assume_constant_result, but without importing all of torch._dynamo.
encoded._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def _cached_text(keys: tuple[tuple[Any, ...], ...]) -> str:
    return RowSpec(tuple(chain_spec(*key) for key in keys)).encode()
