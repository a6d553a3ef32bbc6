"""What PyTorch's own functions and modules take as a hyper-parameter is taken, with the same result, and what they
refuse is refused: numbers of numpy's, tensors of one value, lists, bools; a norm with gamma alone, or beta alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.functional import Chain, PoolSpec, Unit, bn_act, conv_bn_act, residual_chain, residual_chains
from fused_resnet.models.cifar import ZeroPadShortcut
from fused_resnet.modules import ConvBNAct


class Index:
    """What Python takes as an index, but is no int."""

    def __index__(self) -> int:
        return 2


NUMBERS: dict[str, Any] = {
    "float": 0.25, "int": 1, "zero": 0, "two": 2, "bool": True, "false": False, "negative": -0.1, "above 1": 1.5,
    "nan": math.nan, "np.float16": np.float16(0.25), "np.float32": np.float32(0.3), "np.float64": np.float64(0.3),
    "np.float32 zero": np.float32(0), "np.longdouble": np.longdouble(0.3), "np.int64": np.int64(1),
    "np.uint8": np.uint8(2), "np.bool": np.bool_(True), "np.str": np.str_("0.1"),
    "0-d array": np.array(0.3), "array": np.array([0.3]), "tensor": torch.tensor(0.3), "int tensor": torch.tensor(1),
    "bool tensor": torch.tensor(True), "tensor of 64 bits": torch.tensor(0.3, dtype=torch.float64),
    "vector": torch.tensor([0.3]), "parameter": nn.Parameter(torch.tensor(0.3)), "none": None, "text": "0.1",
    "list": [0.3], "fraction": Fraction(1, 4), "decimal": Decimal("0.25"), "index": Index(), "huge": 10**400,
}  # fmt: skip
INTS: dict[str, Any] = {
    "int": 2, "one": 1, "zero": 0, "negative": -1, "np.int64": np.int64(2), "np.int32": np.int32(1),
    "np.uint8": np.uint8(2), "tensor": torch.tensor(2), "vector of one": torch.tensor([2]), "bool": True,
    "np.bool": np.bool_(True), "float": 2.0, "np.float64": np.float64(2), "float tensor": torch.tensor(2.0),
    "none": None, "index": Index(), "0-d array": np.array(2), "array": np.array([2, 1]), "list": [2, 1],
    "tuple": (1, 2), "size": torch.Size([2, 1]), "list of one": [2], "tuple of one": (2,), "three": (1, 1, 1),
    "empty": (), "empty list": [], "range": range(1, 3), "of np.int64": (np.int64(2), np.int32(1)),
    "of tensors": (torch.tensor(2), torch.tensor(1)), "of a tensor": [torch.tensor(2)], "of floats": (2.0, 1.0),
    "of bools": (True, True), "of np.bool": (np.bool_(True), 1), "of indices": (Index(), Index()),
    "of 0-d arrays": (np.array(2), 1), "of negatives": (-1, 1), "text": "2", "dict": {2: 1, 1: 1},
}  # fmt: skip


def both(name: str, plain: Callable[[], Tensor], ours: Callable[[], Tensor]) -> bool:
    """The same tensor from both, or an error from both, ours naming the argument."""
    try:
        want = plain()
    except Exception as error:
        with pytest.raises((TypeError, ValueError)) as raised:
            ours()
        assert str(raised.value).startswith(name), f"{raised.value} for: {error}"
        return False
    torch.testing.assert_close(ours(), want, equal_nan=True)
    return True


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) + 0.3


X, WEIGHT = drawn(2, 4, 9, 9), drawn(4, 4, 3, 3)
MEAN, VAR = drawn(4), drawn(4).square() + 0.5


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers(value: str) -> None:
    """momentum, eps and the parameters of activations take what PyTorch takes, and nothing else."""
    v = NUMBERS[value]
    for training in (True, False):
        for name in ("momentum", "eps"):

            def call(function: Callable[..., Any], options: dict[str, Any]) -> Tensor:
                mean, var = MEAN.clone(), VAR.clone()
                return torch.cat([function(X, mean, var, **options).flatten(), mean, var])  # noqa: B023

            def plain(x: Tensor, mean: Tensor, var: Tensor, **options: Any) -> Tensor:
                return F.batch_norm(x, mean, var, **options)

            def ours(x: Tensor, mean: Tensor, var: Tensor, **options: Any) -> Tensor:
                return bn_act(x, None, None, mean, var, act=None, **options)

            options = {name: v, "training": training}
            both(name, lambda o=options: call(plain, o), lambda o=options: call(ours, o))
    for act, function in (("leaky_relu", F.leaky_relu), ("elu", F.elu)):
        both(
            "act",
            lambda f=function: f(F.batch_norm(X, MEAN, VAR), v),
            lambda a=act: bn_act(X, None, None, MEAN, VAR, act=(a, v)),
        )


@pytest.mark.parametrize("value", INTS)
def test_ints(value: str) -> None:
    """stride, padding, dilation, groups and pools take what PyTorch takes, and nothing else."""
    v = INTS[value]
    for name in ("stride", "padding", "dilation", "groups"):
        weight = WEIGHT[:, :2] if name == "groups" else WEIGHT
        if name == "groups" and value in ("one", "np.int32"):
            weight = WEIGHT

        def plain(options: dict[str, Any], w: Tensor = weight) -> Tensor:
            return F.batch_norm(F.conv2d(X, w, **options), MEAN, VAR)

        def ours(options: dict[str, Any], w: Tensor = weight) -> Tensor:
            return conv_bn_act(X, w, None, None, MEAN, VAR, act=None, **options)

        both(name, lambda o={name: v}: plain(o), lambda o={name: v}: ours(o))
    z = F.conv2d(X, WEIGHT)
    for name, given in (("kernel", (v,)), ("stride", (4, v)), ("padding", (4, 2, v))):
        want: Callable[[], Tensor] = lambda g=given: F.max_pool2d(F.batch_norm(z, MEAN, VAR), *g)  # noqa: E731
        both(
            f"pool {name}",
            want,
            lambda g=given: conv_bn_act(X, WEIGHT, None, None, MEAN, VAR, act=None, max_pool=PoolSpec.make(*g)),
        )


def test_a_tensor_is_read_in_every_call() -> None:
    """A momentum, an eps and a stride that the caller changes in place, as schedules do: none is remembered."""
    momentum, eps, stride = torch.tensor(0.1), torch.tensor(1e-3), torch.tensor(1)
    for _ in range(3):
        stats = [(MEAN.clone(), VAR.clone()) for _ in range(2)]
        want = F.batch_norm(F.conv2d(X, WEIGHT, None, stride), *stats[0], None, None, True, momentum, eps)
        got = conv_bn_act(
            X, WEIGHT, None, None, *stats[1], stride=stride, act=None, training=True, momentum=momentum, eps=eps
        )
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(stats[1], stats[0])
        momentum += 0.3
        eps *= 30
        stride += 1


# ------------------------------------------------------------------------------------------------------- modules
def prepared(model: nn.Module) -> nn.Module:
    """Gammas of both signs, statistics that are no unit ones, in float64."""
    model.double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            for p in (m.weight, m.bias):
                if p is not None:
                    p.data.normal_(0.2)
    return model


def result(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of three calls: the last output, all gradients, all buffers."""
    x = x.clone().requires_grad_()
    for _ in range(3):
        y = model(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    grads = {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads, **dict(model.named_buffers())}


def same(model: nn.Module, x: Tensor, change: Callable[[nn.Module], Any] | None = None, captured: bool = True) -> None:
    """Fused before and after the ``change``, in training and evaluation, and frozen: the model's numbers."""
    changed = copy.deepcopy(model)
    if change is not None:
        change(changed)
    fused_later = fr.fuse(copy.deepcopy(changed))
    fused_before = fr.fuse(copy.deepcopy(model))
    if change is not None:
        change(fused_before)
    for mode in (True, False):
        want = result(copy.deepcopy(changed).train(mode), x)
        for fused in (fused_later, fused_before):
            rows = fr.explain(fused, x).rows
            assert all(row.fused or "no call of it was captured" in row.reason for row in rows)
            assert all(row.fused for row in rows) or not captured
            got = result(copy.deepcopy(fused).train(mode), x)
            assert got.keys() == want.keys()
            for name in want:
                torch.testing.assert_close(got[name], want[name], msg=lambda text, n=name: f"{n}: {text}")
    want_frozen = copy.deepcopy(changed).eval()(x).detach()
    for m in (changed, fused_later, fused_before):
        for portable in (False, True):
            torch.testing.assert_close(fr.freeze(m, x, portable=portable)(x), want_frozen)


i64, f32 = np.int64, np.float32
NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "np widths": lambda: [nn.Conv2d(i64(3), i64(8), i64(3)), nn.BatchNorm2d(i64(8)), nn.ReLU()],
    "np geometry": lambda: [
        nn.Conv2d(4, 8, (i64(3), i64(5)), i64(2), (i64(2), i64(1)), i64(2), groups=i64(2)), nn.BatchNorm2d(8)
    ],
    "lists": lambda: [nn.Conv2d(3, 8, [3, 1], [2, 1], [1, 0], [1, 2]), nn.BatchNorm2d(8), nn.ReLU()],
    "lists of one": lambda: [nn.Conv2d(3, 8, 3, [2], [1], [2]), nn.BatchNorm2d(8), nn.ReLU()],
    "sizes": lambda: [nn.Conv2d(3, 8, torch.Size([3, 3]), padding=torch.Size([1, 1])), nn.BatchNorm2d(8)],
    "np numbers": lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, f32(1e-2), f32(0.3)), nn.LeakyReLU(f32(0.1))],
    "tensors": lambda: [
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, torch.tensor(1e-2), torch.tensor(0.3)), nn.ELU(torch.tensor(0.5))
    ],
    "int numbers": lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, 1, 1), nn.LeakyReLU(0)],
    "bools": lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, True, True), nn.ELU(True)],
    "no momentum": lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=False), nn.ReLU()],
    "beyond 1": lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=1.5), nn.ReLU()],
    "below 0": lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=-0.1), nn.ReLU()],
    "average": lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU()],
    "pool": lambda: [
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(i64(3), [i64(2)], torch.tensor(1), [1, 1])
    ],
    "pool's stride": lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d([3, 2], [])],
    "no beta": lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, bias=False), nn.ReLU()],
}  # fmt: skip


