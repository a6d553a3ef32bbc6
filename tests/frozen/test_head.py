"""The classifier's head in frozen rows: the mean per channel and a linear layer, in the forms that libraries write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import FREEZINGS, close_to_plain, frozen_beside_plain, prepared
from primitives import image
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.backends import load
from fused_resnet.backends.steps import AVERAGED

needs_extension = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")
CHANNELS, CLASSES = 24, 10


@needs_extension
@pytest.mark.parametrize("dtype", AVERAGED)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 32, 7, 7), (2, 83, 23, 17), (5, 19, 1, 1), (1, 3, 65, 1)])
def test_means(shape: tuple[int, ...], threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = image(*shape, dtype=dtype)
        x[-1, 0, 0, 0] = float("nan")
        got = torch.ops.fused_resnet_cpu.channel_means(x)
        want = x.float().mean((2, 3), keepdim=True)
        one_step = 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got, want.to(dtype), equal_nan=True, rtol=one_step, atol=1e-6)
    finally:
        torch.set_num_threads(before)


@needs_extension
@pytest.mark.parametrize("x", [torch.zeros(1, 8, 4, 4), image(1, 8, 4, 4).double()], ids=["layout", "dtype"])
def test_bad_operands(x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="^x: expected float32 or bfloat16, channels_last"):
        torch.ops.fused_resnet_cpu.channel_means(x)


# The mean with what makes [N, C] of it.
MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "adaptive_avg_pool2d, torch.flatten": lambda h: torch.flatten(F.adaptive_avg_pool2d(h, (1, 1)), 1),
    "adaptive_avg_pool2d, flatten": lambda h: F.adaptive_avg_pool2d(h, 1).flatten(start_dim=1),
    "adaptive_avg_pool2d, view": lambda h: F.adaptive_avg_pool2d(h, 1).view(-1, CHANNELS),
    "mean": lambda h: h.mean((2, 3)),
    "torch.mean": lambda h: torch.mean(h, dim=[-1, -2]),
    "mean, keepdim, reshape": lambda h: h.mean([2, 3], keepdim=True).reshape(h.shape[0], -1),
}


class Classifier(nn.Module):
    """``mean``: of ``MEANS``. ``after``: makes the output of the image, its means and the linear layer's result."""

    def __init__(
        self, mean: Callable[[Tensor], Tensor], bias: bool = True, after: Callable[..., Any] = lambda h, m, y: y
    ) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, CHANNELS, 3, bias=False), nn.BatchNorm2d(CHANNELS)
        self.drop, self.fc, self.mean, self.after = nn.Dropout(0.3), nn.Linear(CHANNELS, CLASSES, bias), mean, after

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.bn(self.conv(x)))
        means = self.mean(h)
        return self.after(h, means, self.fc(self.drop(means)))


def x_for() -> Tensor:
    return torch.randn(2, 3, 12, 11) * 1.5 + 0.4


@needs_extension
@pytest.mark.parametrize("dtype", AVERAGED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mean", MEANS)
def test_forms(mean: str, bias: bool, dtype: torch.dtype) -> None:
    frozen, ran = frozen_beside_plain(prepared(Classifier(MEANS[mean], bias)).eval(), x_for(), dtype)
    assert "fused_resnet_cpu::channel_means" in ran
    assert not ran & {"aten::mean", "aten::adaptive_avg_pool2d", "aten::linear", "aten::addmm"}
    assert "linear after the mean" in str(fr.explain(frozen))


@needs_extension
def test_changed_weights() -> None:
    model, x = prepared(Classifier(MEANS["mean"])).eval(), x_for()
    frozen = fr.freeze(model, x)
    with torch.no_grad():
        for net in (model, frozen.model):
            net.fc.weight.mul_(-3)
            net.fc.bias.add_(2)
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-5)
        frozen.model.fc = nn.Linear(CHANNELS, 3)
        assert frozen(x).shape == (2, 3)


OTHERWISE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Any]]] = {
    "the image is used too": (MEANS["mean"], lambda h, m, y: y + h.amax()),
    "the means are used too": (MEANS["mean"], lambda h, m, y: y + m.amax()),
    "over the batch": (lambda h: h.mean((0, 2)).T @ h.new_ones(CHANNELS, CHANNELS), lambda h, m, y: y),
    "of larger parts": (lambda h: F.adaptive_avg_pool2d(h, (2, 1)).mean(-1).mean(-1), lambda h, m, y: y),
    "the batch in one": (lambda h: h.mean((2, 3)).reshape(-1, CHANNELS), lambda h, m, y: y),
}


@needs_extension
@pytest.mark.parametrize("how", OTHERWISE)
def test_what_is_not_of_this_form_keeps_its_operators(how: str) -> None:
    mean, after = OTHERWISE[how]
    _, ran = frozen_beside_plain(prepared(Classifier(mean, after=after)).eval(), x_for())
    assert ("fused_resnet_cpu::channel_means" in ran) == (how == "the batch in one")


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("given", "dtype"), FREEZINGS)
def test_elsewhere_and_in_other_dtypes(given: torch.dtype, dtype: torch.dtype, portable: bool) -> None:
    model, x = prepared(Classifier(MEANS["mean"])).eval().to(given), x_for()
    close_to_plain(fr.freeze(model, x.to(given), dtype=dtype, portable=portable), model, x)
