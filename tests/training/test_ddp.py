"""Under torchrun: ``fused-resnet bench --distributed``, with two gloo processes on a CPU."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch

from fused_resnet.cli import main

if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

TINY = ["--models", "resnet20", "--size", "32", "--batch-size", "2"]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def torchrun(*words: str, folder: Path, device: str = "cpu", limit_s: float = 240) -> tuple[int, str, str]:
    """Two processes; exit code, standard output and error. Those that hang are ended."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: NCCL takes one per process")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *words]
    environment = processes.environment(**{"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    out, err = folder / "out.txt", folder / "err.txt"
    with out.open("w") as to, err.open("w") as complaints:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=to, stderr=complaints, text=True)
        if not processes.ended([child], limit_s):
            child.terminate()  # torchrun passes it on; killed, it would leave them behind
            child.wait(60)
            raise AssertionError(f"not ended after {limit_s} s: {err.read_text()[-3000:]}")
    return child.returncode, out.read_text(), err.read_text()


# ---------------------------------------------------------------------------------------------------- bench
@pytest.mark.full
@pytest.mark.slow
@DEVICES
def test_bench_reports_scaling(device: str, tmp_path: Path) -> None:
    words = ["-m", "fused_resnet", "bench", "--distributed", *TINY, "--repeats", "3", "--json", "found.json"]
    code, out, err = torchrun(*words, folder=tmp_path, device=device)
    assert code == 0, err[-3000:]
    assert out.count("+ resnet20 in fp32, SyncBN on all processes:") == 1  # one process prints
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ok"] and found["config"]["processes"] == 2 and found["config"]["device"].startswith(device)
    assert found["config"]["transport"] == {"cpu": "gloo", "cuda": "nccl"}[device]
    assert [case["dtype"] for case in found["cases"]] == ["fp32", "bf16"]
    for case in found["cases"]:
        assert float(case["worst"]["used"]) <= 1
        rows = {(row["variant"], row["processes"]): row for row in case["variants"]}
        variants = ("plain", "fused", "plain, SyncBN", "fused, SyncBN")
        assert set(rows) == {(variant, n) for variant in variants for n in (1, 2)}
        for (variant, n), row in rows.items():
            if variant == "plain, SyncBN" and device == "cpu":
                assert row["status"] == "skipped" and "CPU" in row["note"]
                continue
            times, alone = row["times_s"], rows[variant, 1]["times_s"]
            assert len(times) == 3 and min(times) > 0
            median = statistics.median(times)
            assert row["images_per_s"]["median"] == pytest.approx(2 * n / median)
            assert row["efficiency"] == pytest.approx(statistics.median(alone) / median)
            ratios = [p / t for p, t in zip(rows["plain", n]["times_s"], times, strict=True)]
            assert row["speedup"]["median"] == pytest.approx(statistics.median(ratios))


@pytest.mark.full
@pytest.mark.slow
def test_bench_notices_statistics_that_are_not_shared(tmp_path: Path) -> None:
    """The command fails, in words, when the backward of each process sees its own sums alone."""
    (tmp_path / "broken.py").write_text(
        "import sys\nfrom fused_resnet.chain import sync\nfrom fused_resnet.cli import main\n"
        "sync.all_reduce = lambda t, group: 2 * t\n"
        f"sys.exit(main({['bench', '--distributed', *TINY, '--repeats', '1']!r}))\n"
    )
    code, out, err = torchrun("broken.py", folder=tmp_path)
    assert code != 0
    assert out.count("- resnet20 in fp32, SyncBN on all processes: d ") == 1, err[-3000:]


def test_bench_wants_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["bench", "--distributed", *TINY]) == 2
    error = capsys.readouterr().err
    assert "expected to be started by torchrun" in error and "RANK" in error and "--nproc-per-node" in error
