"""The functional API behaves as conv2d, batch_norm and an activation in a row: values, gradients, statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chains
import pytest
import torch
import torch.nn.functional as F
from functional_cases import (
    BOTH,
    LAYOUTS,
    LEARNT,
    TENSORS,
    Case,
    block,
    fused,
    image,
    outcome,
    plain,
    same,
    unit,
)

from fused_resnet import functional as fr
from fused_resnet import reference
from fused_resnet.functional import Unit
from fused_resnet.spec import ACTIVATIONS, Act, PoolSpec


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
WITH_PARAMETER = [
    ("leaky_relu", 0.3),
    ("leaky_relu", -0.5),
    ("elu", 0.4),
    ("softplus", 3.5),
    ("hardtanh", 3),
    ("celu", -2),
]


@pytest.mark.parametrize("act", [*ACTIVATIONS, *WITH_PARAMETER, None], ids=str)
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
    torch.testing.assert_close(reference.act(z, Act.make("softplus")), F.softplus(z))
    torch.testing.assert_close(reference.act(z, Act.make("hardtanh")), F.hardtanh(z))
    torch.testing.assert_close(reference.act(z, Act.make("celu")), F.celu(z))


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
