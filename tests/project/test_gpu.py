"""On a GPU: chains of every backend against the reference, run after run, in graphs, and what a launch costs."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import chains
import pytest
import torch
from tolerances import assert_as_good, assert_close

import fused_resnet as fr
from fused_resnet import planner
from fused_resnet.backends import BnAct, Norm, load, use_backend
from fused_resnet.spec import Act

pytestmark = pytest.mark.gpu

BACKENDS = ("triton", "cudnn", "cuda")
SHAPES = [shape for shape in chains.SHAPES if shape != "grouped"]
LARGE = {  # shape, width, batch, image: several tiles of every kernel, odd sizes, channels that are no multiple of 8
    "basic": ("basic", 64, 4, (28, 28)),
    "bottleneck": ("bottleneck", 64, 4, (14, 14)),
    "projection": ("bottleneck_projection", 64, 3, (15, 13)),
    "odd_channels": ("basic_projection", 65, 2, (17, 19)),
    "stem": ("stem", 24, 4, (33, 31)),
}


@pytest.fixture(params=BACKENDS)
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    module, reason = load(request.param)
    if module is None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """float32 means float32 in these comparisons."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_gpu(chain: chains.Chain, t: chains.Tensors, dtype: torch.dtype) -> chains.Tensors:
    return chains.cast(chain, t, dtype, torch.channels_last).map(lambda v: v.cuda())


def compare(chain: chains.Chain, dtype: torch.dtype) -> None:
    draws = []
    for _ in range(1 if dtype == torch.float32 else 3):
        t = on_gpu(chain, chains.draw(chain, attempts=20_000) if chain.x_shape[1] < 8 else wide_draw(chain), dtype)
        with use_backend("aten"):
            plain = chains.run(chain, t, chains.plain)
        draws.append((chains.run(chain, t), plain, chains.truth(chain, t)))
    for name in draws[0][0]:
        got, plain, truth = ([d[i][name] for d in draws] for i in range(3))
        if dtype == torch.float32:
            assert_close(name, got[0], truth[0], chains.reduction(chain))
        else:
            assert_as_good(name, got, plain, truth, dtype)


def wide_draw(chain: chains.Chain) -> chains.Tensors:
    """So many values lie near a kink anyway that the activation has to be smooth: the caller's is."""
    return chains.draw(chain, margin=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["batch", "mixed"])
def test_small_chains(forced: str, shape: str, mode: str) -> None:
    compare(chains.make(shape, "relu", mode, width=3, batch=2, size=(7, 6)), torch.float32)


@pytest.mark.parametrize("act", list(chains.ACTS))
def test_activations(forced: str, act: str) -> None:
    compare(chains.make("basic", act, "batch", width=3, batch=2, size=(5, 6)), torch.float32)


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_large_chains(forced: str, case: str, dtype: torch.dtype) -> None:
    shape, width, batch, size = LARGE[case]
    compare(chains.make(shape, "silu", "batch", width, batch, size), dtype)


