"""A small network as people have them, its fused twin, and one tool used on both: what the tests of tools share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest.mock import patch

import torch
from networks import prepared
from torch import Tensor, nn
from torchvision_shim import torchvision

import fused_resnet as fr
from fused_resnet.chain import call as chain_call

State = dict[str, Tensor]
SIZE = 48


def network() -> nn.Module:
    """torchvision's ResNet with blocks of both kinds and a stage of two, a few channels wide; float64."""
    block = torchvision.models.resnet.BasicBlock
    model = torchvision.models.resnet.ResNet(block, [1, 1, 1, 1], num_classes=5)
    model.inplanes = 8
    model.conv1, model.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
    for i, (planes, blocks) in enumerate([(8, 2), (12, 2), (16, 1), (16, 1)]):
        setattr(model, f"layer{i + 1}", model._make_layer(block, planes, blocks, stride=min(i + 1, 2)))
    model.fc = nn.Linear(16, 5)
    return prepared(model).double()


def pair() -> tuple[nn.Module, nn.Module]:
    """The network and its fused twin."""
    plain = network()
    fused = fr.fuse(copy.deepcopy(plain))
    # assert all(row.fused for row in fr.explain(fused).rows)
    return plain, fused


def images(n: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, SIZE, SIZE, dtype=dtype) * 1.3 + 0.4


def loss_of(out: Tensor) -> Tensor:
    return out.square().mean() + out.sin().mean()


def state(model: nn.Module) -> State:
    """Parameters, their gradients, buffers."""
    grads = {f"d {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {n: v.detach().clone() for n, v in model.state_dict().items()} | grads


def same(got: State, want: State, rtol: float = 1e-6) -> None:
    """Equal up to the rounding of a few float64 steps."""
    assert got.keys() == want.keys()
    for key in want:
        scale = max(1.0, want[key].abs().max().item()) if want[key].numel() else 1.0
        limits = {"rtol": rtol, "atol": rtol * 1e-2 * scale}
        torch.testing.assert_close(got[key], want[key], **limits, msg=lambda text, key=key: f"{key}: {text}")


def both(run: Callable[[nn.Module], State | None], models: tuple[nn.Module, nn.Module] | None = None) -> None:
    """What ``run`` does to the plain network and to the fused one, random numbers alike: what it returns, and the
    models' states after it, are the same; and the fused one did run its chains."""
    plain, fused = models or pair()
    seed = torch.initial_seed()
    found = []
    with patch.object(chain_call, "run_row", wraps=chain_call.run_row) as rows:
        for model in (plain, fused):
            torch.manual_seed(seed)
            returned = run(model)
            found.append({f"returned {k}": v for k, v in (returned or {}).items()} | state(model))
            assert bool(rows.call_count) == (model is fused)
    same(found[1], found[0])
