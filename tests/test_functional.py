"""The functional API behaves as conv2d, batch_norm and an activation in a row: values, gradients, statistics."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import chains
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_as_good, assert_close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_resnet import functional as fr
from fused_resnet import reference
from fused_resnet.functional import Unit
from fused_resnet.spec import ACTIVATIONS, Act, PoolSpec

TENSORS = ("weight", "bn_weight", "bn_bias", "running_mean", "running_var", "bias")
LEARNT = ("weight", "bn_weight", "bn_bias", "bias")
LAYOUTS = chains.LAYOUTS


# ------------------------------------------------------------------------------------------------------- both ways
@dataclass
class Case:
    """A call: x, units (two or three make a block), and how the block closes."""

    x: Tensor
    units: list[Unit]
    residual: Tensor | None = None
    shortcut: str | Unit | None = None
    max_pool: PoolSpec | None = None
    recompute: bool = False

    @property
    def everyone(self) -> list[Unit]:
        return [*self.units, self.shortcut] if isinstance(self.shortcut, Unit) else list(self.units)

    def clone(self, dtype: torch.dtype | None = None) -> Case:
        """Tensors of its own (strides, offsets and expansion kept), in ``dtype`` if given."""

        def fresh(v: Any) -> Any:
            if isinstance(v, Unit):
                return Unit(**{f.name: fresh(getattr(v, f.name)) for f in fields(v)})
            if isinstance(v, Tensor):
                same = v.detach().to(dtype) if dtype is not None and dtype != v.dtype else copy.copy(v.detach())
                return same.requires_grad_(v.requires_grad)
            return v

        case = replace(self, x=fresh(self.x), residual=fresh(self.residual), shortcut=fresh(self.shortcut))
        case.units = [fresh(u) for u in self.units]
        for unit in case.everyone:
            for name in ("running_mean", "running_var"):
                value = getattr(unit, name)
                setattr(unit, name, value.clone() if value is not None else None)
        return case


def fused(c: Case) -> Tensor:
    """The functional API."""
    if len(c.units) > 1 or (c.shortcut is not None):
        return fr.residual_chain(c.x, c.units, shortcut=c.shortcut, residual=c.residual)
    (u,) = c.units
    options = {n: getattr(u, n) for n in ("act", "training", "momentum", "eps")} | {"residual": c.residual}
    bn = [getattr(u, n) for n in TENSORS[1:5]]
    if u.weight is None:
        return fr.bn_act(c.x, *bn, **options)
    options |= {n: getattr(u, n) for n in ("bias", "stride", "padding", "dilation", "groups")}
    return fr.conv_bn_act(c.x, u.weight, *bn, max_pool=c.max_pool, recompute=c.recompute, **options)


def plain(c: Case) -> Tensor:
    """PyTorch's own functions in a row."""

    def normalised(h: Tensor, u: Unit) -> Tensor:
        if u.weight is not None:
            h = F.conv2d(h, u.weight, u.bias, u.stride, u.padding, u.dilation, u.groups)
        return F.batch_norm(h, u.running_mean, u.running_var, u.bn_weight, u.bn_bias, u.training, u.momentum, u.eps)

    h = c.x
    for i, u in enumerate(c.units):
        h = normalised(h, u)
        if i + 1 == len(c.units):
            if isinstance(c.shortcut, Unit):
                h = h + normalised(c.x, c.shortcut)
            elif c.shortcut == "identity":
                h = h + c.x
            elif c.residual is not None:
                h = h + c.residual
        h = reference.act(h, Act.make(u.act))
    return F.max_pool2d(h, c.max_pool.kernel, c.max_pool.stride, c.max_pool.padding) if c.max_pool is not None else h


def outcome(way: Callable[[Case], Tensor], case: Case, dout: Tensor | None) -> dict[str, Tensor]:
    """out, running statistics and, with a ``dout``, the gradients, after one call."""
    c = case.clone(dout.dtype if dout is not None and dout.dtype == torch.float64 else None)
    out = way(c)
    found = {"out": out.detach()}
    leaves: dict[str, Tensor | None] = {"x": c.x, "residual": c.residual}
    for i, u in enumerate(c.everyone):
        leaves |= {f"{i}.{n}": getattr(u, n) for n in LEARNT}
        found |= {f"{i}.{n}": getattr(u, n) for n in ("running_mean", "running_var") if getattr(u, n) is not None}
    wanted = {n: v for n, v in leaves.items() if v is not None and v.requires_grad}
    if dout is not None and out.requires_grad:
        grads = torch.autograd.grad(out, list(wanted.values()), dout, allow_unused=True)
        found |= {f"d {n}": g if g is not None else torch.zeros_like(wanted[n]) for n, g in zip(wanted, grads)}
    return found


