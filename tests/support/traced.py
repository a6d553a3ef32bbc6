"""Modules whose forwards are traced, and one step of them compared with the plain module's."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from networks import prepared
from torch import Tensor, nn
from watching import rows

import fused_resnet as fr


def images(channels: int = 4) -> Tensor:
    return torch.randn(3, channels, 7, 6, dtype=torch.float64) * 1.3 + 0.4


def step(model: nn.Module, x: Any, train: bool = True) -> dict[str, Tensor]:
    """Output, every gradient (x's too) and every buffer of one step."""
    model.train(train).zero_grad()
    leaves = [t.detach().requires_grad_() for t in (x if isinstance(x, list) else [x])]
    # a copy each: some forwards change their input in place
    given = [t.clone() for t in leaves]
    out = model(given if isinstance(x, list) else given[0])
    (out.square().mean() + out.sin().mean()).backward()
    found = {"out": out.detach(), **{f"dx{i}": t.grad for i, t in enumerate(leaves)}}
    found |= {f"given{i}": t.detach() for i, t in enumerate(given)}
    found |= {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in model.named_buffers()}  # type: ignore[return-value]


def assert_same(fused: nn.Module, plain: nn.Module, x: Any) -> None:
    for train in (True, False):
        got, want = step(fused, x, train), step(plain, x, train)
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-7, atol=1e-9, msg=f"{key}, train={train}")


def chains_of(model: nn.Module, x: Any) -> list[list[int]]:
    """Of a copy, in training: the units of each chain of each row."""
    model = copy.deepcopy(model).train()
    with rows() as found:
        model(x)
    return found


class Layers(nn.Module):
    """Two convolutions with their norms, for the forwards below."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.scale = 1.0


class NormAddAct(Layers):
    """Somebody else's convolution (the weights are a product) before the norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv1.weight * self.scale, padding=1)
        return F.relu(self.bn1(y) + x)


class Lists(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.more:
            x = layer(x)
        return self.bn1(x)


def made(cls: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    plain = prepared(cls()).double()
    return plain, fr.fuse(copy.deepcopy(plain))
