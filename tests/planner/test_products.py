"""Which convolutions of chains run as products of patches: measured once, kept, and told."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import prepared
from plans import own_plan
from stages import step
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fused_resnet as fr
from fused_resnet.backends import load
from fused_resnet.planner import sizes
from fused_resnet.planner.sizes import Measured

pytestmark = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")


@pytest.fixture(autouse=True)
def chains_at_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Measuring, with a plan of its own."""
    with own_plan(monkeypatch, tmp_path):
        yield


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The signatures of all measurements of convolutions. Ours are the faster ones, and both ways are run."""
    found: list[str] = []
    real = sizes.faster

    def faster(text: str, *about: Any) -> Measured:
        if text.startswith("products"):
            found.append(text)
        return real(text, *about)

    def timed(images: int, calls: sizes.Calls, call_s: float, tie: float) -> Measured:
        for call in calls(images):
            call()
        return Measured(True, 1.0, 2.0)

    monkeypatch.setattr(sizes, "faster", faster)
    monkeypatch.setattr(sizes, "_timed", timed)
    return found


def unit() -> nn.Module:
    return prepared(nn.Sequential(nn.Conv2d(8, 12, 5, 2, 2, bias=False), nn.BatchNorm2d(12), nn.ReLU()))


def images() -> Tensor:
    return (torch.randn(3, 8, 14, 14) * 1.5 + 0.4).contiguous(memory_format=torch.channels_last)


def test_each_pass_is_measured_and_told(asked: list[str]) -> None:
    model, x = unit(), images()
    fused = fr.fuse(copy.deepcopy(model))
    got, want = step(fused, x), step(model.double(), x.double())
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value.double(), rtol=1e-4, atol=1e-5, msg=name)
    # the gradient of the input has a stride, which the products do not take
    assert {text.split()[1] for text in asked} == {"1", "4"}
    text = str(fr.explain(fused))
    assert "conv_stats 5x5: cpu (implicit_gemm)" in text
    assert "conv_backward 5x5: cpu (aten for the input, implicit_gemm for the weight)" in text
    before = len(asked)
    step(fused, x)
    assert len(asked) == before


def test_without_gradients_only_the_output_counts(asked: list[str]) -> None:
    with torch.no_grad():
        fr.fuse(unit())(images())
    assert {text.split()[1] for text in asked} == {"1"}


def test_what_is_not_measured(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other layouts and dtypes, requested backends, and plans by preference."""
    model = fr.fuse(unit())
    model(images().contiguous())
    copy.deepcopy(model).double()(images().double())
    with fr.use_backend("cpu"):
        model(images())
    assert asked == []
    monkeypatch.setenv("FUSED_RESNET_PLAN", "preference")
    model(images())
    assert "implicit_gemm" not in str(fr.explain(model))


def test_a_measurement_inside_another_one() -> None:
    """With hooks on saved tensors a row is timed in another thread, which asks for its convolutions."""
    model, x = fr.fuse(unit()), images()
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        model(x).sum().backward()
    assert model[0].weight.grad is not None
