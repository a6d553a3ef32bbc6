"""torch.compile of fused networks: one graph of the plain network, compiled once, with its numbers;
``backend="fused_resnet"``, which has chains in the graph; and Inductor, which has those that pay in training."""

from __future__ import annotations

import copy
from importlib.metadata import entry_points
from typing import Any
from unittest.mock import patch

import pytest
import torch
from networks import prepared
from stack import State, loss_of, same, state
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torchvision_shim import torchvision

import fused_resnet as fr
from fused_resnet.chain import call as chain_call
from fused_resnet.fusion import front, inductor
from fused_resnet.planner import sizes

if "fused_resnet" not in entry_points(group="torch_dynamo_backends").names:  # a source tree that is not installed
    torch._dynamo.register_backend(front.backend, "fused_resnet")


@pytest.fixture(autouse=True)
def nothing_counted(fresh_compiler: None) -> None:
    torch._dynamo.utils.counters.clear()


class Net(nn.Module):
    """A stem, a stage of two blocks with a projection, a classifier."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        block = torchvision.models.resnet.BasicBlock
        self.stem = fr.ConvBNAct(3, 4, 3, act="silu")
        down = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
        self.stage = nn.Sequential(block(4, 6, 2, down), block(6, 6))
        self.fc = nn.Linear(6, 3)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = checkpoint(self.stage, x, use_reentrant=False) if self.checkpointed else self.stage(x)
        return self.fc(x.mean((2, 3)))


def network(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A fused network and its plain twin."""
    plain = prepared(Net(**options)).double()
    plain.stem = nn.Sequential(*plain.stem.children())  # ConvBNAct is a chain by itself
    return fr.fuse(copy.deepcopy(plain)), plain


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 9, 8, dtype=torch.float64) * 1.3 + 0.4


def step(model: nn.Module, owner: nn.Module, x: Tensor) -> State:
    """A training step of ``model``, which compiles ``owner`` or is it."""
    owner.zero_grad()
    out = model(x)
    loss_of(out).backward()
    return state(owner) | {"out": out.detach()}


def counting() -> Any:
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend("aot_eager")


def test_one_graph_for_all_batches() -> None:
    """fullgraph, the batch dynamic: steps of four sizes compile once, evaluation once more, going back not at all."""
    model, plain = network()
    counter = counting()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, plain)]
    for n in (4, 5, 2, 7):
        x = images(n)
        torch._dynamo.mark_dynamic(x, 0)
        same(step(compiled, model, x), step(plain, plain, x))
        for optimizer in optimizers:
            optimizer.step()
    assert counter.frame_count == 1
    for n in (3, 6, 2):
        x = images(n)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(x), plain.eval()(x))
    assert counter.frame_count == 2
    compiled.train(), plain.train()
    x = images(5)
    torch._dynamo.mark_dynamic(x, 0)
    same(step(compiled, model, x), step(plain, plain, x))
    assert counter.frame_count == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def near(found: State, want: State) -> None:
    """The same dtypes, and values but for the order of 16-bit roundings."""
    for name, value in want.items():
        assert found[name].dtype == value.dtype, name
        assert (found[name].double() - value.double()).norm() <= 0.02 * value.double().norm() + 1e-6, name


