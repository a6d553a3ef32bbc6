"""``from torchvision_shim import torchvision``: torchvision's models without torchvision's compiled operators.

Where its compiled extension is absent, or was built for another version of torch, ``import torchvision`` fails when it
registers shape functions for two operators of the extension. Classifiers need neither; detectors need ``nms``, which is
written in Python here.
Skips, as ``pytest.importorskip`` does, where torchvision is not installed.
"""

import importlib.util
import pathlib

import pytest
import torch

library: torch.library.Library | None = None  # the definitions live as long as this object


def has_operators(folder: pathlib.Path) -> bool:
    """Whether the extension in torchvision's folder loads into this torch."""
    for path in folder.glob("_C.*"):
        try:
            torch.ops.load_library(path)
        except OSError:
            continue
    return hasattr(torch.ops.torchvision, "nms")


def nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """The boxes, the best first, that overlap none of those before by more than the threshold."""
    overlaps = torchvision.ops.box_iou(dets, dets) > iou_threshold
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if not overlaps[i, kept].any():
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64)


spec = importlib.util.find_spec("torchvision")
if spec and spec.origin and not has_operators(pathlib.Path(spec.origin).parent):
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor x) -> Tensor")
    library.impl("nms", nms, "CPU")

torchvision = pytest.importorskip("torchvision")
if library is not None:
    torchvision.ops.boxes._assert_has_ops = lambda: None
