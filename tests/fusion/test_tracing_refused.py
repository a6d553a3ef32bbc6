"""Forwards that do more than compute: what they draw, keep, set and ask for is what the plain module does."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from traced import Layers, images, made
from watching import rows

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
        return checkpoint(lambda t: self.bn1(self.conv1(t)), x, use_reentrant=self.reentrant)


class Plainly(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))


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


CLASSES = [
    DrawsTorch, DrawsPython, Remembers, Collects, Branches, AsksForGradients, NoGrad, Autocast, Offloads,
    Freezes, Keeps, CallsOtherwise, IsCalledOtherwise,
]  # fmt: skip


def calls(model: nn.Module, inputs: list[Tensor]) -> dict[str, Any]:
    """Two steps, an evaluation, and what is left behind."""
    torch.manual_seed(1)
    random.seed(1)
    KEPT.clear()
    found: dict[str, Any] = {}
    for i, x in enumerate(inputs):
        for mode in (True, False):
            model.train(mode).zero_grad()
            leaf = x.detach().requires_grad_()
            out = model(leaf.clone())
            out.sin().sum().backward()
            found |= {f"out {i}{mode}": out.detach(), f"dx {i}{mode}": leaf.grad}
            found |= {f"d {n} {i}{mode}": p.grad for n, p in model.named_parameters()}
        with torch.no_grad():
            found[f"no grad {i}"] = model(x)
    found |= {n: b.clone() for n, b in model.named_buffers()}
    found |= {f"kept {i}": t.detach() for i, t in enumerate(KEPT)}
    found |= {f"{n} in training": m.training for n, m in model.named_modules()}
    found |= {"random": torch.rand(()), "Python's": random.random()}
    for name, value in model.__dict__.items():
        if not name.startswith("_"):
            found[name] = [v.detach() for v in value] if isinstance(value, list) else value
    return {name: v.detach() if isinstance(v, Tensor) else v for name, v in found.items()}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_what_a_forward_does_beside(cls):
    """Values, gradients, buffers, attributes, modes, random numbers that are left, and what was put elsewhere."""
    plain, fused = made(cls)
    inputs = [images(), -images(), images()]
    want, got = calls(plain, inputs), calls(fused, inputs)
    assert list(got) == list(want)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    assert isinstance(fused, FusedModule) == (cls is not IsCalledOtherwise)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside(reentrant):
    """What it computes again updates no statistics a second time, as it would in PyTorch's own norms."""
    plain, _ = made(Plainly)
    checkpoints = Checkpoints().double()
    checkpoints.reentrant = reentrant
    checkpoints.load_state_dict(plain.state_dict())
    fr.fuse(checkpoints)
    inputs = [images(), images()]
    want, got = calls(plain, inputs), calls(checkpoints, inputs)
    assert got.pop("reentrant") is reentrant
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    with rows() as found:
        checkpoints.train()(images().requires_grad_()).sum().backward()
    assert found == [[1], [1]]


def test_several_inputs():
    plain, fused = made(Several)
    x, y = images(), images()
    with rows() as found:
        torch.testing.assert_close(fused(x, y), plain(x, y))
    torch.testing.assert_close(fused(y=y[:1], x=x), plain(y=y[:1], x=x))
    assert found == [[1]]


def test_what_is_not_called_yet_is_as_it_was():
    """``fuse`` itself runs nothing: no attribute, mode or random number changes."""
    model = nn.Sequential(*(cls() for cls in CLASSES))
    before = [{k: list(v) if isinstance(v, list) else v for k, v in m.__dict__.items()} for m in model]
    state = torch.get_rng_state()
    fr.fuse(model)
    kept = [{k: v for k, v in m.__dict__.items() if not k.startswith("_fr_")} for m in model]
    assert kept == before and torch.equal(state, torch.get_rng_state())
    reasons = {row.name: row.reason for row in fr.explain(model).rows}
    assert "overrides __call__" in reasons[str(CLASSES.index(IsCalledOtherwise))]