def terms(c: Case) -> int:
    """The longest sum behind an element."""
    taps = [math.prod(u.weight.shape[1:]) for u in c.everyone if u.weight is not None]
    return max([c.x.numel() // c.x.shape[1], *taps])


def same(case: Case, grad: bool = True, names: set[str] | None = None) -> dict[str, Tensor]:
    """The fused call equals the plain one, computed in float64: output, statistics, gradients."""
    with torch.no_grad():
        shape = plain(case.clone()).shape
    dout = torch.randn(shape, dtype=case.x.dtype) + 0.1 if grad else None
    got = outcome(fused, case, dout)
    wide = replace(case, x=case.x.double(), residual=case.residual.double() if case.residual is not None else None)
    wide.units = [in_float64(u) for u in case.units]
    wide.shortcut = in_float64(case.shortcut) if isinstance(case.shortcut, Unit) else case.shortcut
    want = outcome(plain, wide, dout.double() if dout is not None else None)
    assert got.keys() == want.keys()
    for name in want:
        assert_close(name, got[name], want[name], terms(case))
        assert got[name].dtype == case.x.dtype, f"{name}: {got[name].dtype}"
    return got


def in_float64(u: Unit) -> Unit:
    def wide(v: Any) -> Any:
        return v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v

    return Unit(**{f.name: wide(getattr(u, f.name)) for f in fields(u)})


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) * 1.5 + 0.7).to(dtype).requires_grad_()


def unit(cin: int | None, cout: int, kernel: int | tuple[int, int] = 3, **options: Any) -> Unit:
    """A training unit with gammas of both signs; ``cin=None``: without a convolution. Tensors may be overridden."""
    k = (kernel, kernel) if isinstance(kernel, int) else kernel
    groups = options.get("groups", 1)
    gamma = torch.rand(cout) + 0.5
    gamma[::2] *= -1
    made: dict[str, Any] = {
        "bn_weight": gamma.requires_grad_(),
        "bn_bias": (torch.randn(cout) * 0.5).requires_grad_(),
        "running_mean": torch.randn(cout),
        "running_var": torch.rand(cout) + 0.5,
        "training": True,
        "act": "silu",
    }
    if cin is not None:
        weight = torch.randn(cout, cin // groups, *k) / math.sqrt(cin // groups * k[0] * k[1])
        made |= {"weight": weight.requires_grad_(), "padding": (k[0] // 2, k[1] // 2)}
    return Unit(**made | options)


def block(cin: int = 4, width: int = 3, **options: Any) -> list[Unit]:
    """A bottleneck's three units."""
    return [unit(cin, width, 1, **options), unit(width, width, 3, **options), unit(width, cin, 1, **options)]


BOTH = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


# ------------------------------------------------------------------------------------------------------- BatchNorm
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.75, 1.0, 1])
def test_momentum(backend: str, momentum: float) -> None:
    """running = (1 - momentum) running + momentum new, at the ends of the range too."""
    same(Case(image(3, 4, 5, 5), [unit(4, 6, momentum=momentum)]))


def test_running_variance_is_unbiased(backend: str) -> None:
    """With momentum 1 the running variance is y.var() over N-1, not over N."""
    x = torch.randn(2, 3, 2, 2) * 2
    mean, var = torch.zeros(3), torch.zeros(3)
    fr.bn_act(x, running_mean=mean, running_var=var, training=True, momentum=1.0)
    torch.testing.assert_close(var, x.transpose(0, 1).flatten(1).var(1, unbiased=True))
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))


@BOTH
@pytest.mark.parametrize("conv", [True, False], ids=["conv", "no_conv"])
def test_no_affine(backend: str, conv: bool, training: bool) -> None:
    """gamma and beta None: ones and zeros."""
    same(Case(image(3, 4, 5, 5), [unit(4 if conv else None, 4, bn_weight=None, bn_bias=None, training=training)]))


def test_no_running_statistics(backend: str) -> None:
    """running_mean and running_var None in training: normalised by the batch, nothing kept."""
    same(Case(image(3, 4, 5, 5), [unit(4, 6, running_mean=None, running_var=None)]))


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5, 1])
def test_eps(backend: str, eps: float) -> None:
    """eps is inside the root, of whatever size."""
    same(Case(image(3, 4, 5, 5), [unit(4, 6, eps=eps)]))


def test_frozen_inside_a_training_graph(backend: str) -> None:
    """BatchNorm by running statistics with gradients flowing: dx, dW, dgamma, dbeta right, statistics untouched."""
    case = Case(image(3, 4, 6, 6), block(training=False), shortcut="identity")
    got = same(case)
    assert torch.equal(got["1.running_mean"], case.units[1].running_mean)
    assert torch.equal(got["1.running_var"], case.units[1].running_var)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_one_frozen_unit_among_training_ones(backend: str, frozen: int) -> None:
    """One unit of a block by running statistics, the others by the batch's."""
    units = block()
    units[frozen].training = False
    same(Case(image(3, 4, 6, 6), units, shortcut="identity"))


@BOTH
def test_conv_bias(backend: str, training: bool) -> None:
    """A bias before BatchNorm moves the running mean; its gradient is exactly zero in training, frozen s*sum dz."""
    case = Case(image(3, 4, 5, 5), [unit(4, 6, bias=torch.randn(6).requires_grad_(), training=training)])
    got = same(case)
    assert got["d 0.bias"].any() != training


def test_conv_bias_in_a_block(backend: str) -> None:
    """The same for every convolution of a block with a projection, whose bias has statistics of its own."""
    units = [unit(4, 5, bias=torch.randn(5).requires_grad_()), unit(5, 6, bias=torch.randn(6).requires_grad_())]
    same(Case(image(3, 4, 5, 5), units, shortcut=unit(4, 6, 1, bias=torch.randn(6).requires_grad_(), act=None)))


@BOTH
@pytest.mark.parametrize("gamma", [0.0, -1.5, -0.0])
def test_gamma(backend: str, gamma: float, training: bool) -> None:
    """gamma = 0 (a zero-initialised residual branch) and gamma < 0."""
    units = block(training=training, act="relu")
    units[2].bn_weight = torch.full((4,), gamma).requires_grad_()
    units[0].bn_weight = torch.tensor([gamma, 1.0, -1.0]).requires_grad_()
    same(Case(image(3, 4, 6, 6), units, shortcut="identity"))


