"""`make gpu-report` is ready before a GPU is: its dry run walks every step here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT

from fused_resnet import planner


def report(*args: str) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "benchmarks/gpu_report.py", *args],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


@pytest.mark.full
@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    """Every step ends well; every primitive of a training step is there with its choice and roofline."""
    pytest.importorskip("triton", reason="the account of bytes needs Triton")
    done = report("--dry-run", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert {
        "limits",
        "tests",
        "sanitizer",
        "passes",
        "kernels",
        "networks",
        "versions",
        "machine",
        "date",
    } <= found.keys()
    rows = found["kernels"]["rows"]
    kinds = {row["primitive"] for row in rows}
    assert {"conv_stats", "conv_backward", "bn_act", "bn_act_backward"} <= kinds
    for row in rows:
        assert row["ms"]["aten"] > 0 and row["roofline_ms"] > 0 and row["bytes"] > 0
        assert (row["flops"] > 0) == row["primitive"].startswith("conv")
    passes = found["passes"]["rows"]
    assert {row["primitive"] for row in passes} > {"bn_stats", "bn_act", "bn_act_backward", "bn_backward"}
    assert {row["backend"] for row in passes} >= {"aten"} and all(row["of_copy"] > 0 for row in passes)
    variants = {(c["mode"], v["variant"], v["status"]) for c in found["networks"]["cases"] for v in c["variants"]}
    for mode in ("training", "inference"):
        assert {(mode, "plain", "measured"), (mode, "fused", "measured")} <= variants
    text = (tmp_path / "report.md").read_text()
    assert "| bn_act_max_pool_backward | 3 | 2x64x16x16 | aten |" in text
    assert "| resnet20 | training | fused |" in text and "conv_backward" in text
    assert "| convolution, ms | apart | aten | cpu |" in text
    assert (tmp_path / "kernels.png").stat().st_size > 10_000


def test_every_backend_has_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUTLASS's tiles are configurations of the cuda backend, and stand beside its other convolutions."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_report_page

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
    assert gpu_report_page.convolutions(rows)[1:] == [
        "| convolution, ms | aten | cuda | cutlass | triton |",
        "|---|---|---|---|---|",
        "| s | 3.0000 | 2.0000 | 1.2500 | 1.0000 |",
    ]
    parts = {"apart: cuda ('cutlass dgrad', 128, 64) + aten": 2.0, "input: cuda ('cutlass dgrad', 128, 64)": 1.0}
    assert gpu_report_page.by_backend(parts) == {"apart": 2.0, "input: cutlass": 1.0}
    assert gpu_report_page.convolutions([]) == []


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = report("--output", str(tmp_path))
    assert done.returncode == 2 and "no GPU" in done.stderr and "--dry-run" in done.stderr


def test_an_unknown_step(tmp_path: Path) -> None:
    done = report("--dry-run", "--steps", "kernels,speed", "--output", str(tmp_path))
    assert done.returncode == 2 and "expected some of limits, tests" in done.stderr and "got speed" in done.stderr
