"""A frozen model in torch.export, AOTInductor and torch.compile, and the operator that it is made of there."""

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
from fused_resnet import frozen_forward
from fused_resnet.models.resnet import BasicBlock, ResNet
from fused_resnet.spec import Act, ChainSpec, ConvSpec, ShortcutSpec, UnitSpec

LOAD = """
import sys, torch
sys.modules["fused_resnet"] = None  # an import of it is an error
x, want = torch.load("data.pt")
portable = torch.export.load("portable.pt2").module()
for i, w in zip(x, want["portable"]):
    assert torch.allclose(portable(i), w, rtol=1e-5, atol=1e-5), "portable"
del sys.modules["fused_resnet"]
import fused_resnet
fused_resnet.small.faster = lambda *args: fused_resnet.small.CHAINS  # as in conftest.py
own = torch.export.load("own.pt2").module()
for i, w in zip(x, want["own"]):
    assert torch.equal(own(i), w), "own"
assert "torchvision" not in sys.modules
"""


def test_export_loads_in_another_process(tmp_path: Path):
    """Saved with a dynamic batch, loaded where nothing knows the model: ours with fused_resnet, portable without."""
    block = torchvision.models.resnet.BasicBlock
    model = prepared(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5)).eval()
    x = [images(n) for n in (2, 1, 5)]
    want = {}
    for name in ("own", "portable"):
        frozen = fr.freeze(model, x[0], portable=name == "portable")
        program = torch.export.export(frozen, (x[0],), dynamic_shapes=({0: BATCH},))
        namespaces = {str(n.target).split(".")[0] for n in program.graph.nodes if n.op == "call_function"}
        assert namespaces == ({"aten"} if name == "portable" else {"aten", "fused_resnet"})
        torch.export.save(program, tmp_path / f"{name}.pt2")
        want[name] = [frozen(i) for i in x]
        assert all(relative(w, model(i)) < 1e-5 for i, w in zip(x, want[name], strict=True))
    torch.save((x, want), tmp_path / "data.pt")
    root = str(Path(fr.__file__).parents[1])
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{LOAD}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
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
    """The dtype that was asked for comes out, also where a CPU computes in another, in the frozen model's bits."""
    model, x = prepared(torchvision.models.resnet.BasicBlock(8, 8)), torch.randn(3, 8, 9, 7) * 1.3 + 0.4
    frozen = fr.freeze(model, x, dtype=torch.bfloat16, portable=portable)
    out = torch.export.export(frozen, (x,)).module()(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, frozen(x))


def test_compile_in_one_graph():
    frozen = fr.freeze(small(), images())
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    for n in (2, 3):
        x = images(n)
        assert torch.equal(compiled(x), frozen(x))


def test_operator_keeps_its_word():
    """Schema, shapes, strides and aliases of fused_resnet::frozen, for a stem, option A and a pooled projection."""
    unit = UnitSpec(ConvSpec((1, 1), (1, 1), bias=True), Act(), batch_stats=False)
    strided = UnitSpec(ConvSpec((2, 2), (1, 1), bias=True), Act(), batch_stats=False)
    chains = [
        ChainSpec((strided,), ShortcutSpec()),
        ChainSpec((strided, unit), ShortcutSpec("pad", stride=(2, 2), channels=24)),
        ChainSpec((unit,), ShortcutSpec("identity")),
    ]
    shapes = [(16, 3), (24, 16), (24, 24), (24, 24)]
    params = [t for k, c in shapes for t in (torch.randn(k, c, 3, 3) / 4, torch.randn(k))]
    x = torch.randn(2, 3, 19, 14) + 0.5
    args = (x, params, [chain.encode() for chain in chains])
    torch.library.opcheck(torch.ops.fused_resnet.frozen, args, test_utils=("test_schema", "test_faketensor"))
    got = torch.ops.fused_resnet.frozen(*args)
    assert relative(got, frozen_forward.plain_chains(x, params, chains)) < 1e-5


@pytest.mark.parametrize("shape", [(2, 24, 19, 14), (2, 24, 1, 1), (24, 1, 1)])
@pytest.mark.parametrize("act", ["relu", "identity"])
def test_operator_with_a_summand(shape, act):
    """``fused_resnet::frozen`` with a norm alone in front, on a slice, and somebody else's summand."""
    units = (
        UnitSpec(None, Act("silu"), batch_stats=False),
        UnitSpec(ConvSpec((1, 1), (1, 1), bias=True), Act(act), batch_stats=False),
    )
    chains = [ChainSpec(units, ShortcutSpec("tensor"))]
    params = [torch.randn(16), torch.randn(16), torch.randn(24, 16, 3, 3) / 4, torch.randn(24)]
    x, residual = torch.randn(2, 20, 19, 14)[:, 2:18] + 0.5, torch.randn(shape) * 1.3 + 0.4
    args = (x, params, [chain.encode() for chain in chains], residual)
    torch.library.opcheck(torch.ops.fused_resnet.frozen, args, test_utils=("test_schema", "test_faketensor"))
    h = torch.nn.functional.silu(x * params[0][:, None, None] + params[1][:, None, None])
    want = torch.nn.functional.conv2d(h, params[2], params[3], padding=1) + residual
    want = want.relu() if act == "relu" else want
    for run in (torch.ops.fused_resnet.frozen(*args), frozen_forward.plain_chains(x, params, chains, residual)):
        assert relative(run, want) < 1e-5


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
