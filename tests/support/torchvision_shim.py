"""``from torchvision_shim import torchvision``: torchvision's models without torchvision's compiled operators.

Where its compiled extension is absent, or was built for another version of torch, ``import torchvision`` fails when it
registers shape functions for two operators of the extension. The models need neither, so empty definitions stand in.
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


spec = importlib.util.find_spec("torchvision")
if spec and spec.origin and not has_operators(pathlib.Path(spec.origin).parent):
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor x) -> Tensor")
    library.define("qnms(Tensor x) -> Tensor")

torchvision = pytest.importorskip("torchvision")
