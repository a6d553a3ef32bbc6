"""BatchNorm folded into 16-bit weights that can't hold the product: frozen and fused models are as near to float64 as
plain PyTorch in the same dtype, and what fits is folded."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import blocks, relative
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.backends import cpu, load, loaded, use_backend
from fused_resnet.chain.folding import fold, fold_weight
from fused_resnet.frozen import forward as frozen_forward

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


class Net(nn.Module):
    """A stem with its pool, a block with a projection, one without, a norm of somebody else's convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24)
        self.down = nn.Sequential(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24))
        self.conv3, self.bn3 = nn.Conv2d(24, 24, 3, padding=1, groups=2), nn.BatchNorm2d(24)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        y = self.act(y)
        z = self.bn3(self.conv3(y))
        z += y
        return self.act(z)


def scaled(bn: nn.BatchNorm2d, gamma: float = 1.0, mean: float = 1.0, var: float = 1.0) -> None:
    """gamma and beta, the running mean and the running variance times so much."""
    bn.weight.data.mul_(gamma)
    bn.bias.data.mul_(gamma)
    bn.running_mean.mul_(mean)
    bn.running_var.mul_(var)


# What is done to a trained network: most often activations of some thousands and, behind them, a scale with which
# weights fall below what fp16 holds, though their products with those activations don't.
LARGE, SMALL = 2e3, 1e-6
CHANGES: dict[str, Callable[[Net], Any]] = {
    "nothing": lambda m: None,
    "tiny gamma": lambda m: (
        scaled(m.stem[1], gamma=LARGE), scaled(m.bn1, gamma=SMALL, mean=LARGE),
        m.conv2.weight.data.mul_(1 / SMALL / LARGE), m.down[0].weight.data.mul_(1 / LARGE),
    ),
    "tiny gamma, pooled": lambda m: (
        scaled(m.stem[1], gamma=SMALL, mean=LARGE),
        *(c.weight.data.mul_(1 / SMALL / LARGE) for c in (m.conv1, m.down[0])),
    ),
    "tiny gamma of the summands": lambda m: (
        scaled(m.stem[1], gamma=LARGE), scaled(m.bn1, gamma=LARGE, mean=LARGE, var=LARGE**2),
        *(scaled(bn, gamma=SMALL, mean=LARGE) for bn in (m.bn2, m.down[1])),
        m.conv3.weight.data.mul_(1 / SMALL / LARGE),
    ),
    "huge variance": lambda m: (
        scaled(m.stem[1], gamma=LARGE), scaled(m.bn1, mean=LARGE, var=SMALL**-2), m.bn1.bias.data.mul_(SMALL * LARGE),
        m.conv2.weight.data.mul_(1 / SMALL / LARGE), m.down[0].weight.data.mul_(1 / LARGE),
    ),
    "tiny variance": lambda m: (scaled(m.bn1, mean=1e-4, var=1e-8), m.conv1.weight.data.mul_(1e-4)),
    "dead channels": lambda m: (m.bn1.running_var[::2].mul_(1e-12), m.conv1.weight.data[::2].mul_(1e-6)),
    "channels of their own": lambda m: (
        scaled(m.stem[1], gamma=LARGE), scaled(m.bn1, mean=LARGE, gamma=1 / LARGE),
        *(p.data[3:].mul_(SMALL * LARGE) for p in (m.bn1.weight, m.bn1.bias)),
        m.conv2.weight.data[:, 3:].mul_(1 / SMALL / LARGE), m.down[0].weight.data.mul_(1 / LARGE),
    ),
    "huge gamma": lambda m: (
        scaled(m.bn1, gamma=1e-3), scaled(m.bn2, gamma=1e6, mean=1e-3), m.bn2.bias.data.mul_(1e-6),
        m.conv2.bias.data.zero_(), m.conv3.weight.data.mul_(1e-2),
    ),
}  # fmt: skip


def trained(change: str) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.5)
            m.running_var.uniform_(0.5, 2)
            m.weight.data.normal_(1, 0.5)
            m.bias.data.normal_(0, 0.5)
    CHANGES[change](model)
    return model


def image(change: str) -> Tensor:
    return (torch.randn(2, 8, 20, 20) + 0.3) * (LARGE if change.endswith("pooled") else 1)


def in_16_bits(model: Net, dtype: torch.dtype) -> Net:
    """The model in ``dtype`` but for its norms, whose statistics that may not hold."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.to(dtype)
    return model


WAYS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "frozen": lambda m, x: fr.freeze(m, x, dtype=x.dtype)(x),
    "frozen, portable": lambda m, x: fr.freeze(m, x, dtype=x.dtype, portable=True)(x),
    "16 bits, frozen": lambda m, x: fr.freeze(in_16_bits(m, x.dtype), x)(x),
    "16 bits, frozen, portable": lambda m, x: fr.freeze(in_16_bits(m, x.dtype), x, portable=True)(x),
    "16 bits, fused": lambda m, x: fr.fuse(in_16_bits(m, x.dtype))(x),
}


def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen 16-bit models hold 16-bit weights, on any CPU."""
    if load("cpu")[0] is not None:
        monkeypatch.setattr(cpu, "compute_dtype", lambda dtype: dtype)


# bfloat16 has float32's range, where nothing is out of it: with --full also for all changes
IN_BFLOAT16 = ("nothing", "tiny gamma of the summands")
NEAR = [
    *((change, torch.float16) for change in CHANGES),
    *(pytest.param(c, torch.bfloat16, marks=[] if c in IN_BFLOAT16 else pytest.mark.full) for c in CHANGES),
]


