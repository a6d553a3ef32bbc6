"""Whole models, fused and frozen, through torch.load(weights_only=True): what has to be allowed, and what stays out."""

from __future__ import annotations

import copy
import importlib
import operator
import pickle
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import prepared
from source_tree import ROOT, SUPPORT
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from torchvision_shim import torchvision

import fused_resnet as fr
from fused_resnet.fusion.classes import FusedModule

LOAD = """
import sys, torch
sys.path[:0] = sys.argv[2:]
import any_size, torchvision_shim, test_weights_only
import fused_resnet as fr
plain = test_weights_only.NETWORKS[sys.argv[1]]()
with torch.serialization.safe_globals(fr.safe_globals(plain)):
    for kind in ("fused", "frozen"):
        x, want = torch.load(f"{kind}_data.pt")
        model = torch.load(f"{kind}.pt", weights_only=True)
        assert torch.equal(model(x), want), kind
        assert kind == "frozen" or any(isinstance(m, fr.fusion.classes.FusedModule) for m in model.modules())
        print(kind)
"""


class Everything(nn.Module):
    """Functions, methods, attributes, slices and buffers around chains."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        self.register_buffer("scale", torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.bn1(self.conv1(x)), inplace=True)[:, 2:6] * 2
        h = torch.relu(self.bn2(self.conv2(h))) + self.scale
        h = h.view(h.size(0), h.shape[1], -1, 1).squeeze(-1).mean(dim=-1, keepdim=True)
        h = operator.neg(torch.cat([h[..., 0], torch.zeros_like(h[..., 0])], dim=1)).to(torch.float32)
        return self.fc(F.gelu(h.flatten(1))[:, : self.fc.in_features])


class Stack(nn.Sequential):
    def __init__(self) -> None:
        block = torchvision.models.resnet.BasicBlock
        down = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        super().__init__(nn.Sequential(block(4, 4), block(4, 4), block(4, 8, 2, down)), block(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x[:, :1]], 1))


def resnet() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


def densenet() -> nn.Module:
    """Its forwards take lists, and ask for their shapes."""
    return torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3)


NETWORKS = {"everything": Everything, "stack": Stack, "resnet": resnet, "densenet": densenet}


@pytest.fixture
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A network, fused and frozen, with inputs and what they give."""
    plain, x = prepared(NETWORKS[request.param]()).eval(), torch.randn(2, 3, 33, 40) + 0.3
    with torch.no_grad():
        for kind, model in (("fused", fr.fuse(copy.deepcopy(plain))), ("frozen", fr.freeze(plain, x))):
            torch.save(model, tmp_path / f"{kind}.pt")
            torch.save((x, model(x)), tmp_path / f"{kind}_data.pt")
    return tmp_path


@pytest.mark.parametrize("saved", NETWORKS, indirect=True)
def test_names(saved: Path) -> None:
    """What PyTorch says has to be allowed can be imported under that name, runs nothing by itself, and suffices."""
    for kind in ("fused", "frozen"):
        names = get_unsafe_globals_in_checkpoint(saved / f"{kind}.pt")
        assert not [name for name in names if name.startswith(("builtins.getattr", "torch._C", "_operator", "copyreg"))]
        allowed = []
        for name in names:
            module, _, attribute = name.rpartition(".")
            allowed.append((getattr(importlib.import_module(module), attribute), name))
        x, want = torch.load(saved / f"{kind}_data.pt")
        with torch.no_grad(), safe_globals(allowed):
            assert torch.equal(torch.load(saved / f"{kind}.pt", weights_only=True)(x), want)
        with pytest.raises(pickle.UnpicklingError, match="fused_resnet|GLOBAL"):
            torch.load(saved / f"{kind}.pt", weights_only=True)


@pytest.mark.parametrize(("saved", "name"), [(n, n) for n in NETWORKS], indirect=["saved"])
def test_in_another_process(saved: Path, name: str) -> None:
    """A plain model of the architecture names all that is to be allowed: the same bits, and chains, come of it."""
    folders = map(str, (ROOT, SUPPORT, Path(__file__).parent))
    command = [sys.executable, "-c", LOAD, name, *folders]
    ran = subprocess.run(command, cwd=saved, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["fused", "frozen"]


def test_trains_on(tmp_path: Path) -> None:
    fused = fr.fuse(prepared(Everything()))
    torch.save(fused, tmp_path / "m.pt")
    with safe_globals(fr.safe_globals(fused)):
        model = torch.load(tmp_path / "m.pt", weights_only=True)
    assert isinstance(model, FusedModule) and "_fr_fused" in model.__dict__
    x = torch.randn(2, 3, 9, 8)
    for m in (fused, model):
        m.train()(x).square().mean().backward()
    for (name, got), want in zip(model.named_parameters(), fused.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad), name
    assert type(fr.unfuse(model)) is Everything


def test_list() -> None:
    """Pairs of an object and the name that it is found by; nothing that reaches everything else."""
    for pairs in (fr.safe_globals(), fr.safe_globals(resnet(), Everything)):
        for each, name in pairs:
            parts = name.split(".")
            found = [importlib.import_module(".".join(parts[:i])) for i in (len(parts) - 1,)]
            assert reduce(getattr, parts[len(parts) - 1 :], found[0]) is each
        assert not {getattr, operator.methodcaller} & {each for each, _ in pairs}
    assert (Everything, f"{Everything.__module__}.Everything") in pairs
    with pytest.raises(TypeError, match=r"models\[1\]: expected an nn.Module or a class, got str"):
        fr.safe_globals(Everything, "Everything")  # type: ignore[arg-type]
