"""`make race`: every peer gives plain PyTorch's output, and what is missing is listed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT

# The race without OpenVINO, whether it is installed or not.
RACE = """
import runpy, sys
sys.modules["openvino"] = None
sys.path.insert(0, "benchmarks")
sys.argv[0] = "benchmarks/race.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_race(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="a peer")
    options = ["--networks", "resnet20", "--batches", "1", "--size", "32", "--seconds", "0.2", "--callers"]
    peers = ["--peers", "eager", "onnxruntime", "openvino"]
    command = [sys.executable, "-c", RACE, *options, *peers, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads((tmp_path / "race.json").read_text())
    assert [row["dtype"] for row in found["cases"]] == ["fp32", "bf16"]
    for row in found["cases"]:
        ran = {"eager", "fused_resnet"} | ({"onnxruntime"} if row["dtype"] == "fp32" else set())
        assert row["peers"].keys() == ran and row["missing"]["openvino"] == "not installed: openvino"
        for peer in row["peers"].values():
            assert peer["images_per_s"]["median"] > 0 and peer["error"] < 0.05
            assert peer["latency_ms"].keys() == {"1", "2", "4"}
        times = {name: peer["ms_per_step"]["median"] for name, peer in row["peers"].items() if name != "fused_resnet"}
        assert row["best_peer"] == min(times, key=times.__getitem__)
    assert done.returncode == any(row["ratio"]["median"] < 1 for row in found["cases"])
    text = (tmp_path / "race.md").read_text()
    assert "- onnxruntime: NotImplementedError: its CPU provider has no torch.bfloat16" in text
    assert (tmp_path / "race.png").stat().st_size > 10_000
