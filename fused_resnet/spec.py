"""Describes chains in frozen dataclasses, which all other modules use.

A *unit* is conv -> BatchNorm -> activation; a *chain* is k units, an optional shortcut and a closing add + activation.
Specs hold no tensors and no sizes. They are hashable and comparable, and pass through ``torch.library`` operators as
text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import compress, product
from typing import Any, Literal

from fused_resnet.base.activations import ACTIVATIONS as ACTIVATIONS
from fused_resnet.base.activations import Act as Act
from fused_resnet.base.arguments import flag, integer, integers, keep, number

# Shortcut kinds. "identity": the chain's own x; "tensor": a given tensor; "projection": conv + BN of x;
# "pad": option A of the paper, x strided with zero channels appended.
SHORTCUTS = ("none", "identity", "tensor", "projection", "pad")
PARAM_NAMES = ("weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var")
# which of these there are (both or none of the last two) -> their names
_NAMES = {has: tuple(compress(PARAM_NAMES, (*has, has[-1]))) for has in product((False, True), repeat=5)}


@dataclass(frozen=True)
class ConvSpec:
    """The hyper-parameters of a convolution of two or three dimensions, with zero padding only.

    As in ``torch.nn.functional.conv2d`` and ``conv3d``. Convolutions of one dimension run as those of two
    (``chain/signals.py``). ``products``: a choice among algorithms, without meaning for the result. Its bits name the
    passes that run as products of matrices of patches (implicit GEMM), where a backend has them: 1 the output, 2 the
    gradient of the input, 4 that of the weight.
    """

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    bias: bool = False
    products: int = 0

    @staticmethod
    def make(
        weight_shape: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> ConvSpec:
        """Validates and normalises; ``padding`` may be ``"same"`` or ``"valid"``.

        Raises:
            ValueError, TypeError: naming the argument, what came and what was expected.
        """
        dims = len(weight_shape) - 2
        if dims not in (2, 3):
            raise ValueError(
                "weight: expected 4 dimensions [out_channels, in_channels/groups, kH, kW], or one more (kD) or less, "
                f"got shape {tuple(weight_shape)}"
            )
        if weight_shape[0] < 1:
            raise ValueError(f"weight: expected at least one output channel, got shape {tuple(weight_shape)}")
        if min(weight_shape[2:]) < 1:
            raise ValueError(f"weight: expected a kernel of at least 1x1, got shape {tuple(weight_shape)}")
        stride, dilation = integers(stride, "stride", 1, dims), integers(dilation, "dilation", 1, dims)
        groups = integer(groups, "groups")
        if groups < 1 or weight_shape[0] % groups:
            raise ValueError(
                f"groups: expected a positive divisor of the {weight_shape[0]} output channels, got {groups}"
            )
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(dilation, weight_shape[2:], strict=True)]
            if padding not in ("same", "valid"):
                raise ValueError(f"padding: expected ints, 'same' or 'valid', got {padding!r}")
            if padding == "valid":
                padding = 0
            elif max(stride) > 1:
                raise ValueError(f"padding: 'same' is defined for stride 1 only, got stride {stride}")
            elif any(r % 2 for r in reach):
                raise ValueError(
                    "padding: 'same' with an even kernel pads one side more than the other, which a chain does not "
                    f"take: kernel {tuple(weight_shape[2:])}, dilation {dilation}; pad x first"
                )
            else:
                padding = tuple(r // 2 for r in reach)
        return ConvSpec(stride, integers(padding, "padding", 0, dims), dilation, groups, bool(bias))

    @property
    def text(self) -> str:
        """Its text in signatures of the planner's file."""
        fields = f"stride={self.stride},padding={self.padding},dilation={self.dilation},groups={self.groups}"
        return f"conv({fields})".replace(" ", "")

    @property
    def geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        """The last arguments of ``conv2d`` and ``conv3d``: stride, padding, dilation, groups."""
        return self.stride, self.padding, self.dilation, self.groups

    def out_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """The output's (depth,) height and width for an input of ``size`` (the formula of ``torch.nn.Conv2d``)."""
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(size, self.padding, self.dilation, kernel, self.stride, strict=True)
        )

    def out_shape(self, x: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """The shape of the output for an input and a weight of these shapes."""
        return (x[0], weight[0], *self.out_size(x[2:], weight[2:]))


@dataclass(frozen=True)
class PoolSpec:
    """A pooling window of one to three dimensions, as in ``torch.nn.MaxPool2d`` and ``AvgPool2d``.

    The counting flags are AvgPool2d's.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True

    def __post_init__(self) -> None:
        dims = len(self.kernel) if isinstance(self.kernel, tuple) and len(self.kernel) in (1, 3) else 2
        k, p = integers(self.kernel, "pool kernel", 1, dims), integers(self.padding, "pool padding", 0, dims)
        for name, value in (("kernel", k), ("stride", integers(self.stride, "pool stride", 1, dims)), ("padding", p)):
            keep(self, name, value)
        flag(self.ceil_mode, "pool ceil_mode")
        flag(self.count_include_pad, "pool count_include_pad")
        if any(2 * a > b for a, b in zip(p, k, strict=True)):
            raise ValueError(f"pool padding: expected at most half the kernel {k}, got {p}")

    @property
    def text(self) -> str:
        """Its text in signatures of the planner's file."""
        return f"pool({self.kernel},{self.stride},{self.padding})".replace(" ", "")

    @property
    def window(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The arguments of ``max_pool2d``: kernel, stride, padding."""
        return self.kernel, self.stride, self.padding

    def out_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The output's size for an input of ``size`` (the formula of ``torch.nn.AvgPool2d``).

        With ``ceil_mode`` the last window may end outside the padded input, but must begin inside of it.
        """
        found = []
        for n, k, s, p in zip(size, *self.window, strict=True):
            out = (n + 2 * p - k + (s - 1 if self.ceil_mode else 0)) // s + 1
            found.append(out - 1 if self.ceil_mode and (out - 1) * s >= n + p else out)
        return tuple(found)

    @staticmethod
    def make(
        kernel: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        dims: int = 2,
    ) -> PoolSpec:
        """Validates and normalises (``stride=None``, or an empty one, means the kernel size, as in PyTorch).

        ``dims``: the dimensions of the images, 1 to 3.
        """
        k = integers(kernel, "pool kernel", 1, dims)
        s = k if stride is None or (isinstance(stride, list | tuple) and not stride) else stride
        s, p = integers(s, "pool stride", 1, dims), integers(padding, "pool padding", 0, dims)
        return PoolSpec(k, s, p, ceil_mode, count_include_pad)


@dataclass(frozen=True)
class UnitSpec:
    """conv -> BatchNorm -> act: ``z = s*y + t``, ``a = act(z)``, ``s = gamma/sqrt(var + eps)``, ``t = beta - mean*s``.

    ``conv=None``: the convolution is outside the chain, and y is the chain's input. ``batch_stats``: mean and var are
    this batch's (training); otherwise the running ones (frozen or eval). ``bn_weight=False``: gamma = 1;
    ``bn_bias=False``: beta = 0. ``group``: the name of the process group that shares this batch's statistics; None:
    they are this process's own.
    """

    conv: ConvSpec | None
    act: Act  # no default: torch.compile of 2.11 supports only literals
    eps: float = 1e-5
    batch_stats: bool = True
    bn_weight: bool = True
    bn_bias: bool = True
    group: str | None = None

    def __post_init__(self) -> None:
        if self.group is not None and not self.batch_stats:
            raise ValueError(f"process_group: expected None with running statistics, got {self.group!r}")
        keep(self, "eps", number(self.eps, "eps"))
        if self.eps < 0 or (self.eps == 0 and self.batch_stats):
            raise ValueError(f"eps: expected a positive number (with running statistics, 0 too), got {self.eps}")

    @property
    def n_vectors(self) -> int:
        """The number of vectors that are kept: scale, shift, mean and 1/std; of batch statistics the variance too, and
        over a process group the count."""
        return 4 + self.batch_stats + (self.group is not None)

    @property
    def param_names(self) -> tuple[str, ...]:
        """The names of the unit's tensors, in the order of the operators' arguments (``PARAM_NAMES``)."""
        conv, running = self.conv, not self.batch_stats
        return _NAMES[conv is not None, conv is not None and conv.bias, self.bn_weight, self.bn_bias, running]


@dataclass(frozen=True)
class ShortcutSpec:
    """The second summand of the closing add.

    ``unit`` (its act is the identity) and ``pool`` (ResNet-D's average pool before the projection) belong to
    "projection". ``stride`` and ``channels`` (of the sum) belong to "pad", option A.
    """

    kind: Literal["none", "identity", "tensor", "projection", "pad"] = "none"
    unit: UnitSpec | None = None
    pool: PoolSpec | None = None
    stride: tuple[int, ...] = (1, 1)
    channels: int = 0

    def __post_init__(self) -> None:
        dims = len(self.stride) if isinstance(self.stride, tuple) and len(self.stride) == 3 else 2
        keep(self, "stride", integers(self.stride, "shortcut_stride", 1, dims))
        if self.kind not in SHORTCUTS:
            raise ValueError(f"shortcut: expected one of {', '.join(SHORTCUTS)}, got {self.kind!r}")
        if (self.kind == "projection") != (self.unit is not None):
            came = "none" if self.unit is None else "one"
            raise ValueError(
                f"shortcut: expected a unit for 'projection' and for no other, got {came} for {self.kind!r}"
            )
        if self.unit is not None and self.unit.conv is None:
            raise ValueError("shortcut: expected a conv + BatchNorm as projection, got a unit without a conv")
        if self.unit is not None and self.unit.act.name != "identity":
            raise ValueError(f"shortcut: expected a projection without activation, got act {self.unit.act.name!r}")
        if self.pool is not None and self.kind != "projection":
            raise ValueError(f"shortcut_pool: expected None but before a projection, got {self.pool} and {self.kind!r}")
        if self.kind == "pad" and self.channels < 1:
            raise ValueError(f"shortcut: 'pad' needs the channels of the sum, got {self.channels}")


@dataclass(frozen=True)
class ChainSpec:
    """A chain: ``units``, a ``shortcut``, the closing activation and, for the stem, a max-pool after it.

    The closing activation is that of the last unit, applied after the add. ``recompute``: the backward computes the
    first convolution's output again instead of saving it (cheap for the stem, whose output is the network's largest
    tensor).
    """

    units: tuple[UnitSpec, ...]
    shortcut: ShortcutSpec
    pool: PoolSpec | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        if not self.units:
            raise ValueError("units: a chain has at least one unit")
        for i, unit in enumerate(self.units):
            if i and unit.conv is None:
                raise ValueError(f"units: expected a conv in every unit but the first, got none in unit {i}")
        if self.pool is not None and self.shortcut.kind != "none":
            raise ValueError(f"max_pool: expected no shortcut and no residual before it, got {self.shortcut.kind!r}")
        if self.pool is not None and self.pool.ceil_mode:
            raise ValueError("max_pool: expected ceil_mode=False, got True")
        if self.pool is not None and len(self.pool.kernel) != 2:
            raise ValueError(f"max_pool: expected a window of two dimensions, got {self.pool.kernel}")
        if self.pool is not None and math.prod(self.pool.kernel) > 256:
            # the position of a maximum in its window is kept as a byte
            raise ValueError(f"max_pool: expected a window of at most 256 values, got {self.pool.kernel}")
        if self.recompute and self.units[0].conv is None:
            raise ValueError("recompute: the first unit has no conv to compute again")

    @property
    def all_units(self) -> tuple[UnitSpec, ...]:
        """The units, followed by the projection shortcut's."""
        return self.units + ((self.shortcut.unit,) if self.shortcut.unit is not None else ())

    @property
    def frozen(self) -> bool:
        """Whether no unit uses batch statistics. Without gradients BatchNorm then folds into the convolutions."""
        return not any(unit.batch_stats for unit in self.all_units)

    def split(self, params: Sequence[Any]) -> list[dict[str, Any]]:
        """Splits an operator's flat list of tensors into one {name: tensor} per unit of ``all_units``."""
        it = iter(params)
        return [{name: next(it) for name in unit.param_names} for unit in self.all_units]

    @property
    def n_params(self) -> int:
        return sum(len(unit.param_names) for unit in self.all_units)

    @property
    def n_convs(self) -> int:
        """The number of convolutions whose raw outputs are kept for the backward."""
        return sum(unit.conv is not None for unit in self.all_units) - int(self.recompute)

    @property
    def n_saved(self) -> int:
        """The number of tensors that the forward returns beside its output: raw outputs, vectors, pool positions."""
        return self.n_convs + sum(unit.n_vectors for unit in self.all_units) + (self.pool is not None)

    def encode(self) -> str:
        """A row of only this chain, as text."""
        return RowSpec((self,)).encode()


@dataclass(frozen=True)
class RowSpec:
    """Chains in a row: the output of each is the input of the next. An operator takes one row.

    Most rows have one chain. In a longer row every chain begins with a convolution and computes its own summand.
    """

    chains: tuple[ChainSpec, ...]

    def __post_init__(self) -> None:
        if not self.chains:
            raise ValueError("chains: a row has at least one chain")
        if len(self.chains) == 1:
            return
        for i, chain in enumerate(self.chains):
            if chain.pool is not None or chain.shortcut.kind == "tensor" or chain.units[0].conv is None:
                raise ValueError(
                    "chains: expected a conv first, no max-pool and no residual in a row of several, got a chain "
                    f"{i} with {'no conv' if chain.units[0].conv is None else chain.pool or 'a residual'}"
                )

    @property
    def all_units(self) -> list[UnitSpec]:
        """The units of all chains."""
        return [unit for chain in self.chains for unit in chain.all_units]

    @cached_property
    def shares_statistics(self) -> bool:
        """Whether a process group shares the statistics of a unit."""
        return any(unit.group is not None for chain in self.chains for unit in chain.all_units)

    def split(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        """Splits values, one per parameter of the row, into one list per chain."""
        it = iter(values)
        return [[next(it) for _ in range(chain.n_params)] for chain in self.chains]

    def encode(self) -> str:
        """The spec as text (JSON), which operators take."""
        return _encode(self)

    @staticmethod
    def decode(text: str) -> RowSpec:
        """The inverse of ``encode``."""
        return _decode(text)


@lru_cache(maxsize=4096)
def _encode(row: RowSpec) -> str:
    return json.dumps([asdict(chain) for chain in row.chains])


@lru_cache(maxsize=4096)
def _decode(text: str) -> RowSpec:
    return RowSpec(tuple(map(_chain, json.loads(text))))


def _chain(raw: dict[str, Any]) -> ChainSpec:
    given = raw["shortcut"]
    shortcut = _made(ShortcutSpec, given, unit=_unit(given["unit"]), pool=_made(PoolSpec, given["pool"]))
    return ChainSpec(tuple(map(_unit, raw["units"])), shortcut, _made(PoolSpec, raw["pool"]), raw["recompute"])


def _unit(raw: dict[str, Any] | None) -> Any:
    return raw and _made(UnitSpec, raw, conv=_made(ConvSpec, raw["conv"]), act=_made(Act, raw["act"]))


def _made(kind: Callable[..., Any], raw: dict[str, Any] | None, **parts: Any) -> Any:
    """A spec from its decoded fields, with pairs as tuples and the specs that it holds given by ``parts``."""
    if raw is None:
        return None
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()} | parts)
