"""Threads, forked children and PyTorch's modes: nothing depends on which thread or mode came first."""

from __future__ import annotations

import copy
import io
import itertools
import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.process import BaseProcess
from types import SimpleNamespace

import pytest
import torch
from networks import images, prepared, relative, tiny
from source_tree import ROOT
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import planner
from fused_resnet.backends import cpu_compute, load
from fused_resnet.base.locks import Lock
from fused_resnet.chain import packing

needs_extension = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")
MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of intra-op threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- the sources
PARALLEL = re.compile(r"\bparallel\(")
RAW = re.compile(r"parallel_for|parallel_reduce|#pragma omp|std::(thread|async|jthread)|TaskThreadPool")
METHODS = set(dir(Tensor)) - {"dim", "numel", "size", "stride"}  # which read what the caller's thread knows
ATEN = re.compile(
    r"\b(?:at|torch)::|\b(?:aoti_|torch_)|\b(?:call|made)\(|\bTensor\b|data_ptr|(?:\.|->)(?:"
    + "|".join(METHODS)
    + r")\("
)


def argument_list(source: str, start: int) -> str:
    """What stands between the parenthesis that opens before ``start`` and the one that closes it."""
    depth = 1
    for end in range(start, len(source)):
        depth += {"(": 1, ")": -1}.get(source[end], 0)
        if depth == 0:
            return source[start:end]
    raise AssertionError("a parenthesis that nothing closes")


def calls_in_parallel(source: str) -> list[str]:
    """What of a C++ source runs in threads that it must not: one line each."""
    source = re.sub(r"//.*", "", source)
    found = [f"{m.group()} outside launch.h" for m in RAW.finditer(source)]
    for loop in PARALLEL.finditer(source):
        found += [f"{m.group()} inside parallel" for m in ATEN.finditer(argument_list(source, loop.end()))]
    return found


def test_no_operator_runs_in_a_thread_without_the_callers_state() -> None:
    """The loops of csrc/cpu go through ``parallel``, without operators inside."""
    folder, helper = ROOT / "csrc" / "cpu", "ops/launch.h"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sources = {path.relative_to(folder).as_posix(): path.read_text() for path in files}
    assert sum(len(PARALLEL.findall(source)) for source in sources.values()) > 10
    defined = sources.pop(helper)
    assert {name: found for name, source in sources.items() if (found := calls_in_parallel(source))} == {}
    assert len(RAW.findall(re.sub(r"//.*", "", defined))) == 1, "launch.h has one loop of PyTorch's, that of parallel"


@pytest.mark.parametrize(
    "source",
    [
        "at::parallel_for(0, n, 1, [&](int64_t b, int64_t e) { kernel(b, e); });",
        "parallel(0, n, 1, [&](int64_t b, int64_t e) { aoti_torch_cpu_mm_out(c, a, w); });",
        'parallel(0, n, 1, [&](int64_t b, int64_t e) { call({"aten::mul", "Tensor"}, a, w); });',
        "parallel(0, n, 1, [&](int64_t b, int64_t e) { kernel(x.narrow(0, b, (e - b)), b); });",
        "parallel(0, 2, 1, [&](auto b, auto e) { parallel(b, e, 1, [&](auto f, auto g) { y->copy_(x); }); });",
        "#pragma omp parallel for",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert calls_in_parallel(source)


# ---------------------------------------------------------------------------------------------------- intra-op threads
@needs_extension
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 3])
def test_winograd_in_every_mode(mode: str, count: int, threads: Callable[[int], None]) -> None:
    """Tiles enough for every thread to have slices of its own: products of matrices inside a parallel loop."""
    conv = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    model = prepared(conv).to(memory_format=torch.channels_last).eval()
    x = (torch.randn(2, 64, 56, 56) * 1.3 + 0.4).to(memory_format=torch.channels_last)
    want = copy.deepcopy(model).double()(x.double())
    threads(count)
    frozen = fr.freeze(model, x)
    fused = fr.fuse(copy.deepcopy(model))
    with MODES[mode]():
        for got in (frozen(x), fused(x)):
            assert relative(got, want) < 1e-5
            assert got.is_inference() == (mode == "inference")


