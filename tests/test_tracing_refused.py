"""Forwards whose trace would not be the whole truth: they stay plain, and explain says why."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from traced import Layers

import fused_resnet as fr
from fused_resnet.fusion.swap import FusedModule

pytestmark = pytest.mark.usefixtures("every_warning")


class DrawsTorch(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)) if torch.rand(()) < 0.5 else x


class DrawsPython(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)) if random.random() < 0.5 else x


class Remembers(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.bn1(self.conv1(x))
        return self.last


class Collects(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.bn1(self.conv1(x))


class Branches(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)) if x.mean() > 0 else x


class AsksForGradients(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x))
        return h if torch.is_grad_enabled() else h * 2


class NoGrad(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(h))


class Autocast(Layers):
    """For a device that this machine may not have."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return self.bn1(self.conv1(x))


class Checkpoints(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda t: self.bn1(self.conv1(t)), x, use_reentrant=False)


class Offloads(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return self.bn1(self.conv1(x))


class Freezes(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.bn2.eval()
        return self.bn2(self.conv2(x))


KEPT: list[Any] = []


class Keeps(Layers):
    """Where nobody looks for it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x))
        KEPT.append(h)
        return self.relu(h)


class Doubling(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class CallsOtherwise(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Doubling(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))


class IsCalledOtherwise(Layers):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))


class Several(Layers):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)) + y


REFUSED = {
    DrawsTorch: "draws random numbers", DrawsPython: "draws random numbers", Remembers: "sets 'last'",
    Collects: "sets 'seen'", Branches: "can't be traced", AsksForGradients: "gradients are wanted",
    Several: "several inputs", NoGrad: "switches gradients", Autocast: "enters autocast",
    Checkpoints: "enters saved_tensors_hooks", Offloads: "enters saved_tensors_hooks", Freezes: "sets 'training'",
    Keeps: "keeps a value", CallsOtherwise: "the class Doubling of 'conv1' overrides __call__",
    IsCalledOtherwise: "its class overrides __call__",
}  # fmt: skip


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_a_trace_that_would_lie_is_refused(cls):
    model = nn.Sequential(cls(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    before = {k: list(v) if isinstance(v, list) else v for k, v in model[0].__dict__.items()}
    state = torch.get_rng_state()
    fr.fuse(model)
    assert type(model[0]) is cls and isinstance(model[1], FusedModule)
    rows = {row.name: row for row in fr.explain(model).rows}
    assert REFUSED[cls] in rows["0"].reason and not rows["0"].fused
    assert model[0].__dict__ == before and all(m.training for m in model.modules())
    assert cls is DrawsTorch or torch.equal(state, torch.get_rng_state())
