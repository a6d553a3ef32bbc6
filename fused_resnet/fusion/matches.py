"""The parts of a captured graph that the matcher finds, and the norms that are in none.

unit     a norm; the convolution before it, if only the norm uses its output; the activation after it, if only that uses
         the norm's output; for inference the squeeze-and-excitation after that
chain    units one after the other; closed by an add and its activation, where the add's other summand is a shortcut or
         another tensor; or closed by a max-pool; or by nothing
row      chains one after the other, where only the next chain uses a chain's output; for inference with the
         classifier's head after them
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from fused_resnet.spec import Act, PoolSpec

IDENTITY = Act("identity")


@dataclass(eq=False)
class ExcitationMatch:
    """The nodes of a squeeze-and-excitation. ``tensors``: weight and bias of the first convolution, then of the second;
    None: no bias. ``acts``: the activations after them."""

    nodes: list[fx.Node]
    tensors: tuple[fx.Node, fx.Node | None, fx.Node, fx.Node | None]
    acts: tuple[Act, Act]


@dataclass(eq=False)
class UnitMatch:
    """The nodes of a unit. A signal's geometry is that of an image (``chain/signals.py``).

    Attributes:
        start: the node that the unit reads. nodes: its nodes, first to last. norm: the BatchNorm's node; it identifies
            the unit.
        tensors: field of ``units.Unit`` -> node. options: field -> constant; ``momentum`` may be a node.
        counter: the node that counts the batch; it belongs to the unit.
        affine: scale and shift ([1, C, 1, 1]) are given instead of statistics. excitation: after the activation.
    """

    start: fx.Node
    nodes: list[fx.Node]
    norm: fx.Node
    tensors: dict[str, fx.Node]
    options: dict[str, Any]
    act: Act = IDENTITY
    counter: fx.Node | None = None
    affine: bool = False
    excitation: ExcitationMatch | None = None

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def dims(self) -> int:
        """The dimensions of its images: 1 for a signal [N, C, L]."""
        return int(self.norm.meta["example_value"].dim()) - 2

    @property
    def has_conv(self) -> bool:
        return "weight" in self.tensors

    @property
    def reads(self) -> list[fx.Node]:
        """Its tensors, without its input."""
        behind = self.excitation.tensors if self.excitation is not None else ()
        return [*self.tensors.values(), *(t for t in behind if t is not None)]


@dataclass(eq=False)
class ChainMatch:
    """A chain. ``nodes``: all nodes that it replaces. ``residual``: the summand of the shortcut "tensor"."""

    units: list[UnitMatch]
    nodes: list[fx.Node]
    shortcut: Literal["none", "identity", "projection", "pad", "tensor"] = "none"
    projection: UnitMatch | None = None
    residual: fx.Node | None = None
    stride: tuple[int, ...] = (1, 1)
    avg_pool: PoolSpec | None = None
    max_pool: PoolSpec | None = None
    act: Act = IDENTITY  # after the add, or the last unit's

    @property
    def start(self) -> fx.Node:
        return self.units[0].start

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def dims(self) -> int:
        """The dimensions of its images."""
        return self.units[0].dims

    @property
    def all_units(self) -> list[UnitMatch]:
        return [*self.units, *([self.projection] if self.projection is not None else [])]


@dataclass(eq=False)
class HeadMatch:
    """The nodes of a classifier's head: the mean of each channel, and a linear layer of the means."""

    nodes: list[fx.Node]
    weight: fx.Node
    bias: fx.Node | None

    @property
    def reads(self) -> list[fx.Node]:
        return [self.weight, *([self.bias] if self.bias is not None else [])]


@dataclass(eq=False)
class RowMatch:
    """Chains that run as one, and the head after them.

    Attributes:
        choice: set when the row is lowered; it decides whether they do.
    """

    chains: list[ChainMatch]
    head: HeadMatch | None = None
    choice: Any = None

    @property
    def nodes(self) -> list[fx.Node]:
        behind = self.head.nodes if self.head is not None else []
        return [n for chain in self.chains for n in chain.nodes] + behind

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def reads(self) -> set[fx.Node]:
        """All values that the row reads from outside."""
        tensors = {t for unit in self.all_units for t in unit.reads}
        tensors |= {*self.head.reads} if self.head is not None else set()
        computed = {m for u in self.all_units if isinstance(m := u.options["momentum"], fx.Node)}
        residuals = {chain.residual for chain in self.chains if chain.residual is not None}
        return tensors | computed | residuals | {self.chains[0].start}

    @property
    def all_units(self) -> list[UnitMatch]:
        return [unit for chain in self.chains for unit in chain.all_units]


@dataclass
class Matches:
    """Attributes: rows: in the graph's order. left: norm -> why it is in no row. norms: the number of norms."""

    rows: list[RowMatch] = field(default_factory=list)
    left: dict[fx.Node, str] = field(default_factory=dict)
    norms: int = 0