@needs_extension
def test_threads_agree_on_the_dtype_to_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of threads that come at once one measures, whatever a second measurement would find."""
    times = itertools.cycle([1.0, 2.0, 2.0, 1.0])

    def seconds(dtype: torch.dtype) -> float:
        time.sleep(0.02)
        return next(times)

    monkeypatch.setattr(cpu_compute, "_seconds", seconds)
    native = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True)  # on any processor
    monkeypatch.setattr(cpu_compute, "_mkldnn", native)
    monkeypatch.setenv("FUSED_RESNET_CPU_COMPUTE", "auto")
    caches = [cpu_compute.compute_dtype, cpu_compute._faster]
    for cache in caches:
        cache.cache_clear()
    found: list[torch.dtype] = []

    def ask() -> None:
        found.append(cpu_compute.compute_dtype(torch.bfloat16))

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    for cache in caches:
        cache.cache_clear()
    assert found == [torch.bfloat16] * 4


# ---------------------------------------------------------------------------------------------------- modes
def loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    out: nn.Module = torch.load(buffer, weights_only=False)
    return out


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("made", "frozen_in"),
    [
        ("grad", "inference"),
        ("inference", "no_grad"),
        pytest.param("grad", "no_grad", marks=pytest.mark.full),
        pytest.param("inference", "inference", marks=pytest.mark.full),
    ],
)
def test_frozen_across_modes(made: str, frozen_in: str) -> None:
    """Made, frozen, copied and called in different modes: plain PyTorch's values, and those of new weights at once."""
    x = images()
    with MODES[made]():
        model, other = tiny(0), tiny(1)
    with torch.inference_mode():
        want, want_other, given = model(x), other(x), x.clone()
    with MODES[frozen_in]():
        frozen, moved = fr.freeze(model, x), fr.freeze(model, x)
        first, second = fr.freeze(model, x).state_dict(), fr.freeze(other, x).state_dict()
    travels: list[Callable[[], nn.Module]]
    travels = [lambda: copy.deepcopy(frozen), lambda: loaded(frozen), lambda: moved._apply(torch.clone), lambda: frozen]
    for travel, there in itertools.product(travels, ("inference", "no_grad")):
        with MODES[there]():
            here = travel()
            assert relative(here(x), want) < 1e-5 and relative(here(given), want) < 1e-5
        for name, mode in MODES.items():
            with mode():
                here.load_state_dict(second)
                out = here(x)
            assert relative(out, want_other) < 1e-5, f"loaded in {name}"
            assert out.is_inference() == (name == "inference") and not out.requires_grad
            with mode():
                here.load_state_dict(first)
                assert relative(here(x), want) < 1e-5, f"loaded again in {name}"
        assert not any(t.is_inference() for t in here.state_dict().values())


def test_weights_of_inference_mode() -> None:
    """Assigned to a frozen model: a change of theirs, which PyTorch does not count, is seen."""
    x, model = images(), tiny()
    frozen = fr.freeze(model, x)
    with torch.inference_mode():
        frozen.model.load_state_dict({k: v.clone() for k, v in tiny(1).state_dict().items()}, assign=True)
        assert relative(frozen(x), tiny(1).eval()(x)) < 1e-5
        for name, t in frozen.model.state_dict().items():
            t.copy_(tiny(0).state_dict()[name])
        assert relative(frozen(x), tiny(0).eval()(x)) < 1e-5


TRAINED = ["all", "norms", "nothing"]
# Every mode with everything that can be trained, in training and in evaluation in turn; the other half: --full
NETWORKS = [
    pytest.param(training, made, trained, marks=[pytest.mark.full] if training == bool((i + j) % 2) else [])
    for i, made in enumerate(MODES)
    for j, trained in enumerate(TRAINED)
    for training in (True, False)
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("training", "made", "trained"), NETWORKS)
def test_fused_across_modes(trained: str, made: str, training: bool) -> None:
    """Networks and images of every mode, run in every mode, then trained: what plain PyTorch can do the fused network
    can, with its values."""

    def pair() -> tuple[nn.Module, nn.Module]:
        with MODES[made]():
            plain = tiny().train(training)
            for m in plain.modules():
                if trained == "nothing" or (trained == "norms" and isinstance(m, nn.Conv2d)):
                    m.requires_grad_(False)
            return plain, fr.fuse(copy.deepcopy(plain))

    with torch.inference_mode():
        given = images()
    models = pair()
    for x, mode in itertools.product((images(), given), ("inference", "no_grad", "grad")):
        outs: list[dict[str, Tensor] | None] = []
        for model in models:
            try:
                outs.append(run_in(mode, model, x))
            except RuntimeError as error:
                assert re.search("[Ii]nference", str(error))
                outs.append(None)
        want, got = outs
        assert got is not None or want is None, f"an error on the fused network alone, in {mode}"
        if want is None:  # the fused network may have run, and their statistics differ
            models = pair()
            continue
        assert got is not None and got.keys() == want.keys()
        for name, value in want.items():
            assert relative(got[name], value) < 1e-4, f"{name} in {mode}"
            assert got[name].is_inference() == value.is_inference() or name != "out"


