"""CUDA graphs of a frozen model: with stand-ins on a CPU, and on a GPU."""

from __future__ import annotations

import copy
import pickle
import random
import time
from contextlib import nullcontext
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import images, prepared
from torch import Tensor, nn
from torchvision_shim import torchvision

import fused_resnet as fr
from fused_resnet.frozen import cuda_graphs
from fused_resnet.frozen.cuda_graphs import Graphs

pytestmark = pytest.mark.usefixtures("every_warning")


class StandIns:
    """CUDA's streams, events and graphs for a CPU: a graph replays the function into what it wrote when recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
        self.log: list[str] = []
        self.fails = False
        said = lambda what: lambda *args: self.log.append(what)  # noqa: E731
        stream = SimpleNamespace(wait_stream=said("wait_stream"), wait_event=said("wait_event"))
        self.graphs = Graphs()

        class Graph:
            def replay(graph) -> None:
                self.log.append("replay")
                made = next(g for g in self.graphs._graphs.values() if g.graph is graph)
                made.out.copy_(function(made.x))

        class Recording(nullcontext):
            def __exit__(record, *error: Any) -> None:
                if self.fails:
                    raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(cuda_graphs, "_can_record", lambda x: True)
        for name, value in {
            "CUDAGraph": Graph,
            "Event": lambda: SimpleNamespace(record=said("record")),
            "Stream": lambda device: stream,
            "current_stream": lambda: stream,
            "device": lambda device: nullcontext(),
            "graph": lambda *args, **kwargs: Recording(),
            "graph_pool_handle": object,
            "stream": lambda other: nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_graphs_are_bounded_and_their_results_copies(monkeypatch):
    calls: list[tuple[int, ...]] = []

    def function(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return x.amax((2, 3)) * 2

    stand_ins = StandIns(monkeypatch, function)
    graphs = stand_ins.graphs
    x = torch.randn(2, 3, 4, 4)
    first = graphs(function, x)
    assert stand_ins.log[-3:] == ["wait_event", "replay", "record"], (
        "a call waits for the one before, and says when done"
    )
    assert len(calls) == 2 + 1 + 1, "warmed up, recorded, replayed"
    kept = first.clone()
    assert torch.equal(graphs(function, x + 1), function(x + 1))
    assert torch.equal(graphs(function, x.double() / 3), function(x.double() / 3)), "another dtype"
    assert torch.equal(first, kept), "a later call must not write into an earlier result"
    with pytest.warns(UserWarning, match="others run without"):
        for n in range(3, 3 + cuda_graphs.SHAPES):
            x = torch.randn(n, 3, 4, 4)
            assert torch.equal(graphs(function, x), function(x))
    assert len(graphs._graphs) == cuda_graphs.SHAPES and f"{cuda_graphs.SHAPES} input shapes" in repr(graphs)
    assert len(copy.deepcopy(graphs)._graphs) == len(pickle.loads(pickle.dumps(graphs))._graphs) == 0


def test_what_cannot_be_recorded_runs_without(monkeypatch):
    function = lambda x: x * 2  # noqa: E731
    stand_ins = StandIns(monkeypatch, function)
    stand_ins.fails = True
    x = torch.randn(2, 3, 4, 4)
    with pytest.warns(
        UserWarning, match="^cuda_graph: this model can't be recorded .*not permitted when stream is capt"
    ):
        assert torch.equal(stand_ins.graphs(function, x), x * 2)
    tried = list(stand_ins.log)
    assert torch.equal(stand_ins.graphs(function, x), x * 2)
    assert stand_ins.log == tried, "tried again"
    assert "not permitted" in repr(stand_ins.graphs) and "replay" not in stand_ins.log


def test_threads_take_turns(monkeypatch):
    """A graph has one input and one output: what a thread puts there nobody may touch before it has its result."""

    def function(x: Tensor) -> Tensor:
        time.sleep(1e-3)
        return x * 2

    graphs = StandIns(monkeypatch, function).graphs
    graphs(function, torch.randn(2, 3, 4, 4))
    wrong: list[Any] = []

    def serve(i: int) -> None:
        x = torch.randn(2, 3, 4, 4) + i
        try:
            wrong.extend(i for _ in range(5) if not torch.equal(graphs(function, x), x * 2))
        except Exception as error:
            wrong.append(error)

    threads = [Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(graphs._graphs) == 1


def test_a_model_that_moves_loses_its_graphs():
    """They read and write the memory that they were recorded with."""
    frozen = fr.freeze(prepared(torchvision.models.resnet.BasicBlock(3, 3)), images())
    frozen.graphs = Graphs()
    assert frozen.to("cpu").graphs is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph_equals_eager(dtype):
    """Several shapes, a second call in between, results that stay, and threads on streams of their own."""
    model = prepared(torchvision.models.resnet18(num_classes=7)).eval().cuda()
    inputs = [images(n).cuda() for n in (2, 5, 1)]
    eager = fr.freeze(model, inputs[0], dtype=dtype)
    graphed = fr.freeze(model, inputs[0], dtype=dtype, cuda_graph=True)
    want = [eager(x) for x in inputs]
    got = [graphed(x) for x in inputs]
    assert graphed.graphs is not None and graphed.graphs.refused is None and "3 input shapes" in repr(graphed)
    wrong: list[int] = [i for i in range(3) if not torch.equal(got[i], want[i])]

    def serve(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in random.Random(seed).choices(range(3), k=20):
                if not torch.equal(graphed(inputs[i]), want[i]):
                    wrong.append(i)

    torch.cuda.synchronize()
    threads = [Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.gpu
def test_cuda_graph_of_what_asks_the_device():
    """A module that waits for a number from the device can't be recorded; later models can."""

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item()

    x = images().cuda()
    block = torchvision.models.resnet.BasicBlock(3, 3).cuda().eval()
    with pytest.warns(UserWarning, match="can't be recorded"):
        frozen = fr.freeze(nn.Sequential(block, Asks()), x, cuda_graph=True)
    torch.testing.assert_close(frozen(x), Asks()(block(x)), rtol=1e-2, atol=1e-2)
    assert "no CUDA graph" in repr(frozen)
    again = fr.freeze(nn.Sequential(block), x, cuda_graph=True)
    assert again.graphs is not None and again.graphs.refused is None
