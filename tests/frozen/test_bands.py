"""Large images that pass through a 1x1, a depthwise and a 1x1 convolution together, some rows at a time."""

from __future__ import annotations

import pytest
import torch
from networks import frozen_beside_plain, prepared
from primitives import cpu, image
from torch import Tensor, nn

from fused_resnet.backends import ConvBiasAct, Packed, load
from fused_resnet.backends.cpu_steps import Writer
from fused_resnet.backends.steps import Recorded, Step
from fused_resnet.spec import Act, ConvSpec

pytestmark = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")
ops = torch.ops.fused_resnet_cpu


def step(x: Tensor, k: int, kernel: int, conv: ConvSpec, act: str, kind: str, residual: Tensor | None = None) -> Step:
    """A convolution to k channels with random weights."""
    w = torch.randn(k, x.shape[1] // conv.groups, kernel, kernel).to(x.dtype) / (x.shape[1] // conv.groups * 3) ** 0.5
    call = ConvBiasAct(x, w, torch.randn(k), conv, Act.make(act), residual)
    return Step(call, load("cpu")[0], Packed(getattr(ops, f"{kind}_prepack")(w), kind))


def alone(step: Step, x: Tensor) -> Tensor:
    return cpu.conv_packed(step.call.replace(x=x), step.packed, False)


def ran(function: object, *args: object) -> tuple[Tensor, set[str]]:
    with torch.profiler.profile() as profile:
        out = function(*args)  # type: ignore[operator]
    return out, {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "channels", "kernel", "conv", "acts"),
    [
        ((1, 16, 131, 120), 100, 3, ConvSpec((1, 1), (1, 1), groups=100), ("relu6", "relu6")),
        ((3, 24, 65, 70), 144, 5, ConvSpec((2, 2), (2, 2), groups=144), ("silu", "silu")),
        ((2, 8, 200, 40), 200, 3, ConvSpec((1, 2), (3, 0), (4, 2), groups=200), ("relu", "identity")),
        ((1, 600, 40, 41), 1000, 3, ConvSpec((3, 1), (0, 1), groups=1000), ("identity", "hardswish")),
    ],
)
def test_the_same_bits(
    shape: tuple[int, ...], channels: int, kernel: int, conv: ConvSpec, acts: tuple[str, str], dtype: torch.dtype,
    threads: int,
) -> None:  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = image(*shape, dtype=dtype)
        assert ops.bands_suit(x, channels)
        wide = step(x, channels, 1, ConvSpec(), acts[0], "gemm")
        h = alone(wide, x)
        depthwise = step(h, channels, kernel, conv, acts[1], "depthwise")
        filtered = alone(depthwise, h)
        recorded = [Recorded(wide, 0, None), Recorded(depthwise, 2, None)]
        got, names = ran(Writer().row(recorded), x, None)
        assert "fused_resnet_cpu::in_bands" in names and "fused_resnet_cpu::depthwise_bias_act" not in names
        assert torch.equal(got, filtered)
        for summand in (None, image(filtered.shape[0], 40, *filtered.shape[2:], dtype=dtype)):
            narrow = step(filtered, 40, 1, ConvSpec(), "identity", "gemm", summand)
            last = Recorded(narrow, 3, None if summand is None else 1)
            got, names = ran(Writer().row([*recorded, last]), x, summand)
            assert "fused_resnet_cpu::in_bands" in names and "fused_resnet_cpu::gemm_bias_act" not in names
            assert torch.equal(got, alone(narrow, filtered))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("summand", ["the image", "another"])
def test_memory_that_may_be_overwritten(summand: str, dtype: torch.dtype, threads: int) -> None:
    """The summand's memory is reused, but not while other threads read it as the image."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = image(1, 24, 112, 112, dtype=dtype)
        first = [step(x, 24, 1, ConvSpec(), "identity", "gemm") for _ in range(2)]
        images = [alone(s, x) for s in first]
        wide = step(x, 144, 1, ConvSpec(), "relu6", "gemm")
        h = alone(wide, images[0])
        depthwise = step(h, 144, 5, ConvSpec((1, 1), (2, 2), groups=144), "relu6", "depthwise")
        filtered = alone(depthwise, h)
        place = 0 if summand == "the image" else 1
        narrow = step(filtered, 24, 1, ConvSpec(), "identity", "gemm", images[place])
        recorded = [*(Recorded(s, 0, None) for s in first), Recorded(wide, 2, None), Recorded(depthwise, 4, None)]
        last = Recorded(narrow._replace(owned=True), 5, 2 + place)
        after = Recorded(step(x, 24, 1, ConvSpec(), "relu", "gemm"), 6, None)
        got, names = ran(Writer().row([*recorded, last, after]), x, None)
        assert "fused_resnet_cpu::in_bands" in names
        call = narrow.call.replace(residual=images[place].clone())
        summed = cpu.conv_packed(call, narrow.packed, place == 1)  # sums are added to it in place
        assert torch.equal(got, alone(after.step, summed))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("used", ["wide again", "filtered again", "small"])
def test_what_passes_alone(used: str) -> None:
    """Somebody else uses what is between the convolutions, or it fits into the caches."""
    size = 1 if used == "small" else 131
    x = image(1, 16, size, 120)
    wide = step(x, 100, 1, ConvSpec(), "relu", "gemm")
    h = alone(wide, x)
    depthwise = step(h, 100, 3, ConvSpec((1, 1), (1, 1), groups=100), "relu", "depthwise")
    filtered = alone(depthwise, h)
    summand = {"wide again": h, "filtered again": filtered, "small": None}[used]
    last = step(filtered, 100, 1, ConvSpec(), "relu", "gemm", summand)
    place = {"wide again": 2, "filtered again": 3, "small": None}[used]
    row = Writer().row([Recorded(wide, 0, None), Recorded(depthwise, 2, None), Recorded(last, 3, place)])
    got, names = ran(row, x, None)
    assert ("fused_resnet_cpu::in_bands" in names) == (used == "filtered again")
    assert torch.equal(got, alone(last, filtered))


class Inverted(nn.Module):
    """An inverted residual block with an image that is too large for the caches."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(16, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU6(),
            nn.Conv2d(96, 96, 3, stride, 1, groups=96, bias=False), nn.BatchNorm2d(96), nn.ReLU6(),
            nn.Conv2d(96, 16, 1, bias=False), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.add = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.add else self.layers(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks(dtype: torch.dtype) -> None:
    model = prepared(nn.Sequential(*map(Inverted, (1, 1, 2)))).eval()
    _, names = frozen_beside_plain(model, image(2, 16, 112, 112), dtype)
    assert "fused_resnet_cpu::in_bands" in names
