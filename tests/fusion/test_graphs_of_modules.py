"""Tools that make graphs of a network, torch.fx and TorchScript, see the plain one in a fused one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.fx
from stack import State, images, loss_of, pair, same, state
from torchvision.models.feature_extraction import create_feature_extractor

import fused_resnet as fr

pytestmark = pytest.mark.usefixtures("every_warning")


def test_feature_extraction() -> None:
    """torch.fx sees the plain network in a fused one; what is extracted has its values and gradients."""
    nodes = {"layer1.0.relu": "first", "layer2.1.bn2": "second", "flatten": "last"}
    x, found = images(), []
    for model in pair():
        values: State = create_feature_extractor(model, nodes)(x)
        torch.stack([loss_of(v) for v in values.values()]).sum().backward()
        found.append({f"value {name}": v.detach() for name, v in values.items()} | state(model))
    same(*found)


def test_symbolic_trace() -> None:
    plain, fused = pair()
    graph = torch.fx.symbolic_trace(fused)
    assert str(graph.graph) == str(torch.fx.symbolic_trace(plain).graph)
    assert torch.equal(graph(x := images()), copy.deepcopy(plain)(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_torchscript(grad: bool, tmp_path: Path) -> None:
    """A trace is the plain network's, for a program that knows nothing of chains, at any size."""
    plain, fused = pair()
    with torch.set_grad_enabled(grad):
        torch.jit.trace(fused.eval(), images()).save(tmp_path / "traced.pt")
    x = images(2)[..., :40]
    traced = torch.jit.load(tmp_path / "traced.pt")
    assert "fused_resnet::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), plain.eval()(x))
    with pytest.raises(TypeError, match=r"unfuse\(model\)"):
        torch.jit.script(fused)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("portable", [False, True])
def test_torchscript_of_frozen_models(portable: bool, tmp_path: Path) -> None:
    """Traced, they are the plain network in evaluation mode; scripted, they are refused."""
    plain, _ = pair()
    frozen = fr.freeze(plain, images(), portable=portable)
    torch.jit.trace(frozen, images()).save(tmp_path / "traced.pt")
    x = images(2)[..., :40]
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(x), plain.eval()(x))
    with pytest.raises(TypeError, match=r"torch\.jit\.trace can"):
        torch.jit.script(frozen)
