"""benchmarks/sweep.py: networks of other libraries beside themselves, and what its summary says of them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torchvision_shim  # noqa: F401
from source_tree import ROOT
from torch import nn

import fused_resnet as fr

sys.path.insert(0, str(ROOT / "benchmarks"))
import sweep  # noqa: E402

pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "timm/test_resnet"


def result_of(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "date": "2020-01-01", "versions": {"torch": "2"}, "libraries": {"timm": "1"}, "most_parameters": 1e6,
        "networks": list(rows),
    }  # fmt: skip


def test_a_network() -> None:
    row = sweep.tried(NAME, 1e6)
    assert row["ok"] and row["chains"] > 4 and row["tensors"] > 100
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in sweep.build(NAME).modules())
    assert row["pairs"] == row["pairs_in_chains"] == norms
    assert 0 < row["error"] < sweep.EXACT and 0 < row["frozen_error"] < sweep.EXACT32
    text = sweep.summary(result_of(row, row))
    assert (
        "\n2 networks" in text
        and f"2 of them run chains, {2 * row['chains']} in all" in text
        and f"{2 * norms} of {2 * norms} are in chains (100.0 %)" in text
        and "Not so: none" in text
    )


def test_counting() -> None:
    row, whole = sweep.tried(NAME, row=sweep.counted), sweep.tried(NAME)
    assert {**row, "left": []} == {k: whole[k] for k in ("name", "chains", "pairs", "pairs_in_chains")} | {"left": []}
    lacking = row | {"name": "timm/lacking", "pairs": 2 * row["pairs"], "left": ["no reason"]}
    text = sweep.coverage(result_of(row, lacking, {"name": "timm/bad", "failed": "Error: text"}))
    assert f"{2 * row['pairs']} pairs are in chains (66.7 %)" in text and "1 networks have all" in text
    assert (
        "timm/bad: Error: text" in text
        and f"| timm/lacking | {2 * row['pairs']} | {row['pairs']} | no reason |" in text
    )


def test_pairs() -> None:
    """A norm behind another norm, or behind what was done to a convolution's output, is no part of a pair."""
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    model = nn.Sequential(conv, nn.BatchNorm2d(3), norm, nn.Conv2d(3, 3, 1), nn.GELU(), nn.BatchNorm2d(3))
    assert sweep.pairs_of(model, lambda m: m(torch.ones(2, 3, 4, 4))) == {"1"}
    fused = fr.fuse(model)
    assert sweep.chains_of(fused, torch.ones(2, 3, 4, 4))[1] == {"1"}


@pytest.mark.parametrize("what", ["weights", "buffers", "frozen", "an error"])
def test_what_is_wrong_is_told(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse, frozen = fr.fuse, sweep.validate.frozen

    def wrong(model: nn.Module) -> nn.Module:
        tensors = dict(model.named_parameters()) if what == "weights" else dict(model.named_buffers())
        name = "network.layer1.0.bn1." + ("weight" if what == "weights" else "running_var")
        tensors[name].data.mul_(1 + 1e-6)
        return fuse(model)

    def refuses(*args: Any, **kwargs: Any) -> nn.Module:
        raise RuntimeError("not today")

    if what in ("weights", "buffers"):
        monkeypatch.setattr(fr, "fuse", wrong)
    elif what == "frozen":
        off = lambda model, x, dtype: lambda image: frozen(model, x, dtype)(image) * (1 + 1e-3)  # noqa: E731
        monkeypatch.setattr(sweep.validate, "frozen", off)
    else:
        monkeypatch.setattr(sweep.validate, "frozen", refuses)
    row = sweep.tried(NAME)
    assert not row["ok"] and ("not today" in row["failed"] if what == "an error" else "failed" not in row)
    assert f"Not so: 1.\n  - {NAME}: " in sweep.summary(result_of(row))


def test_networks_that_are_left_out() -> None:
    rows = [sweep.tried("timm/test_vit"), sweep.tried(NAME, 1000), sweep.tried("timm/halonet26t", 1.0)]
    assert [row["left_out"] for row in rows] == [
        "no BatchNorm2d",
        *["more than 1000 parameters"],
        "more than 1 parameters",
    ]
    assert "Left out: 1 (no BatchNorm2d), 1 (more than 1000 parameters)" in sweep.summary(result_of(*rows))


def test_names() -> None:
    assert NAME in sweep.names("timm") and "torchvision/resnet50" in sweep.names("torchvision")
