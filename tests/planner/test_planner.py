"""The planner: measured choices, their cache file, and what may go wrong with either."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_resnet as fr
from fused_resnet import planner
from fused_resnet.backends import (
    BackendUnavailable,
    BnAct,
    Call,
    ConvBackward,
    ConvStats,
    DyCoefficients,
    Norm,
    Prologue,
    load,
    loaded,
    use_backend,
)
from fused_resnet.base import library
from fused_resnet.planner import Choice
from fused_resnet.planner.cache import PlanCache, identity
from fused_resnet.spec import Act, ConvSpec

CPU = torch.device("cpu")
CONV = ConvSpec(padding=(1, 1))


@pytest.fixture(autouse=True)
def measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Measures on the CPU, into a cache folder of the test's own."""
    if load("cpu")[0] is None:
        pytest.skip("one backend alone leaves nothing to choose: the extension is not built")
    monkeypatch.setenv("FUSED_RESNET_PLAN", "measure")
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    planner.forget()
    yield tmp_path
    planner.forget()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds by label, instead of the clock's; unknown labels take 5. "calls" counts what was timed."""
    times: dict[str, float] = {"calls": 0}

    def read(call: Any, device: torch.device) -> float:
        times["calls"] += 1
        choice, timed = call.args
        label = planner.label(choice)
        if isinstance(timed, ConvBackward) and timed.need_input != timed.need_weight:
            label = f"{'input' if timed.need_input else 'weight'}: {label}"
        call()
        return times.get(label, 5.0)

    monkeypatch.setattr(planner.measuring, "milliseconds", read)
    return times


def nhwc(*shape: int) -> Tensor:
    return (torch.randn(shape) * 2 + 1).to(memory_format=torch.channels_last)


def norm(channels: int) -> Norm:
    return Norm(*(torch.randn(channels) for _ in range(4)))


def backward_call(add: Tensor | None, prologue: bool = False) -> ConvBackward:
    coef = DyCoefficients(*(torch.randn(5) for _ in range(4)))
    before = Prologue(norm(4), Act("relu")) if prologue else None
    dz, y, x, weight = nhwc(2, 5, 6, 7), nhwc(2, 5, 6, 7), nhwc(2, 4, 6, 7), nhwc(5, 4, 3, 3)
    return ConvBackward(dz, y, coef, x, before, weight, CONV, True, True, add)


def entries(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("plan-*.json")
    choices: dict[str, Any] = json.loads(file.read_text())["choices"]
    return choices


def test_the_fastest_is_kept_and_not_measured_again(measuring: Path, clock: dict[str, float]) -> None:
    clock |= {"cpu": 2.0, "aten": 3.0}
    x, w = nhwc(3, 4, 6, 7), nhwc(5, 4, 3, 3)
    want = ConvStats(x, w, CONV, None, True).on(loaded("aten"))
    got = planner.run(ConvStats(x, w, CONV, None, True))
    torch.testing.assert_close(got, want)
    (entry,) = entries(measuring).values()
    assert entry == {"choice": {"backend": "cpu", "config": None}, "ms": {"cpu": 2.0, "aten": 3.0}}
    timed = clock["calls"]
    planner.run(ConvStats(x, w, CONV, None, True))
    planner.forget()  # as another process would start
    clock |= {"cpu": 9.0}
    planner.run(ConvStats(x, w, CONV, None, True))
    assert clock["calls"] == timed, "measured again"
    planner.run(ConvStats(nhwc(4, 4, 6, 7), w, CONV, None, True))
    assert clock["calls"] == timed, "a batch of 4 has the signature of one of 3"
    planner.run(ConvStats(nhwc(5, 4, 6, 7), w, CONV, None, True))
    assert clock["calls"] > timed


def test_never_slower_than_aten(measuring: Path, clock: dict[str, float]) -> None:
    clock |= {"cpu": 3.0001, "aten": 3.0}
    planner.run(BnAct(nhwc(2, 4, 6, 7), norm(4), Act("relu")))
    clock |= {"cpu": 3.0, "aten": 3.0}
    planner.run(BnAct(nhwc(2, 4, 6, 8), norm(4), Act("relu")))
    first, second = entries(measuring).values()
    assert first["choice"]["backend"] == "aten"
    assert second["choice"]["backend"] == "cpu", "of equals the preferred"


@pytest.mark.parametrize("wrong", [lambda t: t * 1.05, lambda t: t.clone().fill_(float("nan")), lambda t: t[:, :-1]])
def test_other_numbers_are_never_chosen(
    measuring: Path, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor]
) -> None:
    """However fast: a kernel that a driver or a compiler broke gives way to aten, and the user hears of it."""
    clock |= {"cpu": 1.0, "aten": 3.0}
    cpu = loaded("cpu")
    right = cpu.bn_act
    monkeypatch.setattr(cpu, "bn_act", lambda call: wrong(right(call)))
    planner.measuring.warn_once.cache_clear()
    call = BnAct(nhwc(2, 4, 6, 7), norm(4), Act("relu"))
    with pytest.warns(UserWarning, match="^cpu is not used for bn_act .*differs from aten's by"):
        got = planner.run(call)
    torch.testing.assert_close(got, call.on(loaded("aten")))
    (entry,) = entries(measuring).values()
    assert entry == {"choice": {"backend": "aten", "config": None}, "ms": {"aten": 3.0}}