def test_zero_variance(backend: str) -> None:
    """A constant channel: the variance is 0 and eps alone divides."""
    x = image(3, 4, 5, 5)
    with torch.no_grad():
        x[:, 1] = 0.25
    same(Case(x, [unit(None, 4)]))


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 3, 3)])
@pytest.mark.parametrize("where", ["no_conv", "conv", "second", "shortcut"])
def test_one_value_per_channel(backend: str, shape: tuple[int, ...], where: str) -> None:
    """Training on one value per channel is PyTorch's error, wherever in the chain, and no statistic has moved."""
    kernel = shape[2] if shape[2] > 1 else 1
    valid = {"padding": 0, "kernel": kernel}
    cases = {
        "no_conv": Case(torch.randn(1, 4, 1, 1), [unit(None, 4)]),
        "conv": Case(torch.randn(shape), [unit(4, 4, **valid)]),
        "second": Case(torch.randn(shape), [unit(4, 4, 1, training=shape[2] > 1), unit(4, 4, **valid)]),
        "shortcut": Case(
            torch.randn(shape),
            [unit(4, 4, **valid, training=False)],
            shortcut=unit(4, 4, **valid, act=None),
        ),
    }
    case = cases[where]
    before = case.clone()
    with pytest.raises(ValueError, match="[Ee]xpected more than 1 value per channel when training"):
        plain(case.clone())
    with pytest.raises(ValueError, match="expected more than 1 value per channel when training, got input size"):
        fused(case)
    for a, b in zip(case.everyone, before.everyone, strict=True):
        assert torch.equal(a.running_mean, b.running_mean) and torch.equal(a.running_var, b.running_var)
    for u in case.everyone:
        u.training = False
    same(case)  # in eval one value is enough


# ------------------------------------------------------------------------------------------------------ convolution
GEOMETRY: dict[str, dict[str, Any]] = {
    "stride": {"stride": 2},
    "stride_pair": {"stride": (1, 3), "padding": (2, 0)},
    "stride_list": {"stride": [2, 1], "padding": [0, 1]},
    "dilation": {"dilation": 2, "padding": 2},
    "dilation_pair": {"dilation": (1, 2), "padding": (1, 3)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "same": {"padding": "same"},
    "same_dilated": {"padding": "same", "dilation": (2, 3)},
    "valid": {"padding": "valid"},
    "kernel_2x2": {"kernel": 2, "padding": 0},
    "kernel_4x2": {"kernel": (4, 2), "padding": (2, 1)},
    "kernel_1x7": {"kernel": (1, 7)},
    "kernel_6x6_stride_2": {"kernel": 6, "padding": 2, "stride": 2},
    "kernel_as_large_as_x": {"kernel": (7, 6), "padding": 0},
    "padding_beyond_kernel": {"kernel": 1, "padding": 2},
    "stride_beyond_kernel": {"kernel": 1, "stride": 3},
}


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRY)
def test_geometry(backend: str, geometry: str, layout: str, training: bool) -> None:
    """Strides, padding, dilation, groups, 'same' and even kernels: conv2d's, in both layouts."""
    x = image(3, 4, 7, 6).detach().contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    same(Case(x, [unit(4, 8, training=training, **GEOMETRY[geometry])]))


@pytest.mark.parametrize("geometry", ["stride", "dilation", "groups", "kernel_2x2", "padding_beyond_kernel"])
def test_padding_is_zero_after_the_activation(backend: str, geometry: str) -> None:
    """A unit's padding is a zero of its activated input, not act(t): the second unit of a chain is told apart."""
    first = unit(4, 4, act="sigmoid")  # sigmoid of anything is not 0
    second = unit(4, 8, **GEOMETRY[geometry])
    same(Case(image(3, 4, 7, 6), [first, second]))


def test_conv_reads_the_same_bias_free_y(backend: str) -> None:
    """x with a large constant: the convolution's and the mean's own sums cancel to what fp64 says."""
    x = (torch.randn(3, 4, 6, 6) + 50).requires_grad_()
    case = Case(x, [unit(4, 6, padding=0, act=None)])
    got, want = (outcome(way, case, None) for way in (fused, plain))
    torch.testing.assert_close(got["out"], want["out"], rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ activations
VALUES = torch.tensor([-100.0, -6, -3.01, -3, -2.99, -1, -1e-3, -0.0, 0, 1e-3, 1, 2.99, 3, 3.01, 5.99, 6, 6.01, 100])


@pytest.mark.parametrize("act", [*ACTIVATIONS, ("leaky_relu", 0.3), ("leaky_relu", -0.5), ("elu", 0.4), None], ids=str)
def test_activation_values(backend: str, act: Any) -> None:
    """act and its derivative, kinks and tails included: those of PyTorch's own functions at the same z."""
    for n in (1, 3, 17):  # vector bodies and tails
        x = VALUES.repeat(n)[:, None].expand(-1, 2).reshape(1, n * len(VALUES), 2, 1).transpose(1, 2).contiguous()
        mean, var = torch.zeros(2), torch.full((2,), 1 - 2**-10)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = fr.bn_act(a, running_mean=mean, running_var=var, act=act, eps=2**-10)  # z = x exactly
        want = reference.act(b, Act.make(act))
        torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
        dout = torch.rand_like(out) + 0.5
        out.backward(dout)
        want.backward(dout)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)


