"""What is measured to choose between chains and PyTorch's own operators: once, on copies, unseen by the user."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import prepared
from plans import own_plan
from stages import step
from torch import Tensor, nn
from torchvision_shim import torchvision

import fused_resnet as fr
from fused_resnet import planner
from fused_resnet.backends import ConvBiasAct, load
from fused_resnet.backends.steps import Step
from fused_resnet.chain import call as chain_call
from fused_resnet.chain import choice
from fused_resnet.frozen import forward as frozen_forward
from fused_resnet.planner import sizes
from fused_resnet.planner.cache import PlanCache, identity
from fused_resnet.planner.sizes import Measured

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
NOTHING: sizes.Calls = lambda n: (lambda: None, lambda: None)  # noqa: E731


@pytest.fixture(autouse=True)
def chains_at_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Measuring, with a plan of its own."""
    monkeypatch.setattr(frozen_forward, "_served", {})
    with own_plan(monkeypatch, tmp_path):
        yield


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches of all measurements; PyTorch's operators are the faster ones, and both ways are run."""
    return says(monkeypatch, False)


def says(monkeypatch: pytest.MonkeyPatch, pays: bool) -> list[int]:
    """What every measurement is to find."""
    found: list[int] = []

    def timed(images: int, calls: sizes.Calls, call_s: float, tie: float) -> Measured:
        found.append(images)
        for call in calls(images):
            call()
        return Measured(pays, 1.0, 2.0 if pays else 0.5)

    monkeypatch.setattr(sizes, "_timed", timed)
    monkeypatch.setattr(choice, "products", lambda *about: 0)  # its measurements: test_products.py
    return found


def network() -> nn.Module:
    """A stem and two stages, which are three rows."""
    block, resnet = torchvision.models.resnet.BasicBlock, torchvision.models.resnet
    down = nn.Sequential(resnet.conv1x1(8, 16, 2), nn.BatchNorm2d(16))
    stem = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    return prepared(nn.Sequential(stem, block(8, 8), block(8, 8), block(8, 16, 2, down), block(16, 16)))


def unit() -> nn.Module:
    return prepared(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()))


def images(n: int = 3, size: int = 8) -> Tensor:
    return torch.randn(n, 8, size, size) * 1.5 + 0.4


# ---------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("pays", [True, False])
def test_a_module_does_what_was_measured(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    """Each row once per kind of input, in copies of the model and in others like it too; explain tells both times."""
    timed = says(monkeypatch, pays)
    plain = network()
    fused, x = fr.fuse(copy.deepcopy(plain)), images()
    for _ in range(3):
        want, got = step(plain, x), step(fused, x)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)
    assert timed == [3, 3, 3]
    rows, text = fr.explain(fused).rows, str(fr.explain(fused))
    assert len(rows) == 5
    assert all(row.fused is pays and row.ran == (3 if pays else 0) and bool(row.reason) is not pays for row in rows)
    assert f"3x8x8x8 float32, with gradients: {sizes.Measured(pays, 1.0, 2.0 if pays else 0.5)}" in text
    assert ("PyTorch's own operators are faster" in text) is not pays
    pickled = pickle.dumps(copy.deepcopy(fused))
    assert b"_fr_fronts" not in pickled
    remade = b"fused_resnet.fusion.classes\x94\x8c\x07rebuild"  # the function that makes the class again, no more
    assert pickled.count(b"fused_resnet.fusion") == pickled.count(remade) == 1
    step(pickle.loads(pickled), images(4))  # three images and four are alike
    assert len(timed) == 3