# Numbers that dynamo does not take for constants: those norms run plain, with the reason.
NOT_CAPTURED = ("np numbers", "tensors", "average")


@pytest.mark.parametrize("name", NETS)
def test_modules(name: str) -> None:
    torch.manual_seed(0)
    model = prepared(nn.Sequential(*NETS[name]()))
    same(model, drawn(2, model[0].in_channels, 13, 12), captured=name not in NOT_CAPTURED)


class Block(nn.Module):
    """A residual block, its norms with gamma alone and beta alone in turn, behind a stem, before another."""

    def __init__(self, projection: bool, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), norm(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), norm(6)
        self.relu = nn.ReLU()
        self.downsample = nn.Sequential(nn.Conv2d(6, 6, 1), norm(6)) if projection else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def halved(model: nn.Module, first: str = "bias") -> None:
    """Norms lose gamma and beta in turn."""
    names = ["bias", "weight"] if first == "bias" else ["weight", "bias"]
    for i, m in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)):
        m.register_parameter(names[i % 2], None)


@pytest.mark.parametrize("first", ["bias", "weight"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_gamma_or_beta(first: str, norm: Any) -> None:
    """In a row of blocks, with a projection and a stem's pool, of both kinds of norm."""
    torch.manual_seed(1)
    stem = [nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    model = prepared(nn.Sequential(*stem, Block(True, norm), Block(False, norm), Block(False, norm)))
    if norm is nn.SyncBatchNorm:  # which evaluates, but trains on GPUs alone
        model.eval()
        halved(model, first)
        x, fused = drawn(2, 3, 13, 12), fr.fuse(copy.deepcopy(model))
        torch.testing.assert_close(fused(x), model(x))
        torch.testing.assert_close(fr.freeze(model, x)(x), model(x).detach())
        return
    same(model, drawn(2, 3, 13, 12), lambda m: halved(m, first))


@pytest.mark.parametrize("given", ["bn_weight", "bn_bias"])
def test_gamma_or_beta_of_functions(given: str) -> None:
    """Of bn_act, residual_chain and residual_chains: output, statistics, the gradient of what is there."""
    vectors = [drawn(4).requires_grad_() for _ in range(4)]

    def pieces(i: int) -> dict[str, Any]:
        return {given: vectors[i], "running_mean": MEAN.clone(), "running_var": VAR.clone(), "training": True}

    def plain_unit(h: Tensor, p: dict[str, Any], weight: Tensor | None) -> Tensor:
        h = h if weight is None else F.conv2d(h, weight, padding=1)
        return F.batch_norm(h, *(p.get(n) for n in ("running_mean", "running_var", "bn_weight", "bn_bias")), True)

    def plain(x: Tensor, p: list[dict[str, Any]]) -> Tensor:
        h = F.relu(plain_unit(x, p[0], None))
        for a, b in ((p[1], p[2]), (p[3], p[0])):
            h = F.relu(plain_unit(F.relu(plain_unit(h, a, WEIGHT)), b, WEIGHT) + h)
        return h

    def ours(x: Tensor, p: list[dict[str, Any]], row: bool) -> Tensor:
        h = bn_act(x, **p[0])
        chains = [Chain([Unit(WEIGHT, padding=1, **q) for q in pair]) for pair in ((p[1], p[2]), (p[3], p[0]))]
        if row:
            return residual_chains(h, chains)
        for chain in chains:
            h = residual_chain(h, chain.units)
        return h

    found = []
    for way in (plain, lambda x, p: ours(x, p, False), lambda x, p: ours(x, p, True)):
        p, x = [pieces(i) for i in range(4)], X.clone().requires_grad_()
        out = way(x, p)
        grads = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), [x, *vectors])
        found.append([out, *grads, *(q[n] for q in p for n in ("running_mean", "running_var"))])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("given", ["bn_weight", "bn_bias"])
def test_gamma_or_beta_under_autocast(given: str) -> None:
    """bfloat16 by autocast: as near to float64 as plain PyTorch, twice over at most."""
    vector = drawn(4).float().requires_grad_()
    x, weight = X.float().requires_grad_(), WEIGHT.float().requires_grad_()
    dout = drawn(2, 4, 7, 7)

    def plain(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        p = {given: v}
        return F.relu(F.batch_norm(F.conv2d(x, w), None, None, p.get("bn_weight"), p.get("bn_bias"), True))

    def grads(way: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        out = way(*inputs)
        return torch.cat([t.flatten().double() for t in (out, *torch.autograd.grad(out, inputs, dout.to(out.dtype)))])

    exact = grads(plain, *(t.detach().double().requires_grad_() for t in (x, weight, vector)))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = grads(plain, x, weight, vector)
        ours = grads(lambda x, w, v: conv_bn_act(x, w, training=True, **{given: v}), x, weight, vector)
    assert 0 < (ours - exact).norm() <= 2 * (theirs - exact).norm()


def test_compiled() -> None:
    """Inside torch.compile: one graph, the same numbers."""
    torch._dynamo.reset()
    stats = [MEAN.clone(), VAR.clone()]

    def function(x: Tensor, gamma: Tensor) -> Tensor:
        first = conv_bn_act(
            x, WEIGHT, gamma, None, *stats, stride=[2, 1], padding=(1,), act=("leaky_relu", 1), training=True,
            momentum=True, eps=1,
        )  # fmt: skip
        return bn_act(first, None, gamma, MEAN, VAR, act="silu")

    gamma = drawn(4)
    got, found = torch.compile(function, backend="aot_eager", fullgraph=True)(X, gamma), [s.clone() for s in stats]
    stats = [MEAN.clone(), VAR.clone()]
    torch.testing.assert_close(got, function(X, gamma))
    torch.testing.assert_close(found, stats)
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------- this package's modules
def test_own_modules() -> None:
    """Widths and sizes that numpy computed."""
    layer = ConvBNAct(i64(3), i64(4), i64(3), dilation=(2, 1), eps=f32(1e-3), act=("leaky_relu", f32(0.1)))
    assert layer(torch.randn(2, 3, 8, 8)).shape == (2, 4, 8, 8)
    net = fr.models.resnet18(num_classes=i64(5), width_per_group=i64(64)).eval()
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(TypeError, match="num_classes must be an int, got np.float64"):
        fr.models.resnet18(num_classes=np.float64(5))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.pad = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), ZeroPadShortcut(i64(2), i64(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x)) + self.pad(x))

    same(prepared(Net()), drawn(2, 3, 9, 8))


def test_wrong_values_in_modules() -> None:
    """What PyTorch's modules refuse when they are called, fused ones do, by name."""

    def broken(name: str, value: Any, of: int) -> nn.Module:
        model = fr.fuse(prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.1))))
        setattr(model[of], name, value)
        return model

    x = drawn(2, 3, 8, 8)
    for of, name, value in (
        (0, "stride", 1.5), (0, "stride", "2"), (0, "groups", True), (0, "groups", 2), (1, "eps", "1e-5"),
        (1, "eps", None), (1, "momentum", "0.1"), (2, "negative_slope", "0.1"), (2, "negative_slope", [0.1]),
    ):  # fmt: skip
        model = broken(name, value, of)
        found = []
        for m in (fr.unfuse(copy.deepcopy(model)), model):
            try:
                found.append(m(x))
            except Exception as error:
                found.append((type(error), str(error)))
        if isinstance(found[0], Tensor):
            torch.testing.assert_close(found[1], found[0])
        else:
            assert found[1] == found[0]
    with pytest.raises(ValueError, match="eps must be"):  # PyTorch's own error
        fr.freeze(broken("eps", -1.0, 1), x)