@BOTH
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_in_a_block(backend: str, act: str, training: bool) -> None:
    """Every activation inside a bottleneck and after its add, drawn off the kinks."""
    chain = chains.make("bottleneck", act, "batch" if training else "frozen", width=2, batch=3, size=(5, 4))
    t = chains.draw(chain)
    units = []
    for p in chain.spec.split(t.params):
        free = {n: v.requires_grad_() for n, v in p.items() if n in LEARNT}
        stats = {n: p.get(n, torch.ones(len(p["bn_weight"]), dtype=torch.float64)) for n in TENSORS[3:5]}
        padding = p["weight"].shape[-1] // 2
        units.append(Unit(**free, **stats, padding=padding, act=chains.ACTS[act], training=training))
    same(Case(t.x.requires_grad_(), units, shortcut="identity"))


def test_default_activation_parameters() -> None:
    """The parameter of a bare name is PyTorch's default."""
    z = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(reference.act(z, Act.make("leaky_relu")), F.leaky_relu(z))
    torch.testing.assert_close(reference.act(z, Act.make("elu")), F.elu(z))


# ------------------------------------------------------------------------------------------------- shortcuts, stem
@BOTH
def test_residual_tensor(backend: str, training: bool) -> None:
    """Somebody else's summand, after a convolution and without one."""
    same(Case(image(3, 4, 5, 5), [unit(4, 6, training=training)], residual=image(3, 6, 5, 5)))
    same(Case(image(3, 4, 5, 5), [unit(None, 4, training=training)], residual=image(3, 4, 5, 5)))
    same(Case(image(3, 4, 5, 5), block(training=training), residual=image(3, 4, 5, 5)))


@BOTH
def test_projection(backend: str, training: bool) -> None:
    """A 1x1 convolution with BatchNorm and stride 2 on the shortcut."""
    units = [unit(4, 5, stride=2, training=training), unit(5, 6, training=training)]
    same(Case(image(3, 4, 7, 6), units, shortcut=unit(4, 6, 1, stride=2, act=None, training=training)))


