"""Activations as modules, functions, in-place variants and methods: in chains if the table has them, else plain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import prepared
from torch import Tensor, nn
from traced import Layers, assert_same, chains_of, images
from watching import rows

import fused_resnet as fr
from fused_resnet.fusion.patterns import act_of_module, module_of_act
from fused_resnet.fusion.table import act_of
from fused_resnet.spec import ACTIVATIONS, Act

MODULES: list[tuple[nn.Module, Act | None]] = [
    (nn.GELU(), Act("gelu")), (nn.GELU("tanh"), Act("gelu_tanh")), (nn.Mish(True), Act("mish")),
    (nn.Softplus(), Act("softplus", 1)), (nn.Softplus(2.5), Act("softplus", 2.5)), (nn.Softplus(1, 10), None),
    (nn.Tanh(), Act("tanh")), (nn.Hardsigmoid(), Act("hardsigmoid")), (nn.Hardtanh(), Act("hardtanh", 1)),
    (nn.Hardtanh(-2, 2, True), Act("hardtanh", 2)), (nn.Hardtanh(0, 6), Act("relu6")), (nn.Hardtanh(-1, 2), None),
    (nn.SELU(True), Act("selu")), (nn.CELU(0.5), Act("celu", 0.5)), (nn.ELU(0.7), Act("elu", 0.7)),
    (nn.Threshold(0.1, 0), None), (nn.RReLU(), None), (nn.Softsign(), None), (nn.PReLU(), None),
]  # fmt: skip
Call = Callable[[Tensor], Any]
CALLS: list[tuple[Call, Act | None]] = [
    (lambda z: F.gelu(z), Act("gelu")),
    (lambda z: F.gelu(z, approximate="tanh"), Act("gelu_tanh")),
    (lambda z: F.mish(z), Act("mish")),
    (lambda z: F.mish(z, inplace=True), Act("mish")),
    (lambda z: F.softplus(z), Act("softplus", 1)),
    (lambda z: F.softplus(z, 2), Act("softplus", 2)),
    (lambda z: F.softplus(z, beta=0.5, threshold=20), Act("softplus", 0.5)),
    (lambda z: F.softplus(z, 1, 10), None),
    (lambda z: F.tanh(z), Act("tanh")),
    (lambda z: torch.tanh(z), Act("tanh")),
    (lambda z: torch.tanh_(z), Act("tanh")),
    (lambda z: z.tanh(), Act("tanh")),
    (lambda z: z.tanh_(), Act("tanh")),
    (lambda z: torch.sigmoid_(z), Act("sigmoid")),
    (lambda z: z.sigmoid_(), Act("sigmoid")),
    (lambda z: F.hardsigmoid(z, True), Act("hardsigmoid")),
    (lambda z: F.hardtanh(z), Act("hardtanh", 1)),
    (lambda z: F.hardtanh(z, -0.5, 0.5, True), Act("hardtanh", 0.5)),
    (lambda z: F.hardtanh(z, max_val=3, min_val=-3), Act("hardtanh", 3)),
    (lambda z: F.hardtanh(z, 0, 6), Act("relu6")),
    (lambda z: F.hardtanh_(z, -2, 2), Act("hardtanh", 2)),
    (lambda z: F.hardtanh(z, -1, 2), None),
    (lambda z: F.selu(z), Act("selu")),
    (lambda z: torch.selu(z), Act("selu")),
    (lambda z: torch.selu_(z), Act("selu")),
    (lambda z: F.celu(z, 0.5), Act("celu", 0.5)),
    (lambda z: torch.celu(z, alpha=2), Act("celu", 2)),
    (lambda z: torch.celu_(z), Act("celu", 1)),
    (lambda z: F.elu_(z, 0.4), Act("elu", 0.4)),
    (lambda z: F.elu_(z, 0.4, 2.0), None),  # not inplace, but a scale
    (lambda z: F.leaky_relu_(z, 0.3), Act("leaky_relu", 0.3)),
    (lambda z: F.threshold(z, 0.1, 0), None),
    (lambda z: F.rrelu(z, training=False), None),
    (lambda z: F.softsign(z), None),
]


@pytest.mark.parametrize(("module", "act"), MODULES, ids=lambda v: str(v) if isinstance(v, nn.Module) else "")
def test_modules(module: nn.Module, act: Act | None) -> None:
    """As the ``act`` of a ConvBNAct, whose chain runs it or says why not."""
    assert act_of_module(module) == act
    layer = fr.ConvBNAct(4, 4).double()
    layer.act = copy.deepcopy(module)
    if act is None:
        with pytest.raises(RuntimeError, match=f"activation {type(module).__name__}"):
            layer(images())
        return
    plain = nn.Sequential(*copy.deepcopy(layer).children())
    torch.testing.assert_close(layer(x := images()), plain(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_module_for_each(name: str) -> None:
    for act in (Act.make(name), Act(name, 0.3) if ACTIVATIONS[name][1] else Act(name)):
        assert act_of_module(module_of_act(act)) == act


def test_calls() -> None:
    """What dynamo captures of a call is known for what it is."""
    seen: list[Act | None] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        (call,) = (node for node in gm.graph.nodes if node.op.startswith("call"))
        seen.append(act_of(call))
        return gm.forward

    for call, _ in CALLS:
        torch._dynamo.reset()
        torch.compile(call, backend=backend)(images())
    assert seen == [act for _, act in CALLS]


class Net(Layers):
    """A unit and the end of a block, both with the activation."""

    def __init__(self, act: Call) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)


def compare(act: Call) -> nn.Module:
    """Training, evaluation and frozen are plain PyTorch's in float64; returns the fused network."""
    plain = prepared(Net(act)).double()
    fused = fr.fuse(copy.deepcopy(plain))
    assert_same(fused, plain, images())
    with torch.no_grad():
        fused.load_state_dict(plain.state_dict())
        torch.testing.assert_close(fr.freeze(plain, x := images())(x), plain.eval()(x), rtol=1e-8, atol=1e-8)
    return fused


