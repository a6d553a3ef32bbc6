"""A frozen model in torch.export, AOTInductor and torch.compile: the plain network in evaluation mode."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import BATCH, images, prepared, relative, small
from torch import nn
from torchvision_shim import torchvision

import fused_resnet as fr
from fused_resnet.models.resnet import BasicBlock, ResNet

LOAD = """
import sys, torch
sys.modules["fused_resnet"] = None  # an import of it is an error
x, want = torch.load("data.pt")
for name in ("own", "portable"):
    loaded = torch.export.load(f"{name}.pt2").module()
    for i, w in zip(x, want):
        assert torch.allclose(loaded(i), w, rtol=1e-5, atol=1e-5), name
assert "torchvision" not in sys.modules
"""


def test_export_loads_in_another_process(tmp_path: Path):
    """Saved with a dynamic batch, loaded where nothing knows the model, nor this package."""
    block = torchvision.models.resnet.BasicBlock
    model = prepared(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5)).eval()
    x = [images(n) for n in (2, 1, 5)]
    with torch.no_grad():
        want = [model(i) for i in x]
    for name in ("own", "portable"):
        frozen = fr.freeze(model, x[0], portable=name == "portable")
        program = torch.export.export(frozen, (x[0],), dynamic_shapes=({0: BATCH},))
        assert {str(n.target).split(".")[0] for n in program.graph.nodes if n.op == "call_function"} == {"aten"}
        torch.export.save(program, tmp_path / f"{name}.pt2")
        assert all(relative(frozen(i), w) < 1e-5 for i, w in zip(x, want, strict=True))
    torch.save((x, want), tmp_path / "data.pt")
    loaded = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.parametrize("portable", [False, True])
def test_export_with_dynamic_images(portable):
    model = prepared(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3, avg_down=True)).eval()
    frozen = fr.freeze(model, images(), portable=portable)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(frozen, (images(),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)).module()
    for shape in ((3, 3, 48, 64), (2, 3, 63, 49)):
        x = torch.randn(shape) * 1.3 + 0.4
        assert relative(program(x), model(x)) < 1e-5


@pytest.mark.parametrize("portable", [False, True])
def test_export_in_16_bits(portable):
    """The dtype that was asked for comes out, also where a CPU computes in another."""
    model, x = prepared(torchvision.models.resnet.BasicBlock(8, 8)), torch.randn(3, 8, 9, 7) * 1.3 + 0.4
    frozen = fr.freeze(model, x, dtype=torch.bfloat16, portable=portable)
    out = torch.export.export(frozen, (x,)).module()(x)
    assert out.dtype == torch.bfloat16 and relative(out, frozen(x)) < 0.02


@pytest.mark.parametrize("portable", [False, True])
def test_trace(portable):
    """The plain network, of any batch, which another process needs nothing of this package for."""
    model, x = prepared(torchvision.models.resnet.BasicBlock(8, 8)).eval(), torch.randn(2, 8, 9, 7) * 1.3 + 0.4
    traced = torch.jit.trace(fr.freeze(model, x, portable=portable), (x,))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::batch_norm" in kinds and not any("fused_resnet" in kind for kind in kinds)
    for n in (1, 3):
        x = torch.randn(n, 8, 9, 7) * 1.3 + 0.4
        assert relative(traced(x), model(x)) < 1e-5


def test_compile_in_one_graph():
    frozen = fr.freeze(small(), images())
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    for n in (2, 3):
        x = images(n)
        assert relative(compiled(x), frozen(x)) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler: no g++ on this machine")
@pytest.mark.parametrize("portable", [False, True])
def test_aot_inductor(portable, tmp_path: Path):
    import torch._inductor

    model = prepared(nn.Sequential(torchvision.models.resnet.BasicBlock(8, 8), nn.AdaptiveAvgPool2d(1))).eval()
    x = torch.randn(2, 8, 12, 12) * 1.3 + 0.4
    frozen = fr.freeze(model, x, portable=portable)
    program = torch.export.export(frozen, (x,), dynamic_shapes=({0: BATCH},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for n in (2, 1, 5):
        x = torch.randn(n, 8, 12, 12) * 1.3 + 0.4
        assert relative(compiled(x), model(x)) < 1e-5
