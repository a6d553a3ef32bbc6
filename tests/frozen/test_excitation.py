"""Squeeze-and-excitation in frozen rows: the operator beside its formula, and the networks that have one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import FREEZINGS, close_to_plain, frozen_beside_plain, prepared
from primitives import image
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.backends import load
from fused_resnet.backends.steps import AVERAGED, Excitation, Excited
from fused_resnet.spec import ACTIVATIONS, Act

needs_extension = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")


def excitation(channels: int, squeezed: int, act: str = "relu", gate: str = "sigmoid") -> Excitation:
    w, v = torch.randn(squeezed, channels, 1, 1), torch.randn(channels, squeezed, 1, 1)
    tensors = w / channels**0.5, torch.randn(squeezed), v / squeezed**0.5, torch.randn(channels)
    return Excitation(tensors[0], tensors[1], Act.make(act), tensors[2], tensors[3], Act.make(gate))


def excited(x: Tensor, by: Excitation) -> Tensor:
    out = x.clone(memory_format=torch.channels_last)
    first, second = (by.weight.flatten(1), by.bias), (by.gate_weight.flatten(1), by.gate_bias)
    torch.ops.fused_resnet_cpu.excite(out, *first, *by.act.numbers, *second, *by.gate.numbers)
    return out


@needs_extension
@pytest.mark.parametrize("dtype", AVERAGED)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 32, 9, 9), (2, 96, 23, 17), (4, 19, 5, 8), (1, 3, 1, 1), (3, 144, 14, 14)])
def test_operator(shape: tuple[int, ...], threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, one_step = image(*shape, dtype=dtype), 2**-7 if dtype == torch.bfloat16 else 1e-5
        for act in ACTIVATIONS:
            for gate in ("sigmoid", "relu6"):
                by = excitation(shape[1], 5, act, gate)
                torch.testing.assert_close(excited(x, by), Excited(x, by).run(), rtol=one_step, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@needs_extension
def test_not_a_number() -> None:
    """A NaN pixel reaches its whole image, and no other, as in PyTorch."""
    x, by = image(2, 24, 7, 7), excitation(24, 6)
    x[1, 17, 4, 0] = float("nan")
    got = excited(x, by)
    assert bool(got[1].isnan().all()) and not bool(got[0].isnan().any())
    torch.testing.assert_close(got, Excited(x, by).run(), equal_nan=True)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 4, 4)}, "^x: expected float32 or bfloat16, channels_last"),
        ({"weight": torch.zeros(4, 9)}, r"^weight: expected float32 \[4, 8\]"),
        ({"bias": torch.zeros(5)}, "^weight's bias: expected 4 float32 values"),
        ({"gate_weight": torch.zeros(8, 4, 1, 1)}, r"^gate_weight: expected float32 \[8, 4\]"),
        ({"gate_bias": torch.zeros(8).double()}, "^gate_weight's bias: expected 8 float32 values"),
    ],
)
def test_bad_operands(change: dict[str, Tensor], message: str) -> None:
    args: dict[str, Any] = {
        "x": image(1, 8, 4, 4), "weight": torch.zeros(4, 8), "bias": torch.zeros(4), "act": 1, "act_param": 0.0,
        "gate_weight": torch.zeros(8, 4), "gate_bias": torch.zeros(8), "gate": 4, "gate_param": 0.0,
    }  # fmt: skip
    torch.ops.fused_resnet_cpu.excite(**args)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_resnet_cpu.excite(**args | change)


# ---------------------------------------------------------------------------------------------------- networks
C = 16


class Squeeze(nn.Module):
    """``pool`` and ``product``: the parts that libraries write in several ways."""

    def __init__(
        self, pool: Callable[[Tensor], Tensor], product: Callable[[Tensor, Tensor], Tensor], bias: bool
    ) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(C, 4, 1, bias=bias), nn.Conv2d(4, C, 1, bias=bias)
        self.act, self.gate, self.pool, self.product = nn.SiLU(inplace=True), nn.Sigmoid(), pool, product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.gate(self.fc2(self.act(self.fc1(self.pool(x))))))


class Block(nn.Module):
    """``inner``: the squeeze is between the convolutions, otherwise before the add."""

    def __init__(self, squeeze: nn.Module, inner: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1, groups=C, bias=False), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C)
        self.act, self.se, self.inner = nn.ReLU(inplace=True), squeeze, inner

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(self.se(h) if self.inner else h))
        return self.act((h if self.inner else self.se(h)) + x)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "adaptive": nn.AdaptiveAvgPool2d(1),
    "adaptive pair": nn.AdaptiveAvgPool2d((1, 1)),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "torch.mean": lambda x: torch.mean(x, dim=[-1, -2], keepdim=True),
}
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x * gate": lambda x, gate: x * gate,
    "gate * x": lambda x, gate: gate * x,
    "torch.mul": torch.mul,
    "x.mul": lambda x, gate: x.mul(gate),
}


@needs_extension
@pytest.mark.parametrize("dtype", AVERAGED)
@pytest.mark.parametrize("inner", [True, False], ids=["inner", "before the add"])
@pytest.mark.parametrize(
    ("pool", "product", "bias"),
    [
        *((pool, "x * gate", True) for pool in POOLS),
        *(("mean", product, True) for product in PRODUCTS),
        ("adaptive", "gate * x", False),
    ],
)
def test_networks(pool: str, product: str, bias: bool, inner: bool, dtype: torch.dtype) -> None:
    blocks = (Block(Squeeze(POOLS[pool], PRODUCTS[product], bias), inner) for _ in range(2))
    model = prepared(nn.Sequential(*blocks)).eval()
    frozen, ran = frozen_beside_plain(model, torch.randn(2, C, 9, 8) * 1.5 + 0.4, dtype)
    assert "fused_resnet_cpu::excite" in ran
    assert not ran & {"aten::mean", "aten::adaptive_avg_pool2d", "aten::mul"}
    assert len(fr.explain(frozen).rows) == 2 and len(frozen.front().graphs) > 0
    with torch.no_grad():  # a change of its weights is seen
        for net in (model, frozen.model):
            net[1].se.fc2.weight.mul_(-3)
    close_to_plain(frozen, model, torch.randn(2, C, 9, 8))


class Seen(Block):
    """The squeeze's input, its mean or its factor is used otherwise, too; or it isn't of this form."""

    def __init__(self, how: str) -> None:
        super().__init__(Squeeze(POOLS["mean"], PRODUCTS["x * gate"], True), True)
        self.how = how

    def forward(self, x: Tensor) -> Any:
        h, se = self.act(self.bn1(self.conv1(x))), self.se
        mean = h.mean((2, 3), keepdim=self.how != "no keepdim")
        if self.how == "no keepdim":
            mean = mean[:, :, None, None]
        gate = se.gate(se.fc2(se.act(se.fc1(mean))))
        out = self.bn2(self.conv2(h.mul_(gate) if self.how == "in place" else h * gate))
        more = {"input": h, "mean": mean, "factor": gate}
        return out + more[self.how].mean() if self.how in more else out + x


@needs_extension
@pytest.mark.parametrize("how", ["input", "mean", "factor", "no keepdim", "in place"])
def test_what_is_not_of_this_form_stays_as_it_is(how: str) -> None:
    _, ran = frozen_beside_plain(prepared(Seen(how)).eval(), torch.randn(2, C, 9, 8) * 1.5 + 0.4)
    assert "fused_resnet_cpu::excite" not in ran


class Projected(nn.Module):
    """A squeeze in the shortcut, and one before a max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (Squeeze(POOLS["mean"], PRODUCTS["x * gate"], True) for _ in range(2))
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)) + self.a(self.bn2(self.conv2(x)))
        return self.pool(self.b(torch.relu(self.bn1(self.conv1(h)))))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("given", "dtype"), FREEZINGS)
def test_elsewhere_and_in_other_dtypes(given: torch.dtype, dtype: torch.dtype, portable: bool) -> None:
    model, x = prepared(Projected()).eval().to(given), torch.randn(2, C, 9, 8) * 1.5 + 0.4
    close_to_plain(fr.freeze(model, x.to(given), dtype=dtype, portable=portable), model, x)
