"""benchmarks/first_light.py before a GPU is there: its dry run, time limits, and what a stage that hangs leaves."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from source_tree import ROOT

# Packages of requirements-dev.txt that a machine with a GPU may lack. What a dry run interprets needs NumPy.
BARE = """
import sys
for name in "rich sklearn scipy PIL matplotlib torchvision timm transformers pytest hypothesis".split():
    sys.modules[name] = None
"""


@pytest.fixture(autouse=True, scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that are started import torch, Triton and the standard library alone."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(BARE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


def first_light(*args: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "benchmarks/first_light.py", *args],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


def running_in(group: int) -> bool:
    """Whether a process of the group runs. A killed one stays as a zombie until its parent or init waits for it."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, _, of, *_ = path.read_text().rpartition(")")[2].split()
            if int(of) == group and state not in "ZX":
                return True
    return False


def ends(group: int, within_s: float = 10) -> bool:
    """Whether all processes of the group have ended, at once or a moment later."""
    end = time.perf_counter() + within_s
    while running_in(group) and time.perf_counter() < end:
        time.sleep(0.05)
    return not running_in(group)


def found_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.full
@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    """Every stage ends well but the one that hangs; every primitive of a training step has its roofline."""
    pytest.importorskip("triton", reason="the account of bytes needs Triton")
    done = first_light("--dry-run", "--output", str(tmp_path), timeout_s=1200)
    found = found_in(tmp_path)
    ended = {name: part["status"] for name, part in found.items()}
    assert ended.pop("hang") == "killed after 5 s"
    assert all(s == "ok" or s.startswith("skipped: compute-sanitizer") for s in ended.values()), done.stdout
    assert done.returncode == 1
    assert found["compile"]["compiled"] == 1
    assert len(found["numbers_cuda"]["primitives"]) > 50 and found["numbers_cuda"]["training"]["status"] == "measured"
    for mode in ("training", "inference"):
        for stage, way in (("headline", "plain"), ("headline", "fused, cpu"), ("planned", "fused, planned")):
            assert found[stage][f"{mode}: {way}"]["images_per_s"]["median"] > 0
    rows = found["kernels"]["rows"]
    assert {"conv_stats", "conv_backward", "bn_act", "bn_act_backward"} <= {row["primitive"] for row in rows}
    for row in rows:
        assert row["ms"]["aten"] > 0 and row["roofline_ms"] > 0 and row["bytes"] > 0
        assert (row["flops"] > 0) == row["primitive"].startswith("conv")
    page = (tmp_path / "results.md").read_text()
    assert "| training: fused, cpu |" in page and "| convolution, ms | apart | aten | cpu |" in page


def test_stages_need_torch_and_triton_alone() -> None:
    """Nothing can be installed on a machine that is lent for minutes. The kernels' tests, a stage that has to be asked
    for, need pytest."""
    pytest.importorskip("triton")
    modules = "first_light_stages, first_light_calls, first_light_page, codegen, conv_train_cases"
    found = "from fused_resnet.cli import env; env.describe()"
    code = f"import sys; sys.path.append('benchmarks'); import {modules}; {found}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_stage_that_hangs_costs_no_other_its_time(tmp_path: Path) -> None:
    """It is killed at its limit with the processes that it started, and what it had found stays."""
    start = time.perf_counter()
    done = first_light("--dry-run", "--stages", "machine,hang", "--output", str(tmp_path))
    assert time.perf_counter() - start < 200
    assert done.returncode == 1
    found = found_in(tmp_path)
    assert found["hang"]["status"] == "killed after 5 s" and found["hang"]["found"] == "before it hung"
    assert ends(found["hang"]["group"])
    assert found["machine"]["status"] == "ok" and found["machine"]["int8_per_s"] > 0
    assert "| hang | killed after 5 s |" in (tmp_path / "results.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        ".lock", "log.txt", "results.json", "results.md",
    ]  # fmt: skip

    again = first_light("--dry-run", "--stages", "hang", "--seconds", "0", "--output", str(tmp_path))
    assert again.returncode == 1
    assert found_in(tmp_path)["hang"]["status"] == "skipped: no time is left"
    assert found_in(tmp_path)["machine"] == found["machine"], "the other stages' results are kept"


def test_it_kills_its_stages_when_it_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/first_light.py", "--stages", "hang", "--output", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT)
    while not (tmp_path / "results.json").exists() or "found" not in found_in(tmp_path).get("hang", {}):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 143
    assert ends(found_in(tmp_path)["hang"]["group"])


def test_every_backend_has_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUTLASS's tiles are configurations of the cuda backend, and stand beside its other convolutions."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import first_light_page

    from fused_resnet import planner

    tile = planner.label(planner.Choice("cuda", ("cutlass fprop", 128, 64)))
    ms = {
        "cuda": 2.0,
        tile: 1.5,
        tile.replace("64", "128"): 1.25,
        "triton": 1.75,
        "triton ('fprop', 1)": 1.0,
        "aten": 3.0,
    }
    rows = [{"primitive": "conv_bias_act", "signature": "s", "ms": ms}, {"primitive": "bn_act", "ms": ms}]
    assert first_light_page.convolutions(rows)[1:] == [
        "| convolution, ms | aten | cuda | cutlass | triton |",
        "|---|---|---|---|---|",
        "| s | 3.0000 | 2.0000 | 1.2500 | 1.0000 |",
    ]
    parts = {"apart: cuda ('cutlass dgrad', 128, 64) + aten": 2.0, "input: cuda ('cutlass dgrad', 128, 64)": 1.0}
    assert first_light_page.by_backend(parts) == {"apart": 2.0, "input: cutlass": 1.0}
    assert first_light_page.convolutions([]) == []


def test_kernels_are_compiled_where_others_are_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter has no kernels that could be compiled."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    import first_light as light

    given = {stage.name: light.environment(stage, tmp_path) for stage in light.STAGES}
    assert "TRITON_INTERPRET" not in given["compile"]
    assert given["numbers_triton"]["TRITON_INTERPRET"] == "1"
    assert [name for name, env in given.items() if "PYTORCH_NO_CUDA_MEMORY_CACHING" in env] == [
        "memcheck_cuda", "memcheck_triton", "racecheck_cuda", "racecheck_triton",
    ]  # fmt: skip


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import first_light as light
    import first_light_stages
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU.*--dry-run"):
        first_light_stages.Run(light.Results(tmp_path), "machine", False, 256)


def test_an_unknown_stage(tmp_path: Path) -> None:
    done = first_light("--dry-run", "--stages", "kernels,speed", "--output", str(tmp_path))
    assert done.returncode == 2 and "expected some of machine, compile" in done.stderr and "got speed" in done.stderr


def test_the_stages_fit_into_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of a group run side by side; each has a function, hang in first_light.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import first_light as light
    import first_light_stages

    limits = {s.group or s.name: s.limit_s for s in light.STAGES if s.default}
    assert sum(limits.values()) <= 570
    assert all(hasattr(first_light_stages, s.function) for s in light.STAGES if s.function != "hang")