def test_autocast() -> None:
    """Autocast outside the compiled network: the plain network's dtypes and values; the fused one's with chains."""
    model, plain = (m.float() for m in network())
    chains = [copy.deepcopy(model) for _ in range(2)]
    x = images().float()
    found = []
    calls = ((torch.compile(model, fullgraph=True, backend=counting()), model), (plain, plain))
    calls += ((torch.compile(chains[0], fullgraph=True, backend="fused_resnet"), chains[0]), (chains[1], chains[1]))
    for call, owner in calls:
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(call, owner, x))
    near(found[0], found[1])
    near(found[2], found[3])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_chains_in_the_graph(fused: bool, checkpointed: bool) -> None:
    """backend="fused_resnet", of a plain network or a fused one: chains, in one graph for all batches, in training and
    evaluation; with a checkpointed stage, too, whose chains run once more in the backward, and count no batch there."""
    model, plain = network(checkpointed=checkpointed)
    model = model if fused else copy.deepcopy(plain)
    plain.checkpointed = False
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="fused_resnet")
    for n in (4, 5, 3):
        x = images(n)
        with patch.object(chain_call, "run_row", wraps=chain_call.run_row) as rows:
            found = step(compiled, model, x)
        assert [len(call.args[1]) for call in rows.mock_calls] == [1, 2] + [2] * checkpointed
        same(found, step(plain, plain, x))
    for n in (2, 6):
        x = images(n)
        with torch.no_grad(), patch.object(chain_call, "run_row", wraps=chain_call.run_row) as rows:
            torch.testing.assert_close(compiled.eval()(x), plain.eval()(x))
        assert sum(len(call.args[1]) for call in rows.mock_calls) == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # gradients, none, and a checkpoint's part
    assert not torch._dynamo.utils.counters["graph_break"]


def test_checkpoint_inside() -> None:
    """A checkpointed stage in a compiled network: gradients of one that is not, statistics updated once."""
    model, plain = network(checkpointed=True)
    plain.checkpointed = False
    compiled = torch.compile(model, backend=counting())
    for _ in range(2):
        x = images()
        same(step(compiled, model, x), step(plain, plain, x))


def test_functional_call_and_grad() -> None:
    """The parameters given are used, and differentiated; torch.func's transforms work on a compiled network."""
    model, plain = network()
    compiled = torch.compile(model.eval(), backend=counting())
    plain.eval()
    x = images()
    given = {n: (p.detach() * 1.1 + 0.01) for n, p in plain.named_parameters()}

    def grads(m: nn.Module) -> dict[str, Tensor]:
        return torch.func.grad(lambda p: torch.func.functional_call(m, p, (x,)).sin().sum())(given)

    want = grads(plain)
    got = torch.compile(grads, backend=counting())(model)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)
    # compiled without a transform, then called under one: forward mode would be silently zero in the first graph
    torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(*(torch.func.jvp(m, (x,), (x.cos(),))[1] for m in (compiled, plain)))


@pytest.mark.parametrize("way", ["torch.compile", "compile", "function", "Sequential"])
def test_others_see_the_plain_network(way: str) -> None:
    """Whichever way a fused network, or a part of it, is compiled by another backend: one graph, no chain in it."""
    model, plain = network()
    x, counter = images(), counting()
    if way == "Sequential":
        model, plain, x = model.stage, plain.stage, torch.randn(3, 4, 8, 8, dtype=torch.float64)
    want = plain(x)
    call: Any = model
    if way == "compile":
        model.compile(fullgraph=True, backend=counter)
    elif way == "function":
        call = torch.compile(lambda x: model(x), fullgraph=True, backend=counter)
    else:
        call = torch.compile(model, fullgraph=True, backend=counter)
    with patch.object(chain_call, "run_row", wraps=chain_call.run_row) as rows:
        torch.testing.assert_close(call(x), want)
    assert counter.frame_count == 1 and not rows.called


def test_a_block_compiled_alone() -> None:
    """block.compile() in a fused network that is not compiled: the network's numbers."""
    model, plain = network()
    model.stage[1].compile(fullgraph=True, backend=counting())
    x = images()
    for _ in range(2):
        same(step(model, model, x), step(plain, plain, x))