def other_inputs() -> dict[str, Callable[[nn.Module, Tensor], Any]]:
    def autocast(m: nn.Module, x: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            m(x)

    def no_grad(m: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            m(x)

    def threads(m: nn.Module, x: Tensor) -> None:
        torch.set_num_threads(2)
        try:
            m(x)
        finally:
            torch.set_num_threads(1)

    return {
        "batch": lambda m, x: m(images(9)),
        "size": lambda m, x: m(images(3, 16)),
        "layout": lambda m, x: m(x.contiguous(memory_format=torch.channels_last)),
        "a gradient of x": lambda m, x: m(x.clone().requires_grad_()),
        "no gradient": no_grad,
        "autocast": autocast,
        "threads": threads,
        "running statistics": lambda m, x: m.eval()(x),
        "no gradient of the parameters": lambda m, x: m.requires_grad_(False)(x),
        "dtype": lambda m, x: m.double()(x.double()),
    }


def test_other_signatures_are_measured_too(timed: list[int]) -> None:
    """One change after the other, each asked for once."""
    model, x = fr.fuse(unit()), images()
    model(x)
    model(x)
    assert len(timed) == 1
    for name, call in other_inputs().items():
        model, before = (fr.fuse(copy.deepcopy(model)) if name.startswith("no gradient of") else model), len(timed)
        call(model, x)
        call(model, x)
        assert len(timed) == before + 1, name


def test_a_call_that_runs_no_chain_says_so(timed: list[int]) -> None:
    m = fr.fuse(unit())
    for x in (images(2), images(4)):  # each kind of call is a case of its own
        with pytest.warns(
            UserWarning, match="fuse: this Sequential runs PyTorch's own operators on inputs of this size"
        ):
            m(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            m(x)


def test_a_call_that_runs_chains_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fr.fuse(unit())(images())


def test_an_error_is_the_callers() -> None:
    model = fr.fuse(unit())
    with pytest.raises((ValueError, RuntimeError), match="channels"):
        model(torch.randn(2, 5, 8, 8))
    assert model.get_buffer("1.num_batches_tracked") == 0
    one = fr.fuse(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    with pytest.raises(ValueError, match="more than 1 value"):
        one(torch.randn(1, 4, 1, 1))
    assert one(torch.randn(2, 4, 1, 1)).shape == (2, 4, 1, 1)  # which a batch of one can't be measured for


# ---------------------------------------------------------------------------------------------------- memory
def test_answers_outlive_the_process(timed: list[int], tmp_path: Path) -> None:
    x = images()
    fr.fuse(network())(x)
    known = dict(sizes._known)
    assert len(timed) == len(known) == 3
    (file,) = (tmp_path / "plans").glob("*.json")
    raw = json.loads(file.read_text())
    assert "1 threads" in raw["identity"]["device"] and len(raw["choices"]) == 3
    for entry in raw["choices"].values():
        assert entry == {"choice": {"chains": False}, "ms": {"chains": 1.0, "plain": 0.5}}
    sizes.forget()  # as in another process
    planner.forget()
    fr.fuse(network())(x)
    assert len(timed) == 3 and sizes._known == known


def test_an_answer_never_changes_within_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, False)
    sizes.faster("text", 1, NOTHING, 0.01)
    says(monkeypatch, True)
    (entry,) = planner.cache_of(CPU).choices.values()
    entry["choice"]["chains"] = True
    assert not sizes.faster("text", 1, NOTHING, 0.01).pays


def test_another_process_was_first(timed: list[int]) -> None:
    planner.cache_of(CPU)  # read, empty
    PlanCache(identity(CPU)).add("text", {"choice": {"chains": True}, "ms": {"chains": 1.0, "plain": 3.0}})
    assert sizes.faster("text", 1, NOTHING, 0.01) == Measured(True, 1.0, 3.0)


def test_a_damaged_entry_is_measured_again(timed: list[int]) -> None:
    planner.cache_of(CPU).choices["text"] = {"choice": "plain"}
    assert not sizes.faster("text", 1, NOTHING, 0.01).pays and timed


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "FUSED_RESNET_CPU_COMPUTE"])
def test_a_plan_is_of_one_processor(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """And of what its libraries may use of it."""
    monkeypatch.delenv(name, raising=False)
    mine = identity(CPU)
    monkeypatch.setenv(name, "float32")
    assert identity(CPU) != mine


# ---------------------------------------------------------------------------------------------------- nothing to ask
def test_where_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, timed: list[int]) -> None:
    """Where chains are asked for, where the plain model is to be seen, and where there is no CPU to measure."""
    model, x = fr.fuse(unit()), images()
    ran: list[Any] = []
    real = chain_call.run_row
    monkeypatch.setattr(chain_call, "run_row", lambda *args: ran.append(args) or real(*args))
    with monkeypatch.context() as m:
        m.setenv("FUSED_RESNET_PLAN", "preference")
        model(x)
    with fr.use_backend("aten"):
        model(x)
    with sizes.chains_always():
        model(x)
        fr.freeze(model, x)
    assert len(ran) == 3
    torch.compile(model, backend="eager")(x)
    torch.jit.trace(model.eval(), x, check_trace=False)
    torch.export.export(model, (x,))
    torch.func.vmap(model)(x[None])
    assert len(ran) == 3
    fr.fuse(unit()).to("meta")(x.to("meta"))
    assert not timed
    monkeypatch.setenv("FUSED_RESNET_PLAN", "preference")
    fr.freeze(model, x)
    assert not timed


# ---------------------------------------------------------------------------------------------------- unseen
def observed(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What a user can see of a step: by hooks, random state and the model."""
    saved, called = [], []
    for name, m in model.named_modules():
        m.register_forward_hook(lambda *args, name=name: called.append(name))
    for name, p in model.named_parameters():
        p.register_hook(lambda grad, name=name: called.append(name))
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        out = model(x)
        out.square().mean().backward()
    return {
        "called": sorted(called),
        "saved": saved,
        "random": torch.rand(3).tolist(),
        "modes": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()),
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {k: p.grad for k, p in model.named_parameters()},
    }


@pytest.mark.parametrize("pays", [True, False])
def test_a_measurement_is_not_seen(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    """The first step, which measures, is the second one on a copy of the same model."""
    timed = says(monkeypatch, pays)
    model, x = fr.fuse(nn.Sequential(unit(), unit())), images()
    first = observed(copy.deepcopy(model), x)
    assert timed
    known = len(timed)
    again = observed(copy.deepcopy(model), x)
    assert len(timed) == known
    for kind in ("called", "saved", "random", "modes"):
        assert first[kind] == again[kind], kind
    for kind in ("state", "grads"):
        for name, value in first[kind].items():
            assert torch.equal(value, again[kind][name]), name


@pytest.mark.parametrize("state", [torch.inference_mode, torch.autograd.detect_anomaly, nullcontext])
def test_measured_whatever_state_it_comes_in(timed: list[int], state: Callable[[], Any]) -> None:
    plain, x = unit().eval(), images()
    fused = fr.fuse(copy.deepcopy(plain))
    with state():
        for _ in range(3):
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    assert len(timed) == 1 and sizes._known  # and it could be: both ways ran
    assert not any(row.fused for row in fr.explain(fused).rows)


def test_threads_that_come_at_once_measure_once(timed: list[int]) -> None:
    model, x = fr.fuse(unit()).eval(), images()
    found: list[Tensor] = []
    together = threading.Barrier(4)

    def work() -> None:
        together.wait()
        with torch.no_grad():
            found.append(model(x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4 and len(timed) == 1
    for out in found:
        torch.testing.assert_close(out, found[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_forked_while_another_thread_measures() -> None:
    """It has that thread's lock, but not the thread."""
    model, x = fr.fuse(unit()), images()
    with sizes._measuring.held():
        child = os.fork()
        if child == 0:
            try:
                with torch.no_grad():
                    model(x)
                    fr.freeze(model, x)
                os._exit(0 if sizes._known else 2)
            except BaseException:
                os._exit(1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


# ---------------------------------------------------------------------------------------------------- frozen
@pytest.mark.parametrize("pays", [True, False])
def test_frozen_units_do_what_was_measured(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    cpu = load("cpu")[0]
    if cpu is None:
        pytest.skip("the compiled extension is not built")
    says(monkeypatch, pays)
    plain, x, rows, real = network().eval(), images(), [], frozen_forward._served_row

    def served(*args: Any) -> Tensor:
        out = real(*args)
        rows.extend(args[-1].values())
        return out

    written: dict[int, list[Any]] = {}
    write = cpu.frozen_row

    def frozen_row(recorded: Any) -> Any:
        row = write(recorded)
        written[id(row)] = [r.step for r in recorded]
        return row

    monkeypatch.setattr(frozen_forward, "_served_row", served)
    monkeypatch.setattr(cpu, "frozen_row", frozen_row)
    frozen = fr.freeze(plain, x)
    assert sizes._known and all(text.startswith("frozen") for _, text in sizes._known)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), plain(x), rtol=1e-4, atol=1e-4)
    steps = [step for row in rows for step in written[id(row)]]
    convolutions = [s for s in steps if isinstance(s, Step) and isinstance(s.call, ConvBiasAct)]
    assert convolutions and all((step.packed is not None) is pays for step in convolutions)
    packed = [row for row in fr.explain(frozen).rows if "packed: " in str(row.backends)]
    assert bool(packed) is pays


# ---------------------------------------------------------------------------------------------------- on this machine
def test_a_row_by_the_clock() -> None:
    model = fr.fuse(unit())
    step(model, images())
    (found,) = sizes._known.values()
    assert 0 < found.ours < 1e4 and 0 < found.plain < 1e4 and found.pays == (found.ours < sizes.TIE * found.plain)
    (row,) = fr.explain(model).rows
    assert row.fused is found.pays and str(found) in row.measured
