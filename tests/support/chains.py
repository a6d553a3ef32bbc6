"""Every shape of chain times every activation times every BatchNorm mode, with inputs that tell mistakes apart.

Inputs have a mean, a variance that is not 1, and gammas of both signs; ``draw`` keeps them away from the kinks of the
activations, where a derivative is anybody's guess and rounding decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import reference
from fused_resnet.base.layouts import channels_last
from fused_resnet.chain.operators import unit_shapes
from fused_resnet.spec import Act, ChainSpec, ConvSpec, PoolSpec, RowSpec, ShortcutSpec, UnitSpec

ACTS: dict[str, Act] = {
    "identity": Act("identity"),
    "relu": Act("relu"),
    "leaky_relu": Act("leaky_relu", 0.2),
    "elu": Act("elu", 0.7),
    "sigmoid": Act("sigmoid"),
    "silu": Act("silu"),
    "relu6": Act("relu6"),
    "hardswish": Act("hardswish"),
    "gelu": Act("gelu"),
    "gelu_tanh": Act("gelu_tanh"),
    "mish": Act("mish"),
    "softplus": Act("softplus", 1.3),
    "tanh": Act("tanh"),
    "hardsigmoid": Act("hardsigmoid"),
    "hardtanh": Act("hardtanh", 0.8),
    "selu": Act("selu"),
    "celu": Act("celu", 0.75),
}
KINKS: dict[str, tuple[float, ...]] = {
    "relu": (0,),
    "leaky_relu": (0,),
    "elu": (0,),
    "relu6": (0, 6),
    "hardswish": (-3, 3),
    "hardsigmoid": (-3, 3),
    "hardtanh": (-0.8, 0.8),
    "selu": (0,),
    "celu": (0,),
}
# Those that every test of all activations takes; of the others, which the same kernels call, each takes some.
COMMON = list(ACTS)[:8]


def some_acts(turn: int) -> list[str]:
    """``COMMON`` and one other activation, each in its turn."""
    others = list(ACTS)[len(COMMON) :]
    return [*COMMON, others[turn % len(others)]]


class Mode(NamedTuple):
    """A way to normalise: this batch's statistics or the running ones, with gamma, beta, a conv bias, or without."""

    batch_stats: bool = True
    gamma: bool = True
    beta: bool = True
    bias: bool = False


MODES: dict[str, tuple[Mode, ...]] = {  # one Mode per unit, repeated in turn
    "batch": (Mode(),),
    "frozen": (Mode(batch_stats=False),),
    "batch-no_affine": (Mode(gamma=False, beta=False),),
    "frozen-no_affine": (Mode(batch_stats=False, gamma=False, beta=False),),
    "batch-gamma_or_beta": (Mode(beta=False), Mode(gamma=False)),
    "frozen-beta_or_gamma": (Mode(batch_stats=False, gamma=False, bias=True), Mode(batch_stats=False, beta=False)),
    "batch-conv_bias": (Mode(bias=True),),
    "frozen-conv_bias": (Mode(batch_stats=False, bias=True),),
    "mixed": (Mode(batch_stats=False), Mode(bias=True), Mode(gamma=False, beta=False)),
}


class Conv(NamedTuple):
    """A convolution: input and output channels as multiples of the width, and what conv2d or conv3d takes."""

    cin: int
    cout: int
    kernel: tuple[int, ...] = (3, 3)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @property
    def deep(self) -> Conv:
        """The same over volumes: what it takes for the height it takes for the depth too."""
        return self._replace(
            **{n: (getattr(self, n)[0], *getattr(self, n)) for n in ("kernel", "stride", "padding", "dilation")}
        )


class Shape(NamedTuple):
    """A kind of chain: its convolutions (None: a unit without), its shortcut, its tail."""

    convs: tuple[Conv | None, ...]
    shortcut: str = "none"
    projection: Conv | None = None
    stride: tuple[int, ...] = (1, 1)
    average: PoolSpec | None = None
    pool: PoolSpec | None = None
    recompute: bool = False

    @property
    def deep(self) -> Shape:
        """The same over volumes."""
        if (average := self.average) is not None:
            window = {n: (getattr(average, n)[0], *getattr(average, n)) for n in ("kernel", "stride", "padding")}
            average = replace(average, **window)
        return self._replace(
            convs=tuple(conv and conv.deep for conv in self.convs), projection=self.projection and self.projection.deep,
            stride=(self.stride[0], *self.stride), average=average,
        )  # fmt: skip


