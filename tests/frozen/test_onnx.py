"""torch.export and torch.onnx.export of fused and frozen models see the plain network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from networks import BATCH, images, prepared, relative
from torch import Tensor, nn
from torchvision_shim import torchvision

import fused_resnet as fr
from fused_resnet.chain import call as chain_call
from fused_resnet.fusion.classes import FusedModule

# What torch.onnx itself, or its TorchScript way, warns of.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("every_warning")]


def resnet() -> nn.Module:
    """A stem with a max-pool, rows of blocks, projections."""
    return prepared(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 1, 1, 1], num_classes=5))


def units() -> nn.Module:
    """Modules of this package's own, whose forwards are chains without a fuse."""
    chain = [fr.ConvBNAct(8, 8, act="silu"), fr.ConvBNAct(8, 12, 1, act=("leaky_relu", 0.3))]
    return prepared(
        nn.Sequential(
            fr.ConvBNAct(3, 8, stride=2),
            fr.ResidualChain([fr.ConvBNAct(8, 8)]),
            fr.ResidualChain(chain, fr.ConvBNAct(8, 12, 1, act=None)),
            fr.ResidualChain([fr.ConvBNAct(12, 6, 1, act=None)], None),
        )
    )


def wrapped() -> nn.Module:
    return prepared(nn.Sequential(resnet(), nn.Linear(5, 3)))


def alike(training: bool, make: Any) -> tuple[nn.Module, nn.Module]:
    model = make().train(training)
    fused = copy.deepcopy(model)
    return model, fused if make is units else fr.fuse(fused)


# ---------------------------------------------------------------------------------------------------- torch.export
@pytest.mark.parametrize("make", [resnet, units, wrapped])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, training: bool, make: Any) -> None:
    """PyTorch's operators alone, for any batch; in training the program updates the running statistics."""
    model, fused = alike(training, make)
    program = torch.export.export(fused, (images(),), dynamic_shapes=({0: BATCH},), strict=strict)
    called = {str(n.target).split(".")[0] for n in program.graph.nodes if n.op == "call_function"}
    assert "fused_resnet" not in called and "aten" in called
    assert make is units or isinstance(fused if make is resnet else fused[0], FusedModule)
    exported, x = program.module(), images(5)
    with torch.no_grad():
        for _ in range(2):
            got, want = exported(x), model(x)
            assert relative(got, want) < 1e-5
    left = dict(exported.named_buffers())
    for name, want in model.named_buffers():
        if training or name in left:  # what evaluation does not read need not come along
            torch.testing.assert_close(left[name], want, msg=name)


def test_export_leaves_the_model_fused() -> None:
    """The same chains run before and after."""
    _, fused = alike(False, resnet)
    x = images()
    with torch.no_grad():
        want = fused(x)
        torch.export.export(fused, (x,))
        with patch.object(chain_call, "run_row", wraps=chain_call.run_row) as rows:
            assert torch.equal(fused(x), want)
    assert rows.call_count


def test_export_at_other_sizes() -> None:
    model, fused = alike(False, wrapped)
    for shape in ((1, 3, 32, 32), (2, 3, 65, 40)):
        x = torch.randn(shape) + 0.2
        with torch.no_grad():
            assert relative(torch.export.export(fused, (x,)).module()(x), model(x)) < 1e-5


# ---------------------------------------------------------------------------------------------------- ONNX
@pytest.fixture(params=[True, False], ids=["dynamo", "torchscript"])
def dynamo(request: pytest.FixtureRequest) -> bool:
    for needed in ("onnx", "onnxscript"):
        pytest.importorskip(needed, reason=f"torch.onnx.export needs {needed}")
    return bool(request.param)


def exported(model: nn.Module, x: Tensor, path: Path, dynamo: bool) -> Any:
    """The model in onnxruntime, any batch."""
    runtime = pytest.importorskip("onnxruntime", reason="runs what torch.onnx.export wrote")
    dynamic = {"dynamic_shapes": ({0: BATCH},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    names = {"input_names": ["x"], "output_names": ["out"]}
    torch.onnx.export(model, (x,), str(path), dynamo=dynamo, verbose=False, **names, **dynamic)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("make", [resnet, units, wrapped])
def test_onnx_of_fused_models(make: Any, dynamo: bool, tmp_path: Path) -> None:
    """The plain network, with the numbers that the fused one gives."""
    model, fused = alike(False, make)
    run = exported(fused, images(), tmp_path / "m.onnx", dynamo)
    with torch.no_grad():
        for x in (images(2), images(3)):
            assert relative(run(x), model(x)) < 1e-5
            assert relative(fused(x), model(x)) < 1e-5


@pytest.mark.parametrize("portable", [False, True])
def test_onnx_of_frozen_models(portable: bool, dynamo: bool, tmp_path: Path) -> None:
    """The plain network in evaluation mode."""
    model, x = resnet(), images()
    run = exported(fr.freeze(model, x, portable=portable), x, tmp_path / "m.onnx", dynamo)
    with torch.no_grad():
        for x in (images(2), images(3)):
            assert relative(run(x), model.eval()(x)) < 1e-5
