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
from fused_resnet.planner.sizes import chains_always

LOAD = """
import sys, torch
sys.path[:0] = sys.argv[1:]
import any_size, torchvision_shim, test_weights_only
import fused_resnet as fr
for name, network in test_weights_only.NETWORKS.items():
    allowed = fr.safe_globals(network())
    with torch.serialization.safe_globals(allowed):
        for kind in ("fused", "frozen"):
            x, want = torch.load(f"{name}_{kind}_data.pt")
            model = torch.load(f"{name}_{kind}.pt", weights_only=True)
            assert torch.equal(model(x), want), (name, kind)
            assert kind == "frozen" or any(isinstance(m, fr.fusion.classes.FusedModule) for m in model.modules())
            print(name, kind)
    left = [each for each in torch.serialization.get_safe_globals() if each in allowed]
    assert not left, (left, "the next network is allowed what it names alone")
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each network, fused and frozen, with inputs and what they give."""
    folder = tmp_path_factory.mktemp("saved")
    for name, network in NETWORKS.items():
        torch.manual_seed(0)
        plain, x = prepared(network()).eval(), torch.randn(2, 3, 33, 40) + 0.3
        with torch.no_grad(), chains_always():  # conftest.py lets chains run at any size only later, in each test
            for kind, model in (("fused", fr.fuse(copy.deepcopy(plain))), ("frozen", fr.freeze(plain, x))):
                torch.save(model, folder / f"{name}_{kind}.pt")
                torch.save((x, model(x)), folder / f"{name}_{kind}_data.pt")
    return folder


@pytest.mark.parametrize("name", NETWORKS)
def test_names(saved: Path, name: str) -> None:
    """What PyTorch says has to be allowed can be imported under that name, runs nothing by itself, and suffices."""
    for kind in ("fused", "frozen"):
        file = saved / f"{name}_{kind}.pt"
        names = get_unsafe_globals_in_checkpoint(file)
        assert not [n for n in names if n.startswith(("builtins.getattr", "torch._C", "_operator", "copyreg"))]
        allowed = []
        for full in names:
            module, _, attribute = full.rpartition(".")
            allowed.append((getattr(importlib.import_module(module), attribute), full))
        x, want = torch.load(saved / f"{name}_{kind}_data.pt")
        with torch.no_grad(), safe_globals(allowed):
            assert torch.equal(torch.load(file, weights_only=True)(x), want)
        with pytest.raises(pickle.UnpicklingError, match="fused_resnet|GLOBAL"):
            torch.load(file, weights_only=True)


def test_in_another_process(saved: Path) -> None:
    """A plain model of the architecture names all that is to be allowed: the same bits, and chains, come of it."""
    folders = map(str, (ROOT, SUPPORT, Path(__file__).parent))
    ran = subprocess.run([sys.executable, "-c", LOAD, *folders], cwd=saved, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[:-1] == [f"{name} {kind}" for name in NETWORKS for kind in ("fused", "frozen")]


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