def test_numbers_of_modules_are_inputs() -> None:
    """dynamic=True makes inputs of eps, momentum and an activation's parameter: chains all the same, and one that
    changes is seen."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.3), nn.Conv2d(4, 4, 1))
    plain = prepared(
        nn.Sequential(*plain, nn.BatchNorm2d(4), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ).double()
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="fused_resnet")
    for m, name, value in ((None, "", 0), (1, "eps", 0.5), (2, "negative_slope", -0.4), (4, "momentum", 0.7)):
        for network in (model, plain):
            if m is not None:
                setattr(network[m], name, value)
        x = images()
        with patch.object(chain_call, "run_row", wraps=chain_call.run_row) as rows:
            same(step(compiled, model, x), step(plain, plain, x))
        assert [len(call.args[1][0].units) for call in rows.mock_calls] == [2]


def traced(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
    """A backend that does with a graph what Inductor does before it generates code, chains put in."""
    from torch._dynamo.backends.debugging import aot_eager

    for part in [part for part in gm.modules() if isinstance(part, fx.GraphModule)]:  # checkpoints too
        inductor.put_chains(part)
    return aot_eager(gm, inputs)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_chains_that_aot_traces(checkpointed: bool, autocast: bool) -> None:
    """AOTAutograd's graphs with chains, of all batches: the plain network's numbers, in 16 bits the eager chains'."""
    model, plain = (m.float() for m in network(checkpointed=checkpointed))
    other = copy.deepcopy(model) if autocast else plain
    other.checkpointed = False
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=traced)
    for n in (4, 5, 3):
        x = images(n).float()
        with patch.object(chain_call, "run_row", wraps=chain_call.run_row) as rows:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = step(compiled, model, x)
        assert rows.called == (n == 4)  # while it is traced
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            want = step(other, other, x)
        near(found, want) if autocast else same(found, want, rtol=1e-3)


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_only_rows_that_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are slower than PyTorch's operators, and norms with a computed momentum, stay Inductor's."""
    model, plain = (m.float() for m in network())
    x = images().float()
    for momentum, pays in ((0.1, False), (None, True)):
        torch._dynamo.reset()
        for m in (*model.modules(), *plain.modules()):
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = momentum
        monkeypatch.setattr(sizes, "faster", lambda *args, pays=pays: sizes.CHAINS._replace(pays=pays))
        with patch.object(chain_call, "run_row", wraps=chain_call.run_row) as rows:
            same(step(torch.compile(model, backend=traced), model, x), step(plain, plain, x), rtol=1e-3)
        assert not rows.called


def test_measured_beside_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is timed beside its convolutions alone: the same shape of output, gradients of the weights, no norm."""
    model, _ = (m.float() for m in network())
    measured: list[str] = []

    def faster(text: str, images: int, calls: Any, *rest: Any) -> sizes.Measured:
        measured.append(text)
        with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.autograd.profiler.profile() as profile:
            chains, convolutions = calls(2)
            chains(), convolutions()
        names = [event.name for event in profile.function_events]
        assert "fused_resnet::chain" in names and "aten::convolution_backward" in names
        assert not any("batch_norm" in name for name in names)
        return sizes.CHAINS

    monkeypatch.setattr(sizes, "faster", faster)
    torch.compile(model, fullgraph=True, backend=traced)(images().float())
    assert len(measured) == 2 and all(text.startswith("beside convolutions: ") for text in measured)


@pytest.mark.slow
@torch._inductor.config.patch(force_disable_caches=True)  # a graph found there knows nothing of today's operators
def test_inductor() -> None:
    """The default compiler: chains in its training graph, none in evaluation, and the user's own pass in both."""
    model, plain = (m.float().to(memory_format=torch.channels_last) for m in network())
    x = images().float().to(memory_format=torch.channels_last)
    seen: list[int] = []

    def own(graph: fx.Graph) -> None:
        seen.append(sum(node.target is torch.nn.functional.batch_norm for node in graph.nodes))

    config = torch._inductor.config
    with config.patch(pre_grad_custom_pass=own):
        compiled = torch.compile(model, fullgraph=True)
        with patch.object(chain_call, "run_row", wraps=chain_call.run_row) as rows:
            same(step(compiled, model, x), step(plain, plain, x), rtol=1e-3)
        assert rows.called and config.pre_grad_custom_pass is own
        with torch.no_grad(), patch.object(chain_call, "run_row", wraps=chain_call.run_row) as rows:
            torch.testing.assert_close(compiled.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
        assert not rows.called and config.pre_grad_custom_pass is own
        assert seen and set(seen) == {6}
        with patch.object(chain_call, "run_row", wraps=chain_call.run_row) as rows:
            torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))(x).sum().backward()
        assert not rows.called  # a network that is not fused
