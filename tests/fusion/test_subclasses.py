"""Layers of classes that are derived from PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision_shim  # noqa: F401  timm imports torchvision
from networks import prepared
from torch import Tensor, nn
from traced import assert_same, images
from watching import rows

import fused_resnet as fr


class Half(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1, bias=False)
        nn.init.constant_(self.weight, 0.5)


class Careful(nn.BatchNorm2d):
    """With more words, and a larger eps."""

    scale: float

    def __init__(self) -> None:
        super().__init__(4, eps=0.1)
        self.scale = 2.0

    def extra_repr(self) -> str:
        return f"careful, {super().extra_repr()}"


class Scaled(Careful):
    def forward(self, input: Tensor) -> Tensor:
        return self.scale * super().forward(input)


class Flipped(Half):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.flip(-1), bias)


class Soft(nn.LeakyReLU):
    def __init__(self) -> None:
        super().__init__(0.3)


@pytest.mark.parametrize(
    ("conv", "norm", "chains"),
    [
        (Half, Careful, [[2]]), (Half, Scaled, [[1], [1]]), (Flipped, Careful, [[2]]),
        (nn.Identity, Careful, [[2]]), (nn.Identity, Scaled, [[1], [1]]),
    ],
)  # fmt: skip
def test_subclasses(conv, norm, chains):
    """What their forwards compute is what counts: a weight that is computed, a product behind the norm."""
    plain = nn.Sequential(conv(), norm(), Soft(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()
    fused = fr.fuse(copy.deepcopy(plain))
    assert_same(fused, plain, images())
    with rows() as found:
        fused(images())
    assert found == chains
    plain.load_state_dict(fused.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fr.freeze(plain, x := images())(x), plain.eval()(x))


def test_norm_act_without_its_activation():
    """timm's BatchNormAct2d leaves its activation out before an add, or where it comes later; given one, it has it."""
    norm_act = pytest.importorskip("timm.layers").BatchNormAct2d
    first = [nn.Conv2d(4, 4, 3, padding=1), norm_act(4, apply_act=False), nn.SiLU()]
    plain = prepared(nn.Sequential(*first, nn.Conv2d(4, 4, 1, bias=False), norm_act(4, apply_act=False))).double()
    fused = fr.fuse(copy.deepcopy(plain))
    assert_same(fused, plain, images())
    with rows() as found:
        fused(images())
    assert found == [[2]]
    plain.load_state_dict(fused.state_dict())
    fused[1].act, plain[1].act = nn.LeakyReLU(0.3), nn.LeakyReLU(0.3)
    assert_same(fused, plain, images())