@pytest.mark.parametrize("case", ["basic", "projection", "stem"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inference(forced: str, case: str, dtype: torch.dtype) -> None:
    shape, width, batch, size = LARGE[case]
    chain = chains.make(shape, "silu", "frozen", width, batch, size)
    draws = []
    for _ in range(3):
        t = on_gpu(chain, wide_draw(chain), dtype)
        got = torch.ops.fused_resnet.chain_inference(t.x, t.residual, t.params, chain.text)
        draws.append((got, chains.run(chain, t, chains.plain)["out"], chains.truth(chain, t)["out"]))
    got, plain, truth = zip(*draws, strict=True)
    if dtype == torch.float32:
        assert_close("out", got[0], truth[0], chains.reduction(chain))
    else:
        assert_as_good("out", got, plain, truth, dtype)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("case", ["projection", "stem"])
def test_same_bits_run_after_run(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels use no atomics: two runs agree in every bit, also while another stream is busy. (cuDNN's weight
    gradients, between the CUDA passes, may use them unless told not to.)"""
    if load(backend)[0] is None:
        pytest.skip(f"backend {backend!r}: {load(backend)[1]}")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    shape, width, batch, size = LARGE[case]
    chain = chains.make(shape, "relu", "batch", width, batch, size)
    t = on_gpu(chain, wide_draw(chain), torch.bfloat16)
    with use_backend(backend):
        first = chains.run(chain, t)
        busy, stream = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                busy = busy @ busy / 64
        second = chains.run(chain, t)
    torch.cuda.synchronize()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_tf32_follows_pytorch(forced: str) -> None:
    """Allowed, float32 products lose precision; forbidden, they do not."""
    chain = chains.make("conv", "identity", "batch", 64, 2, (14, 14))
    t = on_gpu(chain, wide_draw(chain), torch.float32)
    want = chains.truth(chain, t)["out"]
    errors = []
    for allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        errors.append((chains.run(chain, t)["out"] - want).norm().item() / want.norm().item())
    assert errors[0] < 1e-6 < errors[1] < 1e-2, errors


def test_another_device_is_respected(forced: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    chain = chains.make("basic", "relu", "batch", 8, 2, (6, 6))
    t = chains.cast(chain, chains.draw(chain), torch.float32, torch.channels_last)
    here, there = (chains.run(chain, t.map(lambda v, d=d: v.to(d)))["out"] for d in ("cuda:0", "cuda:1"))
    torch.testing.assert_close(here.cpu(), there.cpu())


def trained(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()}


def network() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = fr.models.resnet18(num_classes=10).cuda().to(memory_format=torch.channels_last)
    return model, torch.randn(8, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)


def test_a_cuda_graph_of_a_training_step(forced: str) -> None:
    """Captured and replayed, a step gives the gradients of one that is not, within bfloat16's rounding; capture itself
    fails on anything that allocates or waits outside torch."""
    model, x = network()
    twin = copy.deepcopy(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, packs
            trained(twin, x)
            twin.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(stream)
    twin.load_state_dict(model.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = trained(twin, x)
    graph.replay()
    want = trained(model, x)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=2e-2, atol=2e-3 * value.abs().max().item() + 1e-6)


def test_a_cuda_graph_of_an_evaluation(forced: str) -> None:
    """Captured, and replayed on other images, an evaluation gives what the network gives outside the graph."""
    model, x = network()
    model.eval()
    others = [torch.randn_like(x) * 2 + 1 for _ in range(2)]
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for other in others:
            want = model(other)
            x.copy_(other)
            out.fill_(float("nan"))
            graph.replay()
            torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-3 * want.abs().max().item())


def test_a_thousand_replays(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured training step, replayed 1,000 times on one input, gives the bits of the first replay each time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model, x = network()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 0.0  # running statistics stand still, so that every replay sees the same
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            trained(model, x)
            model.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = trained(model, x)
    graph.replay()
    first = {name: value.clone() for name, value in found.items()}
    differ = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        graph.replay()
        for name, value in found.items():
            differ |= (value != first[name]).any()
    assert not differ.item()
    assert all(value.isfinite().all() for value in first.values())


def test_two_streams(forced: str) -> None:
    """Steps on two streams at once give the bits of steps one after the other."""
    chain = chains.make("basic", "silu", "batch", 64, 4, (28, 28))
    draws = [on_gpu(chain, wide_draw(chain), torch.float32) for _ in range(2)]
    torch.backends.cudnn.deterministic = True
    want = [chains.run(chain, t) for t in draws]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in draws]
    got: list[Any] = [None, None]
    for _ in range(10):
        for i, (stream, t) in enumerate(zip(streams, draws, strict=True)):
            with torch.cuda.stream(stream):
                got[i] = chains.run(chain, t)
    torch.cuda.synchronize()
    torch.backends.cudnn.deterministic = False
    for g, w in zip(got, want, strict=True):
        for name, value in w.items():
            assert torch.equal(g[name], value), name


def test_the_planner_measures_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice is at least as fast as aten; a second model like the first measures nothing."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    monkeypatch.delenv("FUSED_RESNET_PLAN", raising=False)
    planner.forget()
    try:
        model, x = network()
        trained(model, x)
        choices = planner.cache_of(x.device).choices
        assert choices
        for entry in choices.values():
            chosen = planner.label(planner.Choice.decode(entry["choice"]))
            assert entry["ms"][chosen] <= entry["ms"]["aten"], entry
        before = len(choices)
        trained(network()[0], x)
        assert len(planner.cache_of(x.device).choices) == before
        assert "ms, aten" in str(fr.explain(model))
    finally:
        planner.forget()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_host_time_of_a_primitive(backend: str) -> None:
    """A launch costs the host less than the contract's 15 us, after the first call."""
    if load(backend)[0] is None:
        pytest.skip(f"backend {backend!r}: {load(backend)[1]}")
    y = torch.randn(2, 64, 8, 8, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    one = torch.ones(64, device="cuda")
    norm = Norm(one, one, one, one)
    with use_backend(backend):
        best = float("inf")
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                planner.run(BnAct(y, norm, Act("relu"), None, None))
            best = min(best, (time.perf_counter() - start) / 100)
    torch.cuda.synchronize()
    assert best < 15e-6, f"{best * 1e6:.1f} us"
