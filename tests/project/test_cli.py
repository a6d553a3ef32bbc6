"""The command line: exit codes, JSON, reports, and that check and bench notice what is wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import measure
from fused_resnet.backends.aten import BACKEND as ATEN
from fused_resnet.cli import bench, cases, data, digits, main, options, subjects, validate, variants
from fused_resnet.cli import check as check_module

CPU = torch.device("cpu")
TINY = ["--size", "32", "--batch-size", "2", "--repeats", "2", "--models", "resnet20", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def off_by_one_percent(function: Callable[..., Any]) -> Callable[..., Any]:
    """The first tensor that a primitive returns, 1 % too large."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return out * 1.01 if isinstance(out, Tensor) else type(out)([out[0] * 1.01, *out[1:]])

    return broken


# ---------------------------------------------------------------------------------------------------- words
@pytest.mark.parametrize("command", list(options.COMMANDS))
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"example:\n  fused-resnet {command}" in text
    assert "--json FILE" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["check", "--models", "resnet19"], "resnet19"),
        (["check", "--models", ","], "got nothing"),
        (["check", "--models", "caffe/resnet50"], "timm/NAME, transformers/NAME, got caffe/resnet50"),
        (["bench", "--models", "timm/resnet50"], "got timm/resnet50"),
        (["check", "--dtypes", "fp8"], "fp8"),
        (["check", "--models", "resnet20", "--device", "abacus"], "abacus"),
        (["bench", "--models", "resnet20", "--device", "meta"], "expected auto, cpu or cuda"),
    ],
)
def test_wrong_options_are_answered(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert not captured.out


def test_missing_packages_are_named() -> None:
    code = "import sys; sys.modules['rich'] = None; from fused_resnet.cli import main; sys.exit(main(['env']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "rich is not installed: pip install 'fused_resnet[bench]'" in done.stderr


def test_env(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "env.json"
    assert main(["env", "--json", str(file)]) == 0
    found = read(file)
    assert {"machine", "versions", "extension", "backends"} == set(found)
    assert {"cpu", "cores", "threads", "isa", "memory_gib", "gpus"} <= set(found["machine"])
    assert {"fused_resnet", "python", "torch", "triton"} <= set(found["versions"])
    assert found["backends"] == fr.backends()
    assert torch.__version__ in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- check
def test_check_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "check.json"
    assert main(["check", "--models", "plain20", "--device", "cpu", "--json", str(file)]) == 0
    found = read(file)
    assert found["ok"] and found["models"] == ["plain20"]
    assert {r["dtype"] for r in found["results"]} == {"fp64", "fp32", "bf16"}
    assert any(r["subject"] == "whole plain20" for r in found["results"])
    # every gradient in two modes, every buffer and the output in three
    model = fr.models.plain20(fused=False)
    parameters, buffers = len(list(model.parameters())), len(list(model.buffers()))
    whole = next(r for r in found["results"] if r["subject"] == "whole plain20")
    assert whole["compared"] == 2 * (parameters + 1) + 3 * (buffers + 1) + 1
    assert "all within their bounds" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_check_notices_a_broken_kernel(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [s for s in subjects.subjects(["resnet20"]) if s.label.startswith("BasicBlock 16-32")][:1]
    monkeypatch.setattr(check_module, "subjects", lambda names: few)
    file = tmp_path / "check.json"
    words = ["check", "--models", "resnet20", "--dtypes", dtype, "--device", "cpu", "--json", str(file)]
    with fr.use_backend("aten"):
        assert main(words) == 0
        for primitive in ("bn_act", "bn_act_backward", "conv_backward", "conv_bias_act"):
            capsys.readouterr()
            with monkeypatch.context() as broken:
                broken.setattr(ATEN, primitive, off_by_one_percent(getattr(ATEN, primitive)))
                assert main(words) == 1, primitive
            found = read(file)
            assert not found["ok"] and found["results"][0]["failed"], primitive
            assert "1 of 1 checks failed" in capsys.readouterr().out, primitive


def test_check_notices_statistics_that_are_not_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = next(iter(subjects.subjects(["plain20"])))
    monkeypatch.setattr("fused_resnet.chain.call._update_running", lambda *args: None)
    result = check_module.check(subject, ["fp32"], CPU, 0)[0]
    assert not result.ok
    assert any("running_mean" in f.name for f in result.findings if not f.ok)


def test_check_does_not_compare_plain_with_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = next(iter(subjects.subjects(["plain20"])))
    monkeypatch.setattr(fr, "fuse", lambda model: model)
    result = check_module.check(subject, ["fp32"], CPU, 0)[0]
    assert not result.ok and "not fused" in result.problem


class SqueezeExcite(nn.Module):
    """Two blocks as other libraries have them, one of which a chain can't close; outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.conv, self.bn, self.gate = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        h = self.bn(self.conv(x))
        h = h * self.gate(h.mean((2, 3), keepdim=True)).sigmoid()
        return {"features": self.drop(F.silu(h + x)), "stem": x}


def test_check_of_a_network_of_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(subjects.LIBRARIES, "json", lambda library, name: SqueezeExcite())
    file = tmp_path / "check.json"
    assert main(["check", "--models", "json/net", "--device", "cpu", "--json", str(file)]) == 0
    results = read(file)["results"]
    assert [r["subject"] for r in results] == ["whole json/net"] * 3 and all(r["compared"] > 20 for r in results)
    monkeypatch.setitem(subjects.LIBRARIES, "json", lambda library, name: getattr(library, name))
    assert main(["check", "--models", "json/net"]) == 2
    monkeypatch.setitem(subjects.LIBRARIES, "json", lambda library, name: nn.Conv2d(3, 4, 1))
    assert main(["check", "--models", "json/net", "--device", "cpu"]) == 1


def test_subjects_cover_all_models() -> None:
    found = list(subjects.subjects(fr.models.list_models()))
    labels = " | ".join(s.label for s in found)
    for part in ("identity", "zero-padded", "no shortcut", "pooled projection", "g32", "d2", "d4", "/2", "stem 7x7 /2"):
        assert part in labels
    assert len({s.label for s in found}) == len(found)
    whole = [s.model for s in found if s.whole]
    assert {"resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "plain18", "resnet20", "plain20"} <= set(
        whole
    )


# ---------------------------------------------------------------------------------------------------- the rule
def test_rule() -> None:
    ref = {"out": torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}

    def judge(factor: float, plain: float, dtype: torch.dtype, length: int = 0) -> bool:
        got, by_plain = {"out": ref["out"] * factor}, {"out": ref["out"] * plain}
        return validate.compare(got, by_plain, ref, dtype, length=length)[0].ok

    assert judge(1 + 3e-6, 1, torch.float32, length=1) and not judge(1 + 1e-4, 1, torch.float32, length=1)
    assert judge(1 + 1e-4, 1, torch.float32, length=1000)  # sqrt(K)
    assert judge(1 + 1e-7, 1, torch.float64) and not judge(1 + 1e-6, 1, torch.float64)
    assert judge(1.019, 1.01, torch.bfloat16) and not judge(1.023, 1.01, torch.bfloat16)
    assert not judge(math.nan, 1, torch.bfloat16) and not judge(math.inf, 1, torch.float32, length=1)
    missing = validate.compare({}, ref, ref, torch.float32)
    assert not missing[0].ok and "missing" in missing[0].name


def test_inputs_hide_nothing() -> None:
    model, generator = fr.models.resnet20(fused=False).double(), torch.Generator().manual_seed(0)
    validate.randomise(model, validate.exact((2, 3, 8, 8), generator, 0.5, 2.0), generator)
    gammas = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert (gammas < 0).any() and (gammas > 0).any() and gammas.abs().min() > 0.1
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    x = validate.exact((4, 3, 8, 8), generator, 0.5, 2.0)
    assert torch.equal(x, x.bfloat16().double()) and 0.2 < x.mean() < 0.8 and 1.7 < x.std() < 2.3


# ---------------------------------------------------------------------------------------------------- measuring
def test_quantiles_and_ratios() -> None:
    found = measure.quantiles([5.0, 1.0, 4.0, 2.0, 3.0])
    assert found == pytest.approx({"median": 3.0, "p20": 1.8, "p80": 4.2})
    assert measure.quantiles([2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0}
    assert measure.ratios([2.0, 3.0], [1.0, 6.0]) == [2.0, 0.5]


def test_rounds_take_turns() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = measure.interleaved(steps, CPU, repeats=(3, 3), budget_s=60, sample_s=0)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize(("step_s", "rounds"), [(1, 10), (9, 2), (15, 2), (25, 1)])
def test_rounds_within_a_budget(monkeypatch: pytest.MonkeyPatch, step_s: float, rounds: int) -> None:
    """Ten seconds, or two rounds if they take no more than twice that."""
    now = 0.0

    def step() -> None:
        nonlocal now
        now += step_s

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    times = measure.interleaved({"a": step}, CPU, repeats=(2, 1000), budget_s=9.5, clock=lambda: now)
    assert times == {"a": [step_s] * rounds}


def test_saved_bytes() -> None:
    linear = nn.Linear(4, 8, bias=False)
    x = torch.randn(2, 4)
    existing = list(linear.parameters())
    # x for the weight's gradient; the weight is not needed for x's, which wants none
    assert measure.saved_bytes(lambda: linear(x), existing) == 2 * 4 * 4
    # and relu's output, 2 x 8 floats
    assert measure.saved_bytes(lambda: F.relu(linear(x)), existing) == 2 * 4 * 4 + 2 * 8 * 4
    # a storage counts once, and whole, however often and through whichever view it is kept
    y = torch.randn(10, requires_grad=True)
    assert measure.saved_bytes(lambda: (y * 1).sin()[:2] + (y[:3] * y[:3]).sum(), []) == 2 * 10 * 4
    assert measure.saved_bytes(lambda: y + 1, []) == 0
    with torch.no_grad():
        assert measure.saved_bytes(lambda: F.relu(linear(x)), existing) == 0


def test_saved_bytes_of_a_fused_block() -> None:
    """x, the two raw convolution outputs, and five vectors of each unit: what the design promises."""
    block = fr.fuse(nn.Sequential(fr.models.BasicBlock(16, 16))).train()
    x = torch.randn(2, 16, 12, 12, requires_grad=True)
    existing = [*block.parameters(), *block.buffers()]
    saved = measure.saved_bytes(lambda: block(x), existing)
    assert 3 * x.numel() * 4 <= saved <= 3 * x.numel() * 4 + 10 * 16 * 4


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read from Linux's /proc")
def test_peak_bytes() -> None:
    peak = measure.peak_bytes(lambda: torch.ones(16 << 20).add(1), CPU)
    if peak is None:
        pytest.skip("this system does not let a process reset its peak")
    assert 120e6 < peak < 180e6


# ---------------------------------------------------------------------------------------------------- data
def test_photographs() -> None:
    x, labels = data.photographs(4, 48, seed=3)
    assert x.shape == (4, 3, 48, 48) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [0, 1, 0, 1]
    low, high = (0 - max(data.MEAN)) / min(data.STD), (1 - min(data.MEAN)) / min(data.STD)
    assert low <= x.min() and x.max() <= high and x.std() > 0.3
    assert torch.equal(x, data.photographs(4, 48, seed=3)[0])
    assert not torch.equal(x, data.photographs(4, 48, seed=4)[0])
    assert not torch.equal(x[0], x[2])


def test_digits_are_learnt() -> None:
    trainings = digits.train_both(2, CPU, seed=0)
    assert [t["variant"] for t in trainings] == ["plain", "fused"]
    assert all(t["accuracy"] > 0.8 and t["losses"][-1] < t["losses"][0] / 3 for t in trainings)
    assert trainings[0]["losses"][0] == pytest.approx(trainings[1]["losses"][0], rel=1e-4)


# ---------------------------------------------------------------------------------------------------- bench
@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.PRESETS, "quick", replace(bench.PRESETS["quick"], epochs=1))


def test_bench_reports(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    folder, file = tmp_path / "report", tmp_path / "bench.json"
    code = main(["bench", *TINY, "--output", str(folder), "--json", str(file)])
    found = read(folder / "results.json")
    assert read(file) == found
    assert {"machine", "versions", "backends", "date", "config", "cases", "digits", "verdicts", "device"} <= set(found)
    assert len(found["cases"]) == 4
    for case in found["cases"]:
        assert case["ok"] and [row["variant"] for row in case["variants"]] == list(variants.VARIANTS)
        for row in case["variants"]:
            assert row["status"] == "measured" and len(row["times_s"]) == row["rounds"] == 2
            assert row["images_per_s"]["p20"] <= row["images_per_s"]["median"] <= row["images_per_s"]["p80"]
            assert set(row["speedup"]) == set(row["ms_per_step"]) == {"median", "p20", "p80"}
            assert 0 < row["error"]["out"] < 1 and row["worst"]["used"] <= 1
            assert ("gradients" in row["error"]) == (case["mode"] == "training")
            assert ("saved_bytes_per_image" in row) == (case["mode"] == "training")
        plain, fused = case["variants"][0], case["variants"][2]
        assert plain["speedup"] == {"median": 1, "p20": 1, "p80": 1}
        if case["mode"] == "training":
            assert fused["saved_bytes_per_image"] < plain["saved_bytes_per_image"]
    # one epoch is too little for 97 %: said, and the exit code tells
    trainings = found["digits"]["trainings"]
    assert code == (0 if all(t["accuracy"] >= 0.97 for t in trainings) else 1) == (0 if found["ok"] else 1)
    for name in ("throughput.png", "saved.png", "digits.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    html = (folder / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 3 and 'src="http' not in html
    assert found["device"] in html and "resnet20 training in bf16" in html
    printed = capsys.readouterr().out
    assert found["device"] in printed and "× plain" in printed


@pytest.mark.parametrize("primitive", ["bn_act", pytest.param("conv_bias_act", marks=pytest.mark.full)])
def test_bench_does_not_time_what_is_wrong(
    primitive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ATEN, primitive, off_by_one_percent(getattr(ATEN, primitive)))
    monkeypatch.setattr(bench, "DTYPES", ("fp32",))
    with fr.use_backend("aten"):
        code = main(["bench", *TINY, "--no-compile", "--no-digits", "--output", str(tmp_path)])
    assert code == 1
    failed = {"bn_act": "training", "conv_bias_act": "inference"}[primitive]
    found = read(tmp_path / "results.json")
    assert not found["ok"] and found["digits"] is None
    for case in found["cases"]:
        plain, compiled, fused = case["variants"]
        assert plain["status"] == "measured" and compiled["status"] == "skipped"
        assert fused["status"] == ("failed" if case["mode"] == failed else "measured")
        assert ("times_s" in fused) == (case["mode"] != failed)
    assert "validation FAILED" in capsys.readouterr().out


def test_a_compiled_network_is_compared() -> None:
    """``torch.compile``'s module has no length, so it is neither true nor false."""
    model, x = fr.models.resnet20(fused=False), torch.randn(2, 3, 8, 8)
    found = [
        validate.run(model, x, None, train=False, forward=forward)["out"]
        for forward in (None, torch.compile(model, backend="eager"))
    ]
    torch.testing.assert_close(*found)


def test_compile_that_fails_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
        def fail(x: Tensor) -> Tensor:
            raise RuntimeError("No working C++ compiler found\nand much more")

        return fail

    monkeypatch.setattr(torch, "compile", compile_)
    subject = cases.Subject("resnet20", cases.Settings(CPU, 2, 32, 0, (1, 1), 0.0))
    case = cases.run_case(subject, "inference", "fp32", variants.CompileBudget(1000))
    rows = case["variants"]
    assert [row["status"] for row in rows] == ["measured", "skipped", "measured"]
    assert "No working C++ compiler found" in rows[1]["note"] and case["ok"]


def test_compile_budget() -> None:
    model = fr.models.resnet20(fused=False)
    budget = variants.CompileBudget(limit_s=1.5 * variants.CompileBudget.prediction(model, True))
    for _ in range(2):  # it takes no time: the next ones won't either
        with budget.compiling(model, True):
            pass
    budget.spent_s = budget.limit_s
    with pytest.raises(variants.Skipped, match="not compiled"), budget.compiling(model, True):
        raise AssertionError