@BOTH
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
def test_option_a(backend: str, stride: Any, training: bool) -> None:
    """The paper's parameter-free shortcut: x strided, zero channels appended."""
    units = [unit(4, 6, stride=stride, training=training), unit(6, 6, training=training)]
    s = (stride, stride) if isinstance(stride, int) else stride
    x = image(3, 4, 7, 6)
    results = []
    for way in ("fused", "plain"):
        c = Case(x, units).clone()
        if way == "fused":
            out = fr.residual_chain(c.x, c.units, shortcut="pad", shortcut_stride=stride)
        else:
            out = plain(replace(c, residual=F.pad(c.x[:, :, :: s[0], :: s[1]], (0, 0, 0, 0, 0, 2))))
        grads = torch.autograd.grad(out.square().sum(), [c.x, *(getattr(u, n) for u in c.units for n in LEARNT[:3])])
        results.append([out, *grads, *(u.running_var for u in c.units)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@BOTH
def test_resnet_d_shortcut(backend: str, training: bool) -> None:
    """An average pool before a 1x1 projection of stride 1."""
    units = [unit(4, 5, stride=2, training=training), unit(5, 6, training=training)]
    projection = unit(4, 6, 1, act=None, training=training)
    pool = PoolSpec.make(2, 2, ceil_mode=True, count_include_pad=False)
    x = image(3, 4, 7, 6)
    a, b = (Case(x, units, shortcut=projection).clone() for _ in range(2))
    got = fr.residual_chain(a.x, a.units, shortcut=a.shortcut, shortcut_pool=pool)
    p = b.shortcut
    assert isinstance(p, Unit)
    pooled = F.conv2d(F.avg_pool2d(b.x, 2, 2, ceil_mode=True, count_include_pad=False), p.weight)
    summand = F.batch_norm(pooled, p.running_mean, p.running_var, p.bn_weight, p.bn_bias, training, p.momentum, p.eps)
    want = plain(replace(b, shortcut=None, residual=summand))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.everyone[2].running_var, p.running_var)
    leaves = [[c.x, *(getattr(u, n) for u in c.everyone for n in LEARNT[:3])] for c in (a, b)]
    for g, w in zip(*(torch.autograd.grad(o.square().sum(), v) for o, v in zip((got, want), leaves)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("pool", [(3, 2, 1), (2, 2, 0), ((2, 3), (1, 2), (1, 0)), (5, 1, 2)], ids=str)
def test_stem(backend: str, pool: Any, recompute: bool, layout: str, training: bool) -> None:
    """Convolution, BatchNorm, activation and max-pool in one, with the output kept or computed again."""
    x = image(2, 3, 9, 8).detach().contiguous(memory_format=LAYOUTS[layout])
    case = Case(x, [unit(3, 5, training=training)], max_pool=PoolSpec.make(*pool), recompute=recompute)
    same(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pool_ties(backend: str, layout: str) -> None:
    """Equal maxima (zeros after relu, saturated relu6): the gradient goes where PyTorch sends it, to the first."""
    x = torch.randint(-2, 3, (2, 3, 9, 8)).float().contiguous(memory_format=LAYOUTS[layout])
    for act in ("relu", "relu6", "identity"):
        u = unit(3, 3, 1, act=act, training=False, running_mean=torch.zeros(3), running_var=torch.ones(3))
        u.weight = torch.eye(3)[:, :, None, None].clone()
        u.bn_weight, u.bn_bias = torch.full((3,), 4.0), torch.zeros(3)
        same(Case(x.clone().requires_grad_(), [u], max_pool=PoolSpec.make(3, 2, 1)))


# ------------------------------------------------------------------------------------------------------- inputs
def offset(v: Tensor) -> Tensor:
    """The same values, one element off the allocation's start: not aligned to anything but the element."""
    flat = torch.empty(v.numel() + 1, dtype=v.dtype)
    flat[1:] = v.detach().flatten()
    return flat[1:].view(v.shape)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda v: v,
    "nhwc": lambda v: v.contiguous(memory_format=torch.channels_last),
    "sliced_channels": lambda v: torch.cat([v, v + 1], 1)[:, : v.shape[1]],
    "sliced_pixels": lambda v: torch.stack([v, v + 1], -1).flatten(3)[..., ::2],
    "sliced_nhwc": lambda v: torch.cat([v, v], 3).contiguous(memory_format=torch.channels_last)[..., : v.shape[3]],
    "expanded_batch": lambda v: v[:1].expand(v.shape),
    "expanded_channels": lambda v: v[:, :1].expand(v.shape),
    "expanded_pixels": lambda v: v[:, :, :1, :1].expand(v.shape),
    "misaligned": offset,
    "misaligned_nhwc": lambda v: offset(v.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2),
    "transposed": lambda v: v.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_inside": lambda v: v.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@BOTH
@pytest.mark.parametrize("view", INPUTS)
def test_input_views(backend: str, view: str, training: bool) -> None:
    """x, residual and weights of any strides and offset give the values of plain PyTorch, and stay as they are."""
    x, residual = (INPUTS[view](torch.randn(3, 4, 5, 6) * 1.5 + 0.7).detach() for _ in range(2))
    bits = x.clone()
    # equal channels are one channel to a 1x1 convolution, whose gradient before BatchNorm is then all rounding
    kernel = 3 if view == "expanded_channels" else 1
    bottleneck = [unit(4, 3, kernel, training=training), *block(training=training)[1:]]
    for units in ([unit(None, 4, training=training)], [unit(4, 4, training=training)], bottleneck):
        same(Case(x.requires_grad_(), units, residual=residual.requires_grad_()))
    weight = INPUTS[view](torch.randn(4, 4, 3, 3) / 6).detach().requires_grad_()
    same(Case(x, [unit(4, 4, weight=weight, training=training)]))
    assert torch.equal(x, bits)


@BOTH
def test_strided_vectors(backend: str, training: bool) -> None:
    """gamma, beta, bias and running statistics may be strided, expanded or misaligned; in-place updates reach them."""
    for view in (lambda v: torch.stack([v, v + 1], 1)[:, 0], offset):
        tensors = {n: view(torch.rand(6) + 0.5) for n in TENSORS[1:]}
        case = Case(image(3, 4, 5, 5), [unit(4, 6, training=training, **tensors)])
        got, want = (outcome(way, case, None) for way in (fused, plain))
        for name in want:
            torch.testing.assert_close(got[name], want[name])
    mean, var = torch.zeros(8)[::2], torch.ones(8)[::2]
    x = torch.randn(2, 4, 3, 3)
    fr.bn_act(x, running_mean=mean, running_var=var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    ones = torch.ones(1).expand(4)
    got = fr.bn_act(x, ones, torch.zeros(1).expand(4), torch.zeros(1).expand(4), ones, act=None)
    torch.testing.assert_close(got, x / math.sqrt(1 + 1e-5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 5, 8, 17, 65])
def test_channels(backend: str, channels: int, layout: str) -> None:
    """Channel counts that no vector width divides, training and eval, in a block and in a stem."""
    for training in (True, False):
        x = image(2, channels, 5, 3).detach().contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        same(Case(x, block(channels, 5, training=training), shortcut="identity"))
        same(Case(x, [unit(channels, channels, training=training)], max_pool=PoolSpec.make(3, 2, 1)))
        same(Case(x, [unit(None, channels, training=training)], residual=image(2, channels, 5, 3)))


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_pixel(backend: str, layout: str, training: bool) -> None:
    """1x1 images: the statistics are those of the batch."""
    x = image(5, 4, 1, 1).detach().to(memory_format=LAYOUTS[layout]).requires_grad_()
    same(Case(x, block(training=training), shortcut="identity"))
    same(Case(x, [unit(None, 4, training=training)]))
    same(Case(x, [unit(4, 6, 1, training=training)]))


@pytest.mark.parametrize("shape", [(7, 3, 65, 3), (1, 1, 257, 1), (130, 2, 1, 1), (2, 33, 13, 11), (1, 2, 40, 50)])
def test_odd_sizes(backend: str, shape: tuple[int, ...]) -> None:
    """Sizes around the blocks into which reductions are cut, in both layouts."""
    for fmt in LAYOUTS.values():
        x = image(*shape).detach().contiguous(memory_format=fmt).requires_grad_()
        same(Case(x, [unit(None, shape[1])]))
        # a 1x1 convolution of one channel before BatchNorm has no gradient but for eps: rounding is all there is to see
        kernel = 1 if shape[1] > 1 else 3
        same(Case(x, [unit(shape[1], 3, kernel), unit(3, shape[1], 1)], shortcut="identity"))


@BOTH
@pytest.mark.parametrize("kind", ["conv", "no_conv", "block", "projection", "stem", "residual"])
def test_empty_batch(backend: str, kind: str, training: bool) -> None:
    """A batch of 0 is plain PyTorch's: shapes, zero gradients, statistics as PyTorch leaves them."""
    x = image(0, 4, 6, 6)
    case = {
        "conv": lambda: Case(x, [unit(4, 6, training=training, bias=torch.randn(6).requires_grad_())]),
        "no_conv": lambda: Case(x, [unit(None, 4, training=training)]),
        "block": lambda: Case(x, block(training=training), shortcut="identity"),
        "projection": lambda: Case(
            x,
            [unit(4, 6, stride=2, training=training)],
            shortcut=unit(4, 6, 1, stride=2, act=None, training=training),
        ),
        "stem": lambda: Case(x, [unit(4, 6, training=training)], max_pool=PoolSpec.make(3, 2, 1)),
        "residual": lambda: Case(x, [unit(None, 4, training=training)], residual=image(0, 4, 6, 6)),
    }[kind]()
    got = same(case)
    assert got["out"].shape[0] == 0
    with torch.no_grad():
        assert torch.equal(fused(case.clone()), got["out"])


def test_empty_image(backend: str) -> None:
    """No pixels, without a convolution before: as PyTorch, and the statistics stay finite."""
    case = Case(image(2, 4, 0, 3), [unit(None, 4)])
    got = same(case)
    assert torch.equal(got["0.running_mean"], case.units[0].running_mean)


# ------------------------------------------------------------------------------------------------- NaN and infinity
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@BOTH
def test_nonfinite_goes_where_pytorch_sends_it(backend: str, act: str, value: float, training: bool) -> None:
    """One NaN or infinity in x: every output, statistic and gradient is NaN, infinite or finite as in plain PyTorch.

    Two liberties: an infinity in a mean may come out as NaN (partial means of blocks are merged); and a gradient at a
    NaN may be NaN where ATen's is not (its vector loops and their remainders disagree for elu and hardswish).
    """
    x = torch.randn(2, 4, 5, 5)
    x[1, 2, 3, 3] = value
    for u in (unit(4, 3, act=act, training=training), unit(None, 4, act=act, training=training)):
        for pool in (None, PoolSpec.make(3, 2, 1)) if u.weight is not None else (None,):
            case = Case(x.clone().requires_grad_(), [u], max_pool=pool)
            dout = torch.randn_like(plain(case.clone()))
            got, want = (outcome(way, case, dout) for way in (fused, plain))
            with torch.no_grad():
                got["inference"], want["inference"] = fused(case.clone()), want["out"]
            for name in want:
                g, w = got[name], want[name]
                if name.endswith(("running_mean", "running_var")):
                    assert torch.equal(g.isfinite(), w.isfinite()), f"{name}: {g}, plain {w}"
                    continue
                assert g[w.isnan()].isnan().all(), f"a NaN lost in {name}"
                if not (name.startswith("d ") and act in ("elu", "hardswish")):
                    assert w[g.isnan()].isnan().all(), f"a NaN more in {name}"
                assert torch.equal(g[w.isinf()], w[w.isinf()]), f"infinity in {name}"


def test_nan_survives_relu_and_max_pool(backend: str) -> None:
    """No NaN is clipped to 0 or passed over by a maximum, whatever its place in the window."""
    mean, var = torch.zeros(3), torch.ones(3)
    weight = torch.eye(3)[:, :, None, None].clone()
    for layout, place in itertools.product(LAYOUTS.values(), range(9)):
        x = torch.rand(1, 3, 3, 3).contiguous(memory_format=layout)
        x[0, 1, place // 3, place % 3] = math.nan
        want = torch.conv2d(x, weight).amax((2, 3)).isnan()
        for w in (weight, weight.clone().requires_grad_()):  # inference, training graph
            out = fr.conv_bn_act(x, w, torch.ones(3), torch.zeros(3), mean, var, act="relu", max_pool=PoolSpec.make(3))
            assert torch.equal(out.flatten(1).isnan(), want), f"place {place}, gradient {w.requires_grad}"


# ------------------------------------------------------------------------------------------------ autograd, autocast
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpointing_updates_statistics_once(backend: str, reentrant: bool) -> None:
    """Under gradient checkpointing the block runs twice, the running statistics move once, gradients are the same."""
    case = Case(image(3, 4, 6, 6), block(), shortcut="identity")
    plainly, again = case.clone(), case.clone()
    fused(plainly).square().sum().backward()
    checkpoint(lambda x: fused(replace(again, x=x)), again.x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(again.x.grad, plainly.x.grad)
    for a, b in zip(again.units, plainly.units, strict=True):
        assert torch.equal(a.running_mean, b.running_mean)
        assert torch.equal(a.running_var, b.running_var)
        torch.testing.assert_close(a.weight.grad, b.weight.grad)
        torch.testing.assert_close(a.bn_weight.grad, b.bn_weight.grad)


def test_a_forward_after_a_backward_updates_again(backend: str) -> None:
    """What tells a recomputation from a training step is being inside a backward pass, not having had one."""
    u = unit(None, 4)
    for _ in range(2):
        before = u.running_mean.clone()
        fused(Case(image(3, 4, 5, 5), [u])).sum().backward()
        assert not torch.equal(u.running_mean, before)


def second_order(way: Callable[[Case], Tensor], case: Case, scale: float = 1.0) -> list[Tensor]:
    """The gradients g of scale*|out|^2 by all that can learn, and those of |g|^2."""
    c = case.clone()
    out = way(c)
    leaves = [c.x, c.residual, *(getattr(u, n) for u in c.everyone for n in LEARNT)]
    leaves = list({id(v): v for v in leaves if v is not None and v.requires_grad}.values())
    first = torch.autograd.grad(out.square().sum() * scale, leaves, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]


@BOTH
@pytest.mark.parametrize("kind", ["block", "projection", "no_conv", "stem", "shared", "twice"])
def test_double_backward(backend: str, kind: str, training: bool) -> None:
    """Second derivatives are right, also where one tensor comes in twice (a residual that is x, a shared weight)."""
    x = image(3, 4, 5, 5, dtype=torch.float64)
    units = [in_float64(u) for u in block(training=training)]
    kernel = (torch.randn(4, 4, 3, 3, dtype=torch.float64) / 6).requires_grad_()
    case = {
        "block": lambda: Case(x, units, shortcut="identity"),
        "projection": lambda: Case(x, units, shortcut=in_float64(unit(4, 4, 1, act=None, training=training))),
        "no_conv": lambda: Case(
            x, [in_float64(unit(None, 4, training=training))], residual=x.detach().requires_grad_()
        ),
        "stem": lambda: Case(x, units[:1], max_pool=PoolSpec.make(3, 2, 1), recompute=True),
        "shared": lambda: Case(x, [in_float64(unit(None, 4, training=training))]),
        "twice": lambda: Case(x, [in_float64(unit(4, 4, training=training)) for _ in range(2)]),
    }[kind]()

    def tied(way: Callable[[Case], Tensor]) -> Callable[[Case], Tensor]:
        def call(c: Case) -> Tensor:
            if kind == "shared":
                c.residual = c.x
            if kind == "twice":
                for u in c.units:
                    u.weight = kernel
            return way(c)

        return call

    for got, want in zip(second_order(tied(fused), case), second_order(tied(plain), case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_double_backward_16_bit(backend: str, dtype: torch.dtype) -> None:
    """A gradient penalty in 16 bits is as good as plain PyTorch's."""
    results: list[list[list[Tensor]]] = [[], [], []]
    for _ in range(7):
        low = Case(image(3, 4, 6, 6, dtype=dtype), block(), shortcut="identity")
        for u in low.units:
            u.weight = u.weight.detach().to(dtype).requires_grad_()
        wide = replace(low, x=low.x.detach().double().requires_grad_(), units=[in_float64(u) for u in low.units])
        for found, way, case in zip(results, (fused, plain, plain), (low, low, wide), strict=True):
            found.append(second_order(way, case, 1e-2))
    for i in range(len(results[0][0])):
        got, theirs, want = ([draw[i] for draw in found] for found in results)
        assert_as_good(f"gradient {i}", got, theirs, want, dtype)


def test_same_tensor_twice(backend: str) -> None:
    """A residual that is x, and one weight in two units: the gradients of both places add up."""
    x, u = image(3, 4, 5, 5), unit(4, 4)
    for units, residual in (([unit(None, 4)], True), ([u, replace(u)], False)):
        results = []
        for way in (fused, plain):
            case = Case(x, units).clone()
            case.residual = case.x if residual else None
            if not residual:
                case.units[1].weight = case.units[0].weight
            leaf = [case.x] + ([] if residual else [case.units[0].weight])
            results.append(torch.autograd.grad(way(case).square().sum(), leaf))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_saved_tensor_changed_in_place(backend: str) -> None:
    """What the backward needs and somebody overwrote is an error, not a wrong gradient."""
    u = unit(4, 4, training=False)
    out = fused(Case(image(2, 4, 5, 5), [u]))
    u.running_mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["stem", "block", "projection", "no_conv"])
@BOTH
def test_autocast(backend: str, kind: str, dtype: torch.dtype, training: bool) -> None:
    """Under autocast: plain PyTorch's output dtype, fp32 gradients and statistics, errors at most twice its own."""
    cases: dict[str, Callable[[], Case]] = {
        "stem": lambda: Case(image(4, 8, 10, 9), [unit(8, 16, training=training)]),
        "block": lambda: Case(image(4, 8, 10, 9, dtype=dtype), block(8, 8, training=training), shortcut="identity"),
        "projection": lambda: Case(
            image(4, 8, 10, 9),
            [unit(8, 12, stride=2, training=training), unit(12, 16, training=training)],
            shortcut=unit(8, 16, 1, stride=2, act=None, training=training),
        ),
        "no_conv": lambda: Case(image(4, 8, 10, 9), [unit(None, 8, training=training)]),
    }
    draws = [cases[kind]() for _ in range(9)]
    got, low, want = [], [], []
    for case in draws:
        wide = replace(case, x=case.x.detach().double().requires_grad_(), units=[in_float64(u) for u in case.units])
        wide.shortcut = in_float64(case.shortcut) if isinstance(case.shortcut, Unit) else case.shortcut
        dout = torch.randn(plain(wide.clone()).shape)
        want.append(outcome(plain, wide, dout.double()))
        for way, results in ((fused, got), (plain, low)):

            def under_autocast(c: Case, way: Callable[[Case], Tensor] = way) -> Tensor:
                with torch.autocast("cpu", dtype):
                    return way(c)

            with torch.autocast("cpu", dtype):
                probe = way(case.clone())
            results.append(outcome(under_autocast, case, dout.to(probe.dtype)))
    for name in want[0]:
        assert got[0][name].dtype == low[0][name].dtype, name
        assert_as_good(name, *([r[name] for r in results] for results in (got, low, want)), dtype)
    assert got[0]["out"].dtype == (torch.float32 if kind == "no_conv" else dtype)


def test_autocast_leaves_float64_alone(backend: str) -> None:
    """Autocast never lowers fp64."""
    case = Case(image(2, 4, 5, 5, dtype=torch.float64), [in_float64(unit(4, 6))])
    want = fused(case.clone())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(case.clone()), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bn_dtype", ["fp32", "same"])
@BOTH
def test_16_bit_with_either_batchnorm(backend: str, bn_dtype: str, dtype: torch.dtype, training: bool) -> None:
    """16-bit x and weights with BatchNorm tensors in fp32 or in 16 bits too: every gradient in its tensor's dtype."""
    u = unit(4, 6, training=training)
    u.weight = u.weight.detach().to(dtype).requires_grad_()
    if bn_dtype == "same":
        for name in TENSORS[1:5]:
            value = getattr(u, name)
            setattr(u, name, value.detach().to(dtype).requires_grad_(value.requires_grad))
    case = Case(image(3, 4, 5, 5, dtype=dtype), [u])
    dout = torch.randn(3, 6, 5, 5, dtype=dtype)
    got = outcome(fused, case, dout)
    assert got["out"].dtype == got["d x"].dtype == got["d 0.weight"].dtype == dtype
    for name in ("bn_weight", "bn_bias"):
        assert got[f"d 0.{name}"].dtype == getattr(u, name).dtype
    wide = replace(case, x=case.x.detach().double().requires_grad_(), units=[in_float64(u)])
    want = outcome(plain, wide, dout.double())
    for name in want:
        torch.testing.assert_close(got[name].double(), want[name], rtol=0, atol=0.06 * want[name].abs().max().item())


# ------------------------------------------------------------------------------------------------ inference, state
@BOTH
def test_no_grad_is_the_same(backend: str, training: bool) -> None:
    """Without gradients (folded inference included), in inference mode and with them: the same values."""
    for case in (
        Case(image(3, 4, 6, 6), block(training=training), shortcut="identity"),
        Case(image(3, 4, 6, 6), [unit(4, 5, training=training)], max_pool=PoolSpec.make(3, 2, 1)),
        Case(image(3, 4, 6, 6), [unit(None, 4, training=training)], residual=image(3, 4, 6, 6)),
    ):
        want = outcome(fused, case, None)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = outcome(fused, case, None)
            for name in want:
                torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


@BOTH
def test_output_is_nobody_elses(backend: str, training: bool) -> None:
    """The output shares no memory with an argument, even where the chain is the identity."""
    x = torch.randn(2, 3, 4, 4)
    for residual in (None, x):
        out = fr.bn_act(
            x, None, None, torch.zeros(3), torch.ones(3), residual=residual, act=None, training=training, eps=1e-5
        )
        assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_layout(backend: str, layout: str) -> None:
    """The output comes in x's layout, channels_last in channels_last."""
    fmt = LAYOUTS[layout]
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=fmt)
    for case in (
        Case(x, [unit(None, 4)]),
        Case(x, [unit(4, 4)]),
        Case(x, block(), shortcut="identity"),
        Case(x, [unit(4, 5)], max_pool=PoolSpec.make(3, 2, 1)),
        Case(x, block(training=False), shortcut="identity"),
    ):
        assert fused(case).is_contiguous(memory_format=fmt)
        with torch.no_grad():
            assert fused(case).is_contiguous(memory_format=fmt)


def test_statistics_untouched_after_an_error(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the last kernel of a block leaves the running statistics of the first unit as they were."""
    import fused_resnet.chain_forward

    case = Case(image(3, 4, 6, 6), block(), shortcut="identity")
    before = case.clone()
    real = fused_resnet.chain_forward.run

    def run(primitive: str, *args: Any) -> Any:
        if primitive == "bn_act":
            raise RuntimeError("out of memory")
        return real(primitive, *args)

    monkeypatch.setattr(fused_resnet.chain_forward, "run", run)
    with pytest.raises(RuntimeError, match="out of memory"):
        fused(case)
    for a, b in zip(case.units, before.units, strict=True):
        assert torch.equal(a.running_mean, b.running_mean) and torch.equal(a.running_var, b.running_var)


def test_steps_of_training(backend: str) -> None:
    """Ten SGD steps on a block: the same losses, weights and statistics as plain PyTorch."""
    case = Case(torch.randn(4, 4, 6, 6), block(), shortcut="identity")
    target = torch.randn(4, 4, 6, 6)
    losses: list[list[float]] = []
    ends = []
    for way in (fused, plain):
        c = case.clone()
        for u in c.units:
            for n in LEARNT[:3]:
                setattr(u, n, getattr(u, n).detach().clone().requires_grad_())
        optimizer = torch.optim.SGD([getattr(u, n) for u in c.units for n in LEARNT[:3]], 0.05, 0.9)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.mse_loss(way(c), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        ends.append([getattr(u, n) for u in c.units for n in TENSORS[:5]])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)
    assert losses[0][-1] < losses[0][0]
    for got, want in zip(*ends, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