@pytest.mark.parametrize("name", list(ACTIVATIONS)[1:])
def test_networks(name: str) -> None:
    """Every activation inside a chain and after its add."""
    assert chains_of(compare(module_of_act(Act.make(name))), images()) == [[2]]


def test_a_parameter_that_changes() -> None:
    fused = compare(nn.CELU(0.5))
    fused.act.alpha = 0.8
    plain = fr.unfuse(copy.deepcopy(fused))
    assert_same(fused, plain, images())


@pytest.mark.parametrize("act", [nn.Softplus(1, 10), nn.Hardtanh(-1, 2), nn.Threshold(0.1, 0)], ids=str)
def test_others_run_plain_behind_the_chain(act: nn.Module) -> None:
    fused = compare(act)
    with rows() as found:
        fused.train()(images())
    assert found == [[1], [1]]


def test_gates_of_squeeze_and_excitation() -> None:
    """MobileNetV3's gate, a hardsigmoid, is part of a frozen row."""

    class Gated(Layers):
        def forward(self, x: Tensor) -> Tensor:
            h = F.hardswish(self.bn1(self.conv1(x)))
            gate = F.hardsigmoid(self.two(F.relu(self.one(F.adaptive_avg_pool2d(h, 1)))))
            return self.bn2(self.conv2(gate * h))

    plain = Gated()
    plain.one, plain.two = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
    plain, x = prepared(plain).eval(), images().float()
    with torch.no_grad():
        frozen = fr.freeze(plain, x)
        torch.testing.assert_close(frozen(x), plain(x), rtol=1e-5, atol=1e-5)
    assert [row.chains for row in fr.explain(frozen).rows] == [1]  # a gate that no row takes ends a chain