@pytest.mark.parametrize(("change", "dtype"), NEAR)
def test_as_near_as_plain(change: str, dtype: torch.dtype) -> None:
    """Twice plain PyTorch's error at most, by whatever dtype this CPU computes in, and on PyTorch's operators alone."""
    model, x = trained(change), image(change).to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        theirs = relative(in_16_bits(copy.deepcopy(model), dtype)(x), exact)
        assert theirs < 0.5
        for name, way in WAYS.items():
            ours = relative(way(copy.deepcopy(model), x), exact)
            assert ours <= 2 * theirs, f"{name}: {ours:.2g}, plain PyTorch's {theirs:.2g}"
            with use_backend("aten"):
                ours = relative(way(copy.deepcopy(model), x), exact)
            assert ours <= 2 * theirs, f"{name}, aten: {ours:.2g}, plain PyTorch's {theirs:.2g}"


@DTYPES
def test_folded_channel_by_channel(dtype: torch.dtype) -> None:
    """Each channel as itself, in ``fold_weight``: what is in range is one product; the rest keeps weight and scale."""
    weight = torch.randn(8, 4, 3, 3)
    gamma = torch.tensor([1.0, -1e-6, 1e-3, 1e6, 0.0, 1.0, -2.0, 1e-5])
    mean = torch.tensor([0.0, 0, 0, 0, 0, 9e4, 0, 0])
    p, vectors = {"bn_weight": gamma, "bn_bias": torch.zeros(8)}, loaded("aten")
    norm = fold(p, mean, torch.ones(8), 0.0, torch.float32, vectors)
    got, scale = fold_weight(weight, norm, dtype)
    assert got.dtype == dtype
    outside = [1, 3, 5, 7] if dtype == torch.float16 else []
    inside = [c for c in range(8) if c not in outside]
    torch.testing.assert_close(got[inside], (weight * gamma[:, None, None, None])[inside].to(dtype), rtol=0, atol=0)
    if not outside:
        assert scale is None
        return
    torch.testing.assert_close(got[outside], weight[outside].to(dtype), rtol=0, atol=0)
    assert scale is not None and scale.dtype == torch.float32
    torch.testing.assert_close(scale[outside], gamma[outside])
    assert (scale[inside] == 1).all()


def test_nothing_changes_where_all_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained network's units: a weight and a bias each, whatever the dtype; no pass behind any convolution."""
    native(monkeypatch)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        frozen = fr.freeze(trained("nothing"), torch.randn(1, 8, 20, 20), dtype=dtype, portable=True)
        assert all(unit.scale is None for chain in blocks(frozen) for unit in chain.units)


@DTYPES
def test_rounding_captures_nothing_again(dtype: torch.dtype) -> None:
    """``freeze`` compares with the plain network; where only rounding differs, its one capture serves all calls."""
    x = torch.randn(1, 8, 20, 20)
    frozen = fr.freeze(trained("nothing"), x, dtype=dtype, portable=True)
    frozen(x)
    assert len(frozen.front().graphs) == 1 and not any(p.requires_grad for p in frozen.parameters())


def test_what_a_scale_travels_through() -> None:
    """A frozen model with a scale outside of its weights: copied and saved."""
    model, x = trained("tiny gamma"), image("tiny gamma").half()
    frozen = fr.freeze(model, x, dtype=torch.float16, portable=True)
    assert any(unit.scale is not None for chain in blocks(frozen) for unit in chain.units)
    want = frozen(x)
    assert torch.equal(copy.deepcopy(frozen)(x), want)
    buffer = io.BytesIO()
    torch.save(frozen, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), want)


@pytest.mark.skipif(load("cpu")[0] is None, reason=f"backend cpu: {load('cpu')[1]}")
def test_backends_take_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16-bit weights on any CPU; and what ``explain`` says of it."""
    native(monkeypatch)
    monkeypatch.setattr(frozen_forward, "_algorithm", lambda *_: "")
    monkeypatch.setattr(loaded("cpu"), "prepack", lambda *_: None)
    monkeypatch.setattr(loaded("cpu"), "conv_bias_act", loaded("aten").conv_bias_act)
    for change in ("tiny gamma", "tiny gamma, pooled", "tiny gamma of the summands"):
        model, x = trained(change), image(change).half()
        frozen = fr.freeze(model, x, dtype=torch.float16)
        assert "its scale in a separate pass" in str(fr.explain(frozen))
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            plain = in_16_bits(copy.deepcopy(model), torch.float16)(x)
        assert relative(frozen(x), exact) <= 2 * relative(plain, exact)


def test_values_that_change_are_looked_at_again() -> None:
    """A fused float16 model in evaluation, on a backend that folds in every call: its norms' values decide anew."""
    model, x = trained("nothing").half(), image("nothing").half()
    fused = fr.fuse(copy.deepcopy(model))
    with torch.no_grad(), use_backend("aten"):
        for step in range(3):
            if step:
                for m in (model, fused):
                    m.bn1.weight.mul_(1e-3)
                    m.bn1.bias.mul_(1e-3)
                    m.conv2.weight.mul_(100)
            exact = copy.deepcopy(model).double()(x.double())
            assert relative(fused(x), exact) <= 2 * relative(model(x), exact)
