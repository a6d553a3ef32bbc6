"""torch.compile of fused networks: one graph, compiled once, with the eager network's numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import prepared
from stack import State, loss_of, same, state
from tolerances import assert_as_good
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision_shim import torchvision

import fused_resnet as fr


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A stem, a stage of two blocks with a projection, a classifier."""

    def __init__(self, checkpointed: bool = False, smooth: bool = False) -> None:
        super().__init__()
        block = torchvision.models.resnet.BasicBlock
        self.stem = fr.ConvBNAct(3, 4, 3, act="silu")
        down = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
        self.stage = nn.Sequential(block(4, 6, 2, down), block(6, 6))
        if smooth:  # rounding moves no value across a kink
            for m in self.stage:
                m.relu = nn.SiLU()
        self.fc = nn.Linear(6, 3)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = checkpoint(self.stage, x, use_reentrant=False) if self.checkpointed else self.stage(x)
        return self.fc(x.mean((2, 3)))


def network(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A fused network and its eager twin."""
    model = fr.fuse(prepared(Net(**options)).double())
    return model, copy.deepcopy(model)


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
    model, eager = network()
    counter = counting()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, eager)]
    for n in (4, 5, 2, 7):
        x = images(n)
        torch._dynamo.mark_dynamic(x, 0)
        same(step(compiled, model, x), step(eager, eager, x))
        for optimizer in optimizers:
            optimizer.step()
    assert counter.frame_count == 1
    for n in (3, 6, 2):
        x = images(n)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(x), eager.eval()(x))
    assert counter.frame_count == 2
    compiled.train(), eager.train()
    x = images(5)
    torch._dynamo.mark_dynamic(x, 0)
    same(step(compiled, model, x), step(eager, eager, x))
    assert counter.frame_count == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_autocast() -> None:
    """Autocast outside the compiled network: the eager network's dtypes; values, gradients and statistics are as near
    to float64's as plain PyTorch's."""
    model, eager = (m.float() for m in network(smooth=True))
    plain = fr.unfuse(copy.deepcopy(eager))
    exact = copy.deepcopy(plain).double()
    compiled = torch.compile(model, fullgraph=True, backend=counting())
    draws: list[list[State]] = []
    for _ in range(7):
        x, found = images().float(), []
        for call, owner in ((compiled, model), (eager, eager), (plain, plain)):
            with torch.autocast("cpu", torch.bfloat16):
                found.append(step(call, owner, x))
        draws.append([*found, step(exact, exact, x.double())])
    for name, want in draws[0][1].items():
        assert draws[0][0][name].dtype == want.dtype, name
        if want.is_floating_point():
            got, _, theirs, truth = ([draw[i][name] for draw in draws] for i in range(4))
            assert_as_good(name, got, theirs, truth, torch.bfloat16)


def test_checkpoint_inside() -> None:
    """A checkpointed stage in a compiled network: gradients of one that is not, statistics updated once."""
    model, _ = network(checkpointed=True)
    eager = copy.deepcopy(model)
    eager.checkpointed = False
    compiled = torch.compile(model, backend=counting())
    for _ in range(2):
        x = images()
        same(step(compiled, model, x), step(eager, eager, x))


def test_functional_call_and_grad() -> None:
    """The parameters given are used, and differentiated; torch.func's transforms work on a compiled network."""
    model, eager = network()
    compiled = torch.compile(model.eval(), backend=counting())
    eager.eval()
    x = images()
    given = {n: (p.detach() * 1.1 + 0.01) for n, p in eager.named_parameters()}

    def grads(m: nn.Module) -> dict[str, Tensor]:
        return torch.func.grad(lambda p: torch.func.functional_call(m, p, (x,)).sin().sum())(given)

    want = grads(eager)
    got = torch.compile(grads, backend=counting())(model)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)
    # compiled without a transform, then called under one: forward mode would be silently zero in the first graph
    torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(*(torch.func.jvp(m, (x,), (x.cos(),))[1] for m in (compiled, eager)))


def test_a_block_compiled_alone() -> None:
    """block.compile() in a network that is not: the block is called, the others stay in rows."""
    model, eager = network()
    model.stage[1].compile(fullgraph=True, backend=(counter := counting()))
    x = images()
    for _ in range(2):
        same(step(model, model, x), step(eager, eager, x))
    assert counter.frame_count == 1


@pytest.mark.slow
@torch._inductor.config.patch(force_disable_caches=True)  # a graph found there knows nothing of today's operators
def test_inductor() -> None:
    """The default compiler, which relies on the layouts that the operators promise: a step and an evaluation."""
    model, eager = (m.float().to(memory_format=torch.channels_last) for m in network())
    compiled = torch.compile(model, fullgraph=True)
    x = images().float().to(memory_format=torch.channels_last)
    same(step(compiled, model, x), step(eager, eager, x), rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), eager.eval()(x), rtol=1e-4, atol=1e-4)
