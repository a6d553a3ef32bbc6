"""A sample of benchmarks/grid.py: fused and frozen networks are not slower than plain PyTorch."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from source_tree import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import grid

pytestmark = pytest.mark.usefixtures("one_thread")
# The bound is loose, and a cell may try again, because other tests run beside this one.
BOUND, ATTEMPTS = 0.9, 3


@pytest.fixture(autouse=True)
def chains_at_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measuring, with a plan of its own."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "plans"))
    monkeypatch.delenv("FUSED_RESNET_PLAN", raising=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "network, cells",
    {
        "resnet20": [("training", "fp32", 32, 8), ("frozen", "fp32", 32, 1), ("frozen", "bf16", 32, 1)],
        "resnet18": [("training", "bf16", 32, 2), ("evaluation", "fp32", 64, 1), ("frozen", "fp32", 128, 1)],
        "mobilenet_v2": [("evaluation", "fp32", 64, 1), ("frozen", "fp32", 64, 1)],
    }.items(),
)
def test_not_slower(network: str, cells: list[tuple[str, str, int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "BUDGET_S", 0.5)
    pair = grid.Pair(network)
    for cell in cells:
        for attempt in range(ATTEMPTS):
            row = grid.measured(pair, grid.Cell(network, *cell), time.thread_time)
            if row["ratio"]["median"] >= BOUND:
                break
            assert attempt + 1 < ATTEMPTS, row