def test_what_is_not_written_is_never_chosen(
    measuring: Path, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that does nothing is fast, and the memory that it gets may hold another candidate's right result."""
    clock |= {"cpu": 1.0, "aten": 3.0}
    call = BnAct(nhwc(2, 4, 6, 7), norm(4), Act("relu"))
    right = call.on(loaded("aten"))

    def nothing(call: BnAct) -> Tensor:
        out = torch.empty_like(call.y)
        return out if out.isnan().all() else right.clone()  # as freed memory would come back

    monkeypatch.setattr(loaded("cpu"), "bn_act", nothing)
    planner.measuring.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="^cpu is not used for bn_act .*differs from aten's by nan"):
        planner.run(call)
    assert torch.get_deterministic_debug_mode() == 0, "switched on for good"
    (entry,) = entries(measuring).values()
    assert entry["choice"]["backend"] == "aten"


def test_tf32_is_another_signature() -> None:
    """Of float32 convolutions on a GPU: PyTorch's setting decides which kernels run."""
    settings: Any = torch.backends.cudnn.conv
    before = settings.fp32_precision
    with FakeTensorMode():
        conv = [torch.empty(2, 4, 6, 6, device="cuda"), torch.empty(4, 4, 3, 3, device="cuda"), CONV, None, True]
        half = [t.half() if isinstance(t, Tensor) else t for t in conv]
        vectors = Norm(*(torch.empty(4, device="cuda") for _ in range(4)))
        calls: dict[str, Call[Any]] = {
            "float32": ConvStats(*conv),
            "float16": ConvStats(*half),
            "pass": BnAct(conv[0], vectors, Act("relu")),
        }
        found = []
        try:
            for setting in ("tf32", "ieee"):
                settings.fp32_precision = setting
                found.append({n: (c.signature, c.key) for n, c in calls.items()})
        finally:
            settings.fp32_precision = before
    allowed, exact = found
    assert allowed["float32"][0] == exact["float32"][0] + " tf32" and allowed["float32"][1] != exact["float32"][1]
    assert allowed["float16"] == exact["float16"] and allowed["pass"] == exact["pass"]


