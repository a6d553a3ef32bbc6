"""What fuse makes of networks that people have: chains, blocks left and why, per architecture.

    python benchmarks/architectures.py            # rewrites benchmarks/results/architectures.md
    python benchmarks/architectures.py --check    # compares it

The networks are built on the meta device, of libraries that have to be installed: torchvision, timm, transformers. One
call of each is captured, which computes nothing there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.explanation import units_of
from fused_resnet.fusion.patterns import looks_like_norm

RESULTS = Path(__file__).parent / "results" / "architectures.md"


def _torchvision(name: str, **kwargs: Any) -> nn.Module:
    from torchvision import models

    family = models.segmentation if name.startswith(("deeplab", "fcn")) else models
    if name.startswith("deeplab") or name.startswith("fcn"):
        kwargs |= {"weights_backbone": None}
    return getattr(family, name)(weights=None, **kwargs)


def _fpn(name: str) -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name=name, weights=None)  # with FrozenBatchNorm2d


def _timm(name: str, **kwargs: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **kwargs)


def _transformers(name: str, **kwargs: Any) -> nn.Module:
    import transformers

    kind = "RegNet" if name.startswith("RegNet") else "ResNet"
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**kwargs))


_BASIC = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
# library -> what it is called there -> how it is built
ARCHITECTURES: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "torchvision": {
        **{
            name: lambda name=name: _torchvision(name)
            for name in (
                "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "deeplabv3_resnet50", "fcn_resnet50",
                "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "densenet121",
                "shufflenet_v2_x0_5", "mnasnet0_5", "vgg16_bn",
            )
        },
        "resnet50 FPN (detection)": lambda: _fpn("resnet50"),
    },
    "timm": {
        **{
            name: lambda name=name: _timm(name)
            for name in (
                "resnet18", "resnet50", "resnet50d", "resnext50_32x4d", "wide_resnet50_2", "seresnet50", "ecaresnet50t",
                "resnetblur50", "resnetaa50d", "resnetv2_50", "regnety_004", "densenet121", "dla34", "cspresnet50",
            )
        },
        "resnet50, drop_path": lambda: _timm("resnet50", drop_path_rate=0.1),
        "resnet50, drop_block": lambda: _timm("resnet50", drop_block_rate=0.1),
        "resnet50, act_layer=silu": lambda: _timm("resnet50", act_layer="silu"),
        "resnet50, act_layer=gelu": lambda: _timm("resnet50", act_layer="gelu"),
        "resnet50d, output_stride=8": lambda: _timm("resnet50d", output_stride=8),
        "resnet26d, features_only": lambda: _timm("resnet26d", features_only=True),
    },
    "transformers": {
        "ResNetForImageClassification": lambda: _transformers("ResNetForImageClassification"),
        "ResNetForImageClassification, basic": lambda: _transformers("ResNetForImageClassification", **_BASIC),
        "ResNetBackbone": lambda: _transformers("ResNetBackbone", out_features=["stage2", "stage4"]),
        "RegNetForImageClassification": lambda: _transformers("RegNetForImageClassification"),
    },
}  # fmt: skip


def row(model: nn.Module) -> tuple[int, int, int, int, str]:
    """Of a fused model that ran: modules with chains, modules left, chains, norms that are in no chain, and why."""
    rows = fr.explain(model).rows
    taken = {unit.norm[0] for unit in units_of(model)}
    norms = {name for name, m in model.named_modules() if looks_like_norm(m)}
    left = Counter(_kind(reason) for r in rows if r.reason for reason in r.reason.split("; "))
    told = ", ".join(f"{reason} ({n}×)" if n > 1 else reason for reason, n in left.items())
    fused = sum(r.fused for r in rows)
    return fused, len(rows) - fused, sum(r.chains for r in rows if r.fused), len(norms - taken), told


def _kind(reason: str) -> str:
    """A reason without the numbers by which names differ from block to block."""
    return re.sub(r"(?<=[a-z_])\d+\b", "", reason)


def written_with() -> str:
    """The table's line about the versions installed."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ARCHITECTURES)
    return f"Written by `python benchmarks/architectures.py` with {versions}."


def lines() -> Iterator[str]:
    """The table, line by line."""
    yield "# What `fuse` makes of networks of other libraries"
    yield ""
    yield written_with()
    yield "A training forward of two images of 64x64 was captured. *Modules*: those to which chains belong; *left*:"
    yield "those with norms of their own that have none; *norms left*: norms of the whole model that are in no chain."
    yield "What is in no chain runs as it was."
    yield ""
    yield "| library | architecture | modules | left | chains | norms left | why |"
    yield "|---|---|---|---|---|---|---|"
    for library, architectures in ARCHITECTURES.items():
        for name, build in architectures.items():
            yield line(library, name, build)


def line(library: str, name: str, build: Callable[[], nn.Module]) -> str:
    """One architecture's."""
    try:
        with torch.device("meta"):
            model = build()
    except NotImplementedError:  # RegNet computes its widths with tensors
        model = build()
    fused = fr.fuse(model)
    torch.manual_seed(0)
    with torch.no_grad(), fr.use_backend("aten"):  # which takes all, and measures nothing
        fused(torch.zeros(2, 3, 64, 64, device=next(model.parameters()).device))
    torch._dynamo.reset()
    return f"| {library} | {name} | " + " | ".join(map(str, row(fused))) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="writes nothing; exit code 1 if the table would change")
    text = "\n".join(lines()) + "\n"
    if parser.parse_args().check:
        return int(RESULTS.read_text() != text)
    RESULTS.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
