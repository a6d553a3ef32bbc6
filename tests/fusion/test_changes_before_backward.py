"""Tensors that the user changes in place between a forward and its backward, outside the captured graph.

What plain PyTorch lets change, chains let change too, with the same gradients. What plain PyTorch reports is reported,
or does not matter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import prepared
from torch import Tensor, nn
from torchvision_shim import torchvision
from watching import rows

import fused_resnet as fr


class Units(nn.Module):
    """conv -> norm -> act twice; ``closing`` ends them."""

    def __init__(self, closing: Callable[[Tensor, Tensor, Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1, bias=bias), nn.BatchNorm2d(4)
        self.closing = closing

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.closing(x, self.bn2(self.conv2(F.silu(self.bn1(self.conv1(x))))), skip)


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.pool(F.relu(self.bn(self.conv(x))))


class Projected(nn.Module):
    def __init__(self, average: bool = False) -> None:
        super().__init__()
        down = [nn.AvgPool2d(2)] * average + [nn.Conv2d(4, 6, 1, 1 if average else 2), nn.BatchNorm2d(6)]
        self.block = torchvision.models.resnet.BasicBlock(4, 6, 2, nn.Sequential(*down))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(x)


class Scaled(nn.Module):
    """Scale and shift per channel in the place of a norm, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.scale, self.shift = (nn.Parameter(torch.randn(1, 4, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.bn(self.conv2(F.relu(self.conv(x) * self.scale + self.shift)))


class InTheGraph(Units):
    """The summand changes after the add, in the captured forward itself."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        skip = skip * 1.5
        out = super().forward(x, skip)
        return out + skip.sub_(0.3).sin()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Units(lambda x, y, skip: F.relu(y)),
    "identity": lambda: Units(lambda x, y, skip: F.relu(y + x), bias=False),
    "residual": lambda: Units(lambda x, y, skip: F.relu(y + skip)),
    "residual, no act": lambda: Units(lambda x, y, skip: y + skip),
    "summand changed in the graph": lambda: InTheGraph(lambda x, y, skip: F.silu(y + skip)),
    "projection": Projected,
    "average pool": lambda: Projected(average=True),
    "stem": Stem,
    "scale and shift": Scaled,
}
TRAINED: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "norms": lambda name: "bn" in name or "downsample.1" in name or name == "shift",
    "second half": lambda name: "2" in name or "downsample" in name or name == "scale",
    "biases": lambda name: name.endswith("bias") or name == "shift",
}


def tensors_of(model: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    floating = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_floating_point()}
    return floating | dict(zip(("x", "skip"), inputs, strict=True))


def gradients(model: nn.Module, inputs: list[Tensor], changed: str | None) -> dict[str, Tensor] | None:
    """The gradients after a forward, a change of one tensor, a backward; None if that raises as PyTorch does."""
    model.zero_grad()
    state = copy.deepcopy(model.state_dict())
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    given = [t * 1 for t in leaves]  # a leaf that needs a gradient can't change in place
    out = model(*given)
    if changed is not None:
        with torch.no_grad():
            tensors_of(model, given)[changed].mul_(-1.5).sub_(0.7)
    try:
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return None
    finally:
        model.load_state_dict(state)
    named = tensors_of(model, leaves)
    return {n: t.grad.clone() for n, t in named.items() if t.grad is not None}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


# Tensors whose change PyTorch reports, although it does not change the gradients of chains: they are not read again.
HARMLESS = ("running_mean", "running_var", "scale")


@pytest.mark.parametrize("mode", ["training, features", "training, images", "mixed, features"])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_tensor_changed(network: str, trained: str, mode: str) -> None:
    """Each parameter, buffer and input in turn: PyTorch's gradients, or PyTorch's error."""
    plain = prepared(NETWORKS[network]()).double()
    if "mixed" in mode:
        [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)][-1].eval()
    for name, p in plain.named_parameters():
        p.requires_grad_(TRAINED[trained](name))
    inputs = [torch.randn(3, 4, 6, 6, dtype=torch.float64) + 0.3 for _ in range(2)]
    for t in inputs:
        t.requires_grad_("features" in mode)
    if not any(t.requires_grad for t in (*inputs, *plain.parameters())):
        return
    fused = fr.fuse(copy.deepcopy(plain))
    untouched = gradients(plain, inputs, None)
    with rows() as found:
        same(gradients(fused, inputs, None), untouched)
    assert found
    for name in tensors_of(plain, inputs):
        want, got = gradients(plain, inputs, name), gradients(fused, inputs, name)
        if want is None and got is not None and name.endswith(HARMLESS):
            want = untouched
        assert (got is None) == (want is None), f"{name}: {'no ' if got is not None else ''}error"
        if want is not None:
            same(got, want)


def test_differentiated_twice() -> None:
    """A backward that is itself differentiated computes everything again, so a change is an error there."""
    fused = fr.fuse(prepared(NETWORKS["residual"]()).double())
    x, skip = (torch.randn(3, 4, 6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = fused(x, skip).square().sum()
    with torch.no_grad():
        fused.bn1.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, x, create_graph=True)
