"""What is found in a captured graph: units, chains of them, rows of those; and the norms that are left.

unit     a norm, the convolution before it if nobody else uses its output, the activation behind it likewise
chain    units one after the other; closed by an add, whose other summand is a shortcut or another tensor, and its
         activation; or by a max-pool; or by nothing
row      chains one after the other, each one's output used by the next one alone
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from fused_resnet.spec import Act, PoolSpec

IDENTITY = Act("identity")


@dataclass(eq=False)
class UnitMatch:
    """The nodes of a unit.

    Attributes:
        start: the node that it reads. nodes: its own, first to last. norm: the BatchNorm's, which names the unit.
        tensors: field of ``units.Unit`` -> node. options: field -> constant; ``momentum`` may be a node.
        counter: the node that counts the batch, and is part of the unit.
        affine: scale and shift are given ([1, C, 1, 1]) instead of statistics.
    """

    start: fx.Node
    nodes: list[fx.Node]
    norm: fx.Node
    tensors: dict[str, fx.Node]
    options: dict[str, Any]
    act: Act = IDENTITY
    counter: fx.Node | None = None
    affine: bool = False

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def has_conv(self) -> bool:
        return "weight" in self.tensors


@dataclass(eq=False)
class ChainMatch:
    """A chain: ``nodes`` are all that it stands for; ``residual``: the summand of the shortcut "tensor"."""

    units: list[UnitMatch]
    nodes: list[fx.Node]
    shortcut: Literal["none", "identity", "projection", "pad", "tensor"] = "none"
    projection: UnitMatch | None = None
    residual: fx.Node | None = None
    stride: tuple[int, int] = (1, 1)
    avg_pool: PoolSpec | None = None
    max_pool: PoolSpec | None = None
    act: Act = IDENTITY  # behind the add, or the last unit's

    @property
    def start(self) -> fx.Node:
        return self.units[0].start

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def all_units(self) -> list[UnitMatch]:
        return [*self.units, *([self.projection] if self.projection is not None else [])]


@dataclass(eq=False)
class RowMatch:
    """Chains that run as one; ``choice``: whether they do, once the row is lowered."""

    chains: list[ChainMatch]
    choice: Any = None

    @property
    def nodes(self) -> list[fx.Node]:
        return [n for chain in self.chains for n in chain.nodes]

    @property
    def all_units(self) -> list[UnitMatch]:
        return [unit for chain in self.chains for unit in chain.all_units]


@dataclass
class Matches:
    """Attributes: rows: in the graph's order. left: norm -> why it is in none. norms: how many there are."""

    rows: list[RowMatch] = field(default_factory=list)
    left: dict[fx.Node, str] = field(default_factory=dict)
    norms: int = 0