def run_in(mode: str, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A forward, and the backward where there is one: the output, gradients, buffers."""
    model.zero_grad()
    with MODES[mode]():
        out = model(x)
    if out.requires_grad:
        out.square().mean().backward()
    grads = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach()} | grads | {name: b.clone() for name, b in model.named_buffers()}


# ---------------------------------------------------------------------------------------------------- fork
def ended(child: BaseProcess, seconds: float) -> bool:
    """Whether the child ends by itself in time, and well."""
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode == 0


def take(lock: Lock) -> None:
    with lock.held(), lock.held():
        pass


def test_a_forked_child_finds_every_lock_free() -> None:
    """Those of the package, one made later, and one that the forking thread itself holds."""
    context = multiprocessing.get_context("fork")
    locks = [packing._packing, planner.dispatch._choosing, cpu_compute._timing, Lock()]
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locks[0].held(), locks[1].held(), locks[2].held(), locks[3].held():
            holding.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait()
    children = [context.Process(target=take, args=(lock,)) for lock in locks]
    mine = Lock()
    with mine.held():
        for child in [*children, context.Process(target=take, args=(mine,))]:
            child.start()
            assert ended(child, 30)
    done.set()
    holder.join()


def test_locks_are_of_one_kind() -> None:
    """Who makes a lock of its own makes one that a forked child waits for."""
    kinds = "Lock|RLock|Condition|Event|Semaphore|BoundedSemaphore|Barrier|Timer"
    makes = re.compile(
        rf"threading\.({kinds})\b|^\s*from threading\b|^\s*(import|from) (_thread|queue|concurrent)\b", re.MULTILINE
    )
    package = ROOT / "fused_resnet"
    sources = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    assert [name for name, source in sources.items() if makes.search(source)] == ["base/locks.py"]


@needs_extension
@pytest.mark.usefixtures("one_thread")
def test_forks_beside_a_thread_that_packs() -> None:
    """25 children, each forked while a thread of the parent runs a frozen model on ever new shapes, run it as well.

    Each may find locks taken: of the compiler, of its guards, of the default generator. Not oneDNN's own, which hang
    plain PyTorch's children too: these convolutions need none of it.
    """
    context = multiprocessing.get_context("fork")
    model = prepared(nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())).eval()
    x = torch.randn(3, 64, 24, 24)
    stop, wrong = threading.Event(), []

    def forward(frozen: nn.Module, x: Tensor, want: Tensor) -> None:
        torch.set_num_threads(1)
        if relative(frozen(x), want) > 1e-5:
            raise AssertionError("wrong numbers")

    def serve(frozen: nn.Module) -> None:
        torch.set_num_threads(1)
        shapes = itertools.cycle(itertools.product((1, 2), range(16, 40, 4), range(17, 30, 5)))
        while not stop.is_set():
            n, h, w = next(shapes)
            frozen(torch.randn(n, 64, h, w))

    with torch.no_grad():
        want = model(x)
        for i in range(25):
            frozen = fr.freeze(model, x[:1])
            stop.clear()
            server = threading.Thread(target=serve, args=(frozen,))
            server.start()
            time.sleep(0.01 * (i % 5))
            child = context.Process(target=forward, args=(frozen, x, want))
            child.start()
            if not ended(child, 60):
                wrong.append(i)
            stop.set()
            server.join()
            assert wrong == []


@needs_extension
def test_forks_beside_a_thread_that_draws() -> None:
    """Dynamo reads the state of the default generator when it captures: its mutex is free in a forked child."""
    load("cpu")
    context = multiprocessing.get_context("fork")
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.randn(300_000)

    drawing = threading.Thread(target=draw)
    drawing.start()
    try:
        for _ in range(10):
            child = context.Process(target=torch.get_rng_state)
            child.start()
            assert ended(child, 30)
    finally:
        stop.set()
        drawing.join()


class Waits(nn.Module):
    """conv -> norm -> act, and what no graph holds: it waits in the middle of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        self.wait()
        return h

    @torch.compiler.disable
    def wait(self) -> None:
        self.inside.set()
        self.go_on.wait(60)


@pytest.mark.usefixtures("one_thread")
def test_a_child_forked_beside_a_call_captures_anew() -> None:
    """Of a thread that is in the middle of a call, nobody knows whether it holds the lock of a graph's guards."""
    context, x = multiprocessing.get_context("fork"), images(1).float()
    model = prepared(Waits()).eval()
    with torch.no_grad():
        want = torch.relu(model.norm(model.conv(x)))
        model.go_on.set()
        fr.fuse(model)(x)
        (front,) = model.__dict__["_fr_fronts"].values()

        def call(new: int) -> None:
            torch.set_num_threads(1)
            known = len(front.graphs)
            torch.testing.assert_close(model(x), want)
            if len(front.graphs) - known != new:
                raise AssertionError(f"{len(front.graphs) - known} new graphs")

        child = context.Process(target=call, args=(0,))
        child.start()
        assert ended(child, 60), "forked beside no call"
        model.inside.clear()
        model.go_on.clear()
        caller = threading.Thread(target=lambda: model(x))
        caller.start()
        assert model.inside.wait(60)
        child = context.Process(target=lambda: (model.go_on.set(), call(1)))
        child.start()
        assert ended(child, 60), "forked beside a call"
        model.go_on.set()
        caller.join()