def test_another_build_has_another_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was built in since is measured too, and kernels that changed are measured again."""
    mine = identity(CPU)
    (tmp_path / "built_again.so").touch()
    with monkeypatch.context() as later:
        later.setattr(library, "PATH", tmp_path / "built_again.so")
        assert identity(CPU) != mine
    with monkeypatch.context() as other:
        other.setattr(library, "build_info", lambda: {"cuda_archs": "8.0;9.0a", "cutlass": "4.2.0"})
        assert identity(CPU)["extension"].startswith("cuda 8.0;9.0a, cutlass 4.2.0, built ")
        assert identity(CPU)["extension"] != mine["extension"]
    monkeypatch.setenv("FUSED_RESNET_NO_EXT", "1")
    assert identity(CPU)["extension"] == "none"


def test_no_numbers_in_the_same_places_are_the_same(measuring: Path, clock: dict[str, float]) -> None:
    clock |= {"cpu": 1.0, "aten": 3.0}
    x = nhwc(2, 4, 6, 7)
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    planner.run(BnAct(x, norm(4), Act("identity")))
    (entry,) = entries(measuring).values()
    assert entry["choice"]["backend"] == "cpu"


@pytest.mark.parametrize("prologue", [False, True])
def test_input_and_weight_apart(measuring: Path, clock: dict[str, float], prologue: bool) -> None:
    """Where two backends are better than one, each computes its part; ``add`` is still added once."""
    clock |= {"input: cpu": 1.0, "weight: cpu": 4.0, "input: aten": 4.0, "weight: aten": 1.0, "cpu": 2.5, "aten": 2.5}
    add = None if prologue else nhwc(2, 4, 6, 7)
    call = backward_call(add, prologue)
    want = call.on(loaded("aten"))
    got = planner.run(call)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    (entry,) = entries(measuring).values()
    parts = [{"backend": "cpu", "config": None}, {"backend": "aten", "config": None}]
    assert entry["choice"] == {"backend": "apart", "parts": parts}
    assert entry["ms"]["apart: cpu + aten"] == 2.0


def test_measuring_leaves_add_as_it_was(clock: dict[str, float]) -> None:
    add = nhwc(2, 4, 6, 7)
    call, before = backward_call(add), add.clone()
    want = call.on(loaded("aten"))
    planner.measuring.measure(call, ["cpu", "aten"])
    assert torch.equal(add, before)
    torch.testing.assert_close(planner.run(call), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "{not json",
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: text.replace('"torch"', '"torch of another machine"'),
        lambda text: text.replace('"choice"', '"chosen"'),
        lambda text: json.dumps([1, 2, 3]),
        lambda text: text[: len(text) // 2],
    ],
)
def test_a_corrupt_or_foreign_file_is_ignored_with_a_warning(
    measuring: Path, clock: dict[str, float], damage: Callable[[str], str]
) -> None:
    call = BnAct(nhwc(2, 4, 6, 7), norm(4), Act("relu"))
    planner.run(call)
    (file,) = measuring.glob("plan-*.json")
    file.write_text(damage(file.read_text()))
    planner.forget()
    timed = clock["calls"]
    with pytest.warns(UserWarning, match=r"plan cache .* is ignored"):
        planner.run(call)
    assert clock["calls"] > timed
    planner.forget()
    assert list(entries(measuring)), "and is replaced by a good one"


def test_a_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: dict[str, float]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "file" / "folder"))
    planner.forget()
    with pytest.warns(UserWarning, match=r"can't be written|is ignored"):
        planner.run(BnAct(nhwc(2, 4, 6, 7), norm(4), Act("relu")))
    timed = clock["calls"]
    planner.run(BnAct(nhwc(2, 4, 6, 7), norm(4), Act("relu")))
    assert clock["calls"] == timed, "the choice holds for this process"


def _write(path: Path, worker: int) -> None:
    for i in range(20):
        PlanCache(identity(CPU), path).add(f"{worker} {i}", {"choice": {"backend": "aten"}, "ms": {}})


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(path, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    assert len(PlanCache(identity(CPU), path).choices) == 60
    assert [p.name for p in tmp_path.iterdir() if "lock" not in p.name] == ["plan.json"], "no temporary file stays"


def test_the_first_writer_holds(tmp_path: Path) -> None:
    a, b = PlanCache(identity(CPU), tmp_path / "p.json"), PlanCache(identity(CPU), tmp_path / "p.json")
    a.add("s", {"choice": {"backend": "cpu"}, "ms": {}})
    assert b.add("s", {"choice": {"backend": "aten"}, "ms": {}})["choice"]["backend"] == "cpu"


def test_a_backend_that_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, measuring: Path, clock: dict[str, float]
) -> None:
    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    clock |= {"cpu": 1.0, "aten": 2.0}
    monkeypatch.setattr(loaded("cpu"), "bn_act", broken)
    with pytest.warns(UserWarning, match="backend 'cpu' can't run bn_act .* no kernel image"):
        planner.run(BnAct(nhwc(2, 4, 5, 7), norm(4), Act("relu")))
    (entry,) = entries(measuring).values()
    assert entry["choice"]["backend"] == "aten"


def test_a_cached_backend_that_is_gone(measuring: Path, clock: dict[str, float]) -> None:
    """Is measured again, once, and its entry replaced; nothing fails."""
    clock |= {"cpu": 1.0, "aten": 2.0}
    call = BnAct(nhwc(2, 4, 6, 7), norm(4), Act("relu"))
    want = planner.run(call)
    (file,) = measuring.glob("plan-*.json")
    file.write_text(file.read_text().replace('"backend": "cpu"', '"backend": "gone"'))
    planner.forget()
    timed = clock["calls"]
    torch.testing.assert_close(planner.run(call), want)
    assert clock["calls"] == timed + 2
    (entry,) = entries(measuring).values()
    assert entry["choice"] == {"backend": "cpu", "config": None}
    planner.run(call)
    planner.forget()
    planner.run(call)
    assert clock["calls"] == timed + 2, "measured again and again"


def test_an_empty_batch_is_not_measured(measuring: Path, clock: dict[str, float]) -> None:
    out = planner.run(BnAct(nhwc(0, 4, 6, 7), norm(4), Act("relu")))
    assert out.shape == (0, 4, 6, 7) and clock["calls"] == 0 and not list(measuring.glob("plan-*"))


def test_use_backend_overrides(measuring: Path, clock: dict[str, float]) -> None:
    clock |= {"cpu": 1.0, "aten": 2.0}
    with use_backend("aten"):
        planner.run(BnAct(nhwc(2, 4, 6, 7), norm(4), Act("relu")))
    assert clock["calls"] == 0
    with pytest.raises(BackendUnavailable, match="cuda"), use_backend("cuda"):
        pass


def test_a_wrong_wish_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RESNET_PLAN", "fast")
    with pytest.raises(ValueError, match="FUSED_RESNET_PLAN: expected auto, measure or preference, got 'fast'"):
        planner.run(BnAct(nhwc(2, 4, 6, 7), norm(4), Act("relu")))


def test_a_network_is_planned_and_explained(measuring: Path, clock: dict[str, float]) -> None:
    clock |= {"cpu": 1.0, "aten": 1.25}
    model = fr.fuse(fr.models.resnet20(num_classes=4)).to(memory_format=torch.channels_last)
    x = nhwc(2, 3, 32, 32)
    model(x).sum().backward()
    text = str(fr.explain(model))
    assert "conv_stats 3x3: cpu (1.000 ms, aten 1.250)" in text
    assert "bn_act_backward: cpu (1.000 ms, aten 1.250)" in text
    kinds = {signature.split()[0] for signature in entries(measuring)}
    assert {"conv_stats", "conv_backward", "bn_act", "bn_act_backward"} <= kinds


def test_choices_survive_their_text() -> None:
    part = Choice("triton", ("fprop", (128, 64, 32, 8, 3, 1)))
    for choice in (part, Choice("aten"), Choice("apart", parts=(part, Choice("cudnn")))):
        assert Choice.decode(json.loads(json.dumps(choice.encode()))) == choice


def test_configurations_of_the_triton_backend() -> None:
    """Every configuration that it offers for a call gives the same result."""
    triton, reason = load("triton")
    if triton is None or torch.cuda.is_available():
        pytest.skip(f"triton: {reason}")
    with use_backend("triton"):
        call = ConvStats(nhwc(1, 16, 5, 5), nhwc(8, 16, 3, 3), CONV, None, True)
        want, found = call.on(loaded("aten")), triton.configurations(call)
        assert found and all(kind == "fprop" for kind, _ in found)
        for config in found[:2]:
            got = planner.choice.call_choice(Choice("triton", config), call)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
