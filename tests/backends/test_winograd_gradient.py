"""The weight's gradient of 3x3 convolutions by Winograd's algorithm, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from primitives import aten, cpu, double
from torch import Tensor

from fused_resnet.backends import DyCoefficients, Norm, Prologue, load
from fused_resnet.spec import Act, ConvSpec

pytestmark = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Tests set the number of intra-op threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_norm(channels: int) -> Norm:
    """scale of both signs."""
    return Norm(*(torch.randn(channels) for _ in range(4)))


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prologue", [False, True], ids=["raw", "prologue"])
@pytest.mark.parametrize(
    ("n", "channels", "outputs", "size", "padding"),
    [
        (2, 64, 70, (18, 17), 1),  # tiles of 2x2
        (2, 72, 64, (20, 23), 0),
        (3, 64, 128, (9, 12), 2),
        (8, 64, 80, (27, 25), 1),  # tiles of 4x4, of which the last ones are cut off
        (9, 320, 64, (25, 26), 1),  # several slices of tiles
    ],
)
def test_gradient(
    n: int,
    channels: int,
    outputs: int,
    size: tuple[int, int],
    padding: int,
    prologue: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As good as PyTorch's, with and without the input's gradient; the same bits with any number of threads."""
    # oneDNN computes the native gradient
    monkeypatch.setattr(import_module("fused_resnet.backends.cpu"), "compute_dtype", lambda dtype: torch.float32)
    x = (torch.randn(n, channels, *size) * 2 + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(outputs, channels, 3, 3) / (3 * channels**0.5)).to(dtype)
    conv, pre = ConvSpec((1, 1), (padding, padding)), Prologue(random_norm(channels), Act()) if prologue else None
    y = aten.conv_stats(x, weight, conv, pre, False)[0]
    args = (torch.randn_like(y), y, DyCoefficients(*random_norm(outputs)), x, pre, weight, conv)
    exact = aten.conv_backward(*double(args), True, True, None)[1]
    plain = aten.conv_backward(*args, True, True, None)[1]
    assert exact is not None and plain is not None
    found = []
    for count, need_input in ((1, True), (1, False), (2, False), (4, False)):
        torch.set_num_threads(count)
        found.append(cpu.conv_backward(*args, need_input, True, None)[1])
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert relative(found[0], exact) <= 2 * relative(plain, exact) + 1e-6
