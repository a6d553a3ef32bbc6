"""A sample of benchmarks/grid.py: fused and frozen networks are not slower than plain PyTorch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import ROOT

from fused_resnet import planner
from fused_resnet.frozen import forward as frozen_forward
from fused_resnet.planner import sizes

sys.path.insert(0, str(ROOT / "benchmarks"))
import grid

pytestmark = pytest.mark.usefixtures("one_thread")
# The bound is loose, and a cell may try again, because other tests run beside this one. Each try makes its own choices:
# those of a disturbed measurement stay for the whole process.
BOUND, ATTEMPTS = 0.9, 3


def forget(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been measured yet."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(cache))
    planner.forget()
    sizes.forget()
    frozen_forward._served.clear()


@pytest.fixture(autouse=True)
def chains_at_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Measuring, with a plan of its own."""
    monkeypatch.setattr(grid, "BUDGET_S", 0.5)
    monkeypatch.delenv("FUSED_RESNET_PLAN", raising=False)
    forget(tmp_path / "0", monkeypatch)
    yield
    monkeypatch.undo()
    planner.forget()
    sizes.forget()
    frozen_forward._served.clear()


@pytest.mark.slow
@pytest.mark.skipif("FUSED_RESNET_CPU_COMPUTE" in os.environ, reason="the dtype of 16-bit products is asked for")
@pytest.mark.parametrize(
    "network, cells",
    {
        "resnet20": [("training", "fp32", 32, 8), ("frozen", "fp32", 32, 1), ("frozen", "bf16", 32, 1)],
        "resnet18": [("training", "bf16", 32, 2), ("evaluation", "fp32", 64, 1), ("frozen", "fp32", 128, 1)],
        "mobilenet_v2": [("evaluation", "fp32", 64, 1), ("frozen", "fp32", 64, 1)],
    }.items(),
)
def test_not_slower(
    network: str, cells: list[tuple[str, str, int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = grid.Pair(network)
    for cell in cells:
        for attempt in range(ATTEMPTS):
            row = grid.measured(pair, grid.Cell(network, *cell), time.thread_time)
            if row["ratio"]["median"] >= BOUND:
                break
            assert attempt + 1 < ATTEMPTS, row
            forget(tmp_path / str(attempt + 1), monkeypatch)
            pair = grid.Pair(network)