ONE = {"kernel": (1, 1), "padding": (0, 0)}
TWO = (2, 2)
SHAPES: dict[str, Shape] = {
    "conv": Shape((Conv(1, 2),)),
    "conv_asymmetric": Shape((Conv(1, 2, (1, 3), (2, 1), (0, 2)),)),
    "conv_identity": Shape((Conv(1, 1),), "identity"),
    "conv_1x1_identity": Shape((Conv(1, 1, **ONE),), "identity"),
    "conv_residual": Shape((Conv(1, 2),), "tensor"),
    "no_conv": Shape((None,)),
    "no_conv_residual": Shape((None,), "tensor"),
    "no_conv_then_conv": Shape((None, Conv(1, 1)), "identity"),
    "plain": Shape((Conv(1, 2), Conv(2, 1))),
    "basic": Shape((Conv(1, 1), Conv(1, 1)), "identity"),
    "basic_projection": Shape((Conv(1, 2, stride=TWO), Conv(2, 2)), "projection", Conv(1, 2, stride=TWO, **ONE)),
    "bottleneck": Shape((Conv(2, 1, **ONE), Conv(1, 1), Conv(1, 2, **ONE)), "identity"),
    "bottleneck_projection": Shape(
        (Conv(1, 1, **ONE), Conv(1, 1, stride=TWO), Conv(1, 2, **ONE)), "projection", Conv(1, 2, stride=TWO, **ONE)
    ),
    "dilated": Shape((Conv(1, 1, padding=TWO, dilation=TWO), Conv(1, 1, padding=TWO, dilation=TWO)), "identity"),
    "grouped": Shape((Conv(2, 2, **ONE), Conv(2, 2, groups=2), Conv(2, 2, **ONE)), "identity"),
    "option_a": Shape((Conv(1, 2, stride=TWO), Conv(2, 2)), "pad", stride=TWO),
    "resnet_d": Shape(
        (Conv(1, 1, **ONE), Conv(1, 1, stride=TWO), Conv(1, 2, **ONE)),
        "projection",
        Conv(1, 2, **ONE),
        average=PoolSpec.make(2, 2, ceil_mode=True, count_include_pad=False),
    ),
    "stem": Shape((Conv(1, 2),), pool=PoolSpec.make(3, 2, 1)),
    "stem_recompute": Shape((Conv(1, 2),), pool=PoolSpec.make(3, 2, 1), recompute=True),
}
_FLAT = {"stride": (1, 1, 1), "dilation": (1, 1, 1)}
SLICES = _FLAT | {"kernel": (1, 3, 3), "padding": (0, 1, 1)}
ROWS = _FLAT | {"kernel": (3, 1, 1), "padding": (1, 0, 0)}
# Over volumes alone: kernels that are flat in some dimensions, and others in the depth than in the height.
DEEP: dict[str, Shape] = {
    "slices": Shape((Conv(1, 2, **SLICES), Conv(2, 1, **ROWS)), "identity", stride=(1, 1, 1)),
    "slices_strided": Shape(
        (Conv(2, 2, **ROWS | {"stride": (2, 1, 1)}), Conv(2, 2, **SLICES | {"stride": (1, 2, 2)}, groups=2)),
        "projection",
        Conv(2, 2, (1, 1, 1), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
        stride=(1, 1, 1),
    ),
    "windows": Shape(
        (
            Conv(1, 2, (3, 2, 3), (3, 1, 1), (2, 1, 1), (2, 2, 1)),
            Conv(2, 1, (2, 3, 3), (1, 1, 1), (3, 1, 1), (1, 1, 1)),
        ),
        stride=(1, 1, 1),
    ),
}
# The shapes that there are over volumes: a max-pool is PyTorch's there.
VOLUMES = [*DEEP, *(name for name, shape in SHAPES.items() if shape.pool is None)]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
EVERYTHING = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# x and the weights in one layout, or one in each: the chain works in channels_last if anything comes in it.
LAYOUT_PAIRS = {
    "nchw": (torch.contiguous_format, torch.contiguous_format),
    "nhwc": (torch.channels_last, torch.channels_last),
    "x_nchw-weight_nhwc": (torch.contiguous_format, torch.channels_last),
    "x_nhwc-weight_nchw": (torch.channels_last, torch.contiguous_format),
}


@dataclass(frozen=True)
class Chain:
    """A spec with the sizes of the tensors it takes."""

    spec: ChainSpec
    x_shape: tuple[int, ...]
    residual_shape: tuple[int, ...] | None
    param_shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def text(self) -> str:
        return self.spec.encode()

    @property
    def names(self) -> list[str]:
        """x, residual, then the parameters as "<unit>.<name>"."""
        units = [f"{i}.{n}" for i, unit in enumerate(self.spec.all_units) for n in unit.param_names]
        return ["x", "residual", *units]


class Tensors(NamedTuple):
    """What a chain is called with, and the gradient that comes back to it."""

    x: Tensor
    residual: Tensor | None
    params: list[Tensor]
    dout: Tensor

    @property
    def inputs(self) -> list[Tensor | None]:
        return [self.x, self.residual, *self.params]

    def map(self, function: object) -> Tensors:
        assert callable(function)
        return Tensors(
            function(self.x),
            None if self.residual is None else function(self.residual),
            [function(p) for p in self.params],
            function(self.dout),
        )


def make(shape: str, act: str = "relu", mode: str = "batch", width: int = 2, batch: int = 2, size=(4, 3)) -> Chain:
    """The chain of that shape; channels are multiples of ``width``, x is [batch, ?, *size]."""
    kind, modes = SHAPES[shape] if len(size) == 2 else DEEP.get(shape) or SHAPES[shape].deep, MODES[mode]

    def unit(i: int, conv: Conv | None, a: Act) -> UnitSpec:
        m = modes[i % len(modes)]
        if conv is None:
            return UnitSpec(None, a, 1e-5, m.batch_stats, m.gamma, m.beta)
        c = ConvSpec(conv.stride, conv.padding, conv.dilation, conv.groups, m.bias)
        return UnitSpec(c, a, 1e-5, m.batch_stats, m.gamma, m.beta)

    units = tuple(unit(i, conv, ACTS[act]) for i, conv in enumerate(kind.convs))
    first, last = kind.convs[0], kind.convs[-1]
    channels = last.cout * width if last is not None else width
    projection = unit(len(units), kind.projection, Act("identity")) if kind.projection is not None else None
    shortcut = ShortcutSpec(
        kind.shortcut,  # type: ignore[arg-type]
        projection,
        kind.average,
        kind.stride,
        channels if kind.shortcut == "pad" else 0,
    )
    spec = ChainSpec(units, shortcut, kind.pool, kind.recompute)
    convs = [*kind.convs, kind.projection] if projection is not None else list(kind.convs)
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for conv, u in zip(convs, spec.all_units, strict=True):
        out = conv.cout * width if conv is not None else width
        for name in u.param_names:
            if name == "weight":
                assert conv is not None
                shapes.append((name, (out, conv.cin * width // conv.groups, *conv.kernel)))
            else:
                shapes.append((name, (out,)))
    x_shape = (batch, (first.cin if first is not None else 1) * width, *size)
    meta = [torch.empty(s, device="meta") for _, s in shapes]
    ends = unit_shapes(torch.empty(x_shape, device="meta"), meta, spec)
    residual = tuple(ends[len(units) - 1]) if kind.shortcut == "tensor" else None
    return Chain(spec, x_shape, residual, tuple(shapes))


def _param(name: str, shape: tuple[int, ...]) -> Tensor:
    if name == "weight":
        return torch.randn(shape, dtype=torch.float64) * 1.2 / math.sqrt(math.prod(shape[1:]))
    if name == "bn_weight":
        gamma = torch.rand(shape, dtype=torch.float64) + 0.5
        gamma[::2] *= -1
        return gamma
    if name == "running_var":
        return torch.rand(shape, dtype=torch.float64) + 0.5
    return torch.randn(shape, dtype=torch.float64) * 0.5 + 0.2


def _distance(chain: Chain, x: Tensor, residual: Tensor | None, params: list[Tensor]) -> tuple[float, Tensor]:
    """How far the nearest value is from a kink of its activation, or of the max-pool (a tie); and the output."""
    real = reference.act
    seen: list[tuple[Tensor, Act]] = []

    def act(z: Tensor, a: Act) -> Tensor:
        seen.append((z, a))
        return real(z, a)

    with patch.object(reference, "act", act), torch.no_grad():
        out = reference.chain(x, residual, params, chain.spec).out
    if chain.spec.shortcut.kind != "none":
        del seen[-2]  # the last unit's activation without the summand, which nothing uses
    nearest = [math.inf]
    nearest += [(z - kink).abs().min().item() for z, a in seen for kink in KINKS.get(a.name, ())]
    if chain.spec.pool is not None:
        p, last = chain.spec.pool, real(*seen[-1])
        padded = F.pad(last, (p.padding[1],) * 2 + (p.padding[0],) * 2, value=-1e9)
        windows = F.unfold(padded, p.kernel, stride=p.stride).unflatten(1, (last.shape[1], -1))
        top = windows.topk(2, 2).values
        gap = top[:, :, 0] - top[:, :, 1]
        nearest.append(gap[gap != 0].min().item())  # an exact tie is a flat piece of the activation: no gradient
    return min(nearest), out


def draw(chain: Chain, margin: float = 1e-5, attempts: int = 2000, given: Tensor | None = None) -> Tensors:
    """float64 tensors for the chain, no value nearer than ``margin`` to a kink; ``given``: x, not to be drawn."""
    for _ in range(attempts):
        x = torch.randn(chain.x_shape, dtype=torch.float64) * 1.5 + 0.7 if given is None else given
        residual = torch.randn(chain.residual_shape, dtype=torch.float64) - 0.3 if chain.residual_shape else None
        params = [_param(name, shape) for name, shape in chain.param_shapes]
        distance, out = _distance(chain, x, residual, params)
        if distance > margin:
            return Tensors(x, residual, params, torch.randn_like(out) + 0.1)
    raise AssertionError(f"no smooth point in {attempts} attempts")


def cast(chain: Chain, t: Tensors, dtype: torch.dtype, fmt: torch.memory_format = torch.contiguous_format) -> Tensors:
    """The tensors in another dtype and layout; BatchNorm's own stay in float32 beside 16 bits, as in a model."""
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32

    def image(v: Tensor) -> Tensor:
        return in_format(v.to(dtype), fmt)

    params = [
        image(p) if name == "weight" else p.to(dtype if name == "bias" else wide).clone()
        for (name, _), p in zip(chain.param_shapes, t.params, strict=True)
    ]
    return Tensors(image(t.x), None if t.residual is None else image(t.residual), params, image(t.dout))


def learnable(chain: Chain) -> list[bool]:
    """Which of ``Chain.names`` have a gradient: all but running statistics and an absent residual."""
    return [True, chain.residual_shape is not None] + [not n.startswith("running") for n, _ in chain.param_shapes]


def in_layout(chain: Chain, t: Tensors, dtype: torch.dtype, layout: str) -> Tensors:
    """The tensors in a dtype, x's layout and the weights' chosen apart; dout comes in the other one."""
    x_format, weight_format = LAYOUT_PAIRS[layout]
    t = cast(chain, t, dtype, weight_format)
    other = {torch.contiguous_format: torch.channels_last, torch.channels_last: torch.contiguous_format}[x_format]
    return t._replace(x=in_format(t.x, x_format), dout=in_format(t.dout, other))


def in_format(t: Tensor, fmt: torch.memory_format) -> Tensor:
    """An image, or a volume, that is dense in a layout."""
    return t.contiguous(memory_format=channels_last(t) if fmt == torch.channels_last else fmt)


def leaves(chain: Chain, t: Tensors) -> list[Tensor | None]:
    """x, residual and the parameters, all that can learn wanting a gradient; strides kept."""
    return [
        None if v is None else v.detach().requires_grad_(need)
        for v, need in zip(t.inputs, learnable(chain), strict=True)
    ]


def call(chain: Chain, inputs: list[Tensor | None]) -> list[Tensor]:
    """The operator's outputs."""
    return torch.ops.fused_resnet.chain(inputs[0], inputs[1], inputs[2:], chain.text)


def reduction(chain: Chain) -> int:
    """Terms of the longest sum behind an element: a convolution's C*kH*kW or a statistic's N*H*W."""
    meta = [torch.empty(s, device="meta") for _, s in chain.param_shapes]
    shapes = unit_shapes(torch.empty(chain.x_shape, device="meta"), meta, chain.spec)
    counts = [n * math.prod(size) for n, _, *size in shapes]
    taps = [math.prod(s[1:]) for name, s in chain.param_shapes if name == "weight"]
    return max(counts + taps)


def statistics(chain: Chain, params: Sequence[Tensor], outs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor] | None]:
    """(mean, variance) per unit out of the chain operator's outputs, None where running ones served.

    The operator leaves a convolution's bias out of y; it belongs to the mean.
    """
    n_y = sum(u.conv is not None for u in chain.spec.all_units) - int(chain.spec.recompute)
    it = iter(outs[1 + n_y :])
    found: list[tuple[Tensor, Tensor] | None] = []
    for u, p in zip(chain.spec.all_units, chain.spec.split(params), strict=True):
        _, _, mean, _, *rest = (next(it) for _ in range(u.n_vectors))
        found.append((mean + p.get("bias", 0), rest[0]) if u.batch_stats else None)
    return found


def weights(spec: ChainSpec | RowSpec, params: Sequence[Tensor]) -> list[Tensor]:
    """The convolutions' weights among a chain's or a row's parameters."""
    names = [name for unit in spec.all_units for name in unit.param_names]
    return [p for p, name in zip(params, names, strict=True) if name == "weight"]


def run(chain: Chain, t: Tensors, op: object = None) -> dict[str, Tensor]:
    """out, statistics and every gradient, by name, of the operator or of ``op(x, residual, params, spec)``."""
    leaves = t.map(lambda v: v.detach())
    inputs = [
        None if v is None else v.requires_grad_(need) for v, need in zip(leaves.inputs, learnable(chain), strict=True)
    ]
    if op is None:
        outs = torch.ops.fused_resnet.chain(inputs[0], inputs[1], inputs[2:], chain.text)
        out, stats = outs[0], statistics(chain, inputs[2:], outs)
    else:
        assert callable(op)
        out, stats = op(inputs[0], inputs[1], inputs[2:], chain.spec)
    results = {"out": out}
    for i, s in enumerate(stats):
        if s is not None:
            results |= {f"{i}.mean": s[0], f"{i}.var": s[1]}
    named = [(n, v) for n, v in zip(chain.names, inputs, strict=True) if v is not None and v.requires_grad]
    grads = torch.autograd.grad(out, [v for _, v in named], t.dout)
    results |= {f"d {n}": g for (n, _), g in zip(named, grads, strict=True)}
    return {n: v.detach() for n, v in results.items()}


def truth(chain: Chain, t: Tensors) -> dict[str, Tensor]:
    """The same from ``reference`` by autograd, in float64."""
    return run(chain, t.map(lambda v: v.double()), reference.chain)


def plain(x: Tensor, residual: Tensor | None, params: Sequence[Tensor], spec: ChainSpec) -> reference.ChainResult:
    """What a user writes without this package: conv2d, batch_norm, +=, act, in x's dtype."""
    parts = spec.split(params)
    stats: list[tuple[Tensor, Tensor] | None] = []

    def unit(h: Tensor, u: UnitSpec, p: dict[str, Tensor]) -> Tensor:
        y = reference.conv(h, p, u.conv) if u.conv is not None else h
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        mean = p.get("running_mean", torch.zeros(y.shape[1], dtype=wide, device=y.device)).detach().clone()
        var = p.get("running_var", torch.zeros(y.shape[1], dtype=wide, device=y.device)).detach().clone()
        z = F.batch_norm(y, mean, var, p.get("bn_weight"), p.get("bn_bias"), u.batch_stats, 1.0, u.eps)
        count = y.numel() // y.shape[1]
        stats.append((mean, var * ((count - 1) / count)) if u.batch_stats else None)
        return z

    h = x
    for i, (u, p) in enumerate(zip(spec.units, parts, strict=False)):
        h = unit(h, u, p)
        if i + 1 < len(spec.units):
            h = reference.act(h, u.act)
    if spec.shortcut.kind != "none":
        summand = residual if spec.shortcut.kind == "tensor" else reference.shortcut_input(x, spec.shortcut)
        assert summand is not None
        h = h + (unit(summand, spec.shortcut.unit, parts[-1]) if spec.shortcut.unit is not None else summand)
    h = reference.act(h, spec.units[-1].act)
    if spec.pool is not None:
        h = F.max_pool2d(h, spec.pool.kernel, spec.pool.stride, spec.pool.padding)
    return reference.ChainResult(h, stats)
