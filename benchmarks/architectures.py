"""What fuse makes of networks that people have: chains, blocks left and why, per architecture.

    python benchmarks/architectures.py            # rewrites benchmarks/results/architectures.md
    python benchmarks/architectures.py --check    # compares what it says of the libraries installed in its versions

The networks are built on the meta device. One call of each is captured, which computes nothing there. Writing needs all
of the libraries: torchvision, timm, transformers, segmentation_models_pytorch, ultralytics, monai.
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
from small_networks import ecg_resnet, iresnet50
from sweep import pairs_of
from torch import nn

import fused_resnet as fr
from fused_resnet.explanation import units_of
from fused_resnet.fusion.patterns import looks_like_norm

# In the table's column of libraries: the networks of small_networks.py.
OURS = "–"
RESULTS = Path(__file__).parent / "results" / "architectures.md"


def _torchvision(name: str, **kwargs: Any) -> nn.Module:
    from torchvision import models

    family = models.segmentation if name.startswith(("deeplab", "fcn")) else models
    if name.startswith("deeplab") or name.startswith("fcn"):
        kwargs |= {"weights_backbone": None}
    return getattr(family, name)(weights=None, **kwargs)


def _video(name: str) -> nn.Module:
    from torchvision.models import video

    return getattr(video, name)(weights=None)


def _detection(name: str) -> nn.Module:
    """The backbone, with the frozen norms that it has around pretrained weights. The rest of a detector depends on
    data, and has no norms."""
    from torchvision.models import detection
    from torchvision.ops import FrozenBatchNorm2d

    backbone = getattr(detection, name)(weights=None, weights_backbone=None).backbone
    for m in list(backbone.modules()):
        for child, norm in m.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                setattr(m, child, FrozenBatchNorm2d(norm.num_features))
    return backbone


def _timm(name: str, **kwargs: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **kwargs)


def _transformers(name: str, **kwargs: Any) -> nn.Module:
    import transformers

    kind = "RegNet" if name.startswith("RegNet") else "ResNet"
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**kwargs))


def _detr() -> nn.Module:
    import transformers

    stages = transformers.ResNetConfig(out_features=["stage4"])
    config = transformers.DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=stages)
    return transformers.DetrModel(config).backbone.model


def _rt_detr() -> nn.Module:
    import transformers

    return transformers.RTDetrResNetBackbone(transformers.RTDetrResNetConfig())


def _smp(name: str) -> nn.Module:
    import segmentation_models_pytorch

    return getattr(segmentation_models_pytorch, name)(encoder_name="resnet34", encoder_weights=None)


def _yolo(name: str) -> nn.Module:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(f"{name}.yaml", verbose=False)


def _monai(name: str) -> nn.Module:
    from monai.networks import nets

    return getattr(nets, name)(spatial_dims=3, n_input_channels=1)


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
        **{
            f"{name}, backbone": lambda name=name: _detection(name)
            for name in ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn")
        },
        **{name: lambda name=name: _video(name) for name in ("r3d_18", "mc3_18", "r2plus1d_18")},
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
        "DetrModel, backbone": _detr,
        "RTDetrResNetBackbone": _rt_detr,
    },
    "segmentation_models_pytorch": {
        f"{name}, resnet34": lambda name=name: _smp(name) for name in ("Unet", "DeepLabV3Plus")
    },
    "ultralytics": {name: lambda name=name: _yolo(name) for name in ("yolov8n", "yolo11n")},
    "monai": {"resnet50, 3-D": lambda: _monai("resnet50")},
    OURS: {"IResNet-50 (faces)": iresnet50, "ResNet of 12-lead ECGs, 1-D": ecg_resnet},
}  # fmt: skip
# The inputs of those that take no images of 64x64.
SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("r3d_18", "mc3_18", "r2plus1d_18"), (2, 3, 8, 64, 64)),
    "resnet50, 3-D": (2, 1, 32, 32, 32),
    "IResNet-50 (faces)": (2, 3, 112, 112),
    "ResNet of 12-lead ECGs, 1-D": (2, 12, 1000),
}


def row(model: nn.Module, pairs: set[str]) -> tuple[int, int, int, int, str, str]:
    """Of a fused model that ran: modules with chains, modules left, chains, norms that are in no chain, the share of
    the pairs of a convolution and a norm that are in chains, and why others are not."""
    rows = fr.explain(model).rows
    units = units_of(model)
    norms = {name for name, m in model.named_modules() if looks_like_norm(m)}
    left = Counter(_kind(reason) for r in rows if r.reason for reason in r.reason.split("; "))
    told = ", ".join(f"{reason} ({n}×)" if n > 1 else reason for reason, n in left.items())
    fused = sum(r.fused for r in rows)
    together = len(pairs & {unit.norm[0] for unit in units if unit.conv is not None})
    share = f"{100 * together / max(1, len(pairs)):.0f} % of {len(pairs)}"
    chains, apart = sum(r.chains for r in rows if r.fused), len(norms - {unit.norm[0] for unit in units})
    return fused, len(rows) - fused, chains, apart, share, told


def _kind(reason: str) -> str:
    """A reason without the numbers by which names differ from block to block."""
    return re.sub(r"(?<=[a-z_])\d+\b", "", reason)


def written_with(library: str) -> str:
    """A library with the version installed, as the table names it. Raises PackageNotFoundError."""
    return "" if library == OURS else f"{library} {importlib.metadata.version(library)}"


def lines() -> Iterator[str]:
    """The table, line by line."""
    yield "# What `fuse` makes of networks of other libraries"
    yield ""
    yield "Written by `python benchmarks/architectures.py` with"
    yield ", ".join(filter(None, map(written_with, ARCHITECTURES))) + "."
    yield "A training forward of two images of 64x64 was captured, or of two volumes, signals or faces of their sizes."
    yield "*Modules*: those to which chains belong; *left*: those with norms of their own that have none; *norms left*:"
    yield "norms of the whole model that are in no chain; *pairs in chains*: the share of the convolutions with a norm"
    yield "behind them that are in a chain together with it. What is in no chain runs as it was."
    yield ""
    yield "| library | architecture | modules | left | chains | norms left | pairs in chains | why |"
    yield "|---|---|---|---|---|---|---|---|"
    for library, architectures in ARCHITECTURES.items():
        for name in architectures:
            yield line(library, name)


def line(library: str, name: str) -> str:
    """One architecture's."""
    try:
        with torch.device("meta"):
            model = ARCHITECTURES[library][name]()
    except RuntimeError:  # RegNet computes its widths with tensors, YOLO its strides
        model = ARCHITECTURES[library][name]()
    x = torch.zeros(SHAPES.get(name, (2, 3, 64, 64)), device=next(model.parameters()).device)
    pairs = pairs_of(model, lambda m: m(x))
    fused = fr.fuse(model.train())
    torch.manual_seed(0)
    with torch.no_grad(), fr.use_backend("aten"):  # which takes all, and measures nothing
        fused(x)
    torch._dynamo.reset()
    return f"| {library} | {name} | " + " | ".join(map(str, row(fused, pairs))) + " |"


def differs() -> list[str]:
    """The lines of the installed libraries that the table lacks, of those in the table's versions."""
    table, found = RESULTS.read_text(), []
    for library, architectures in ARCHITECTURES.items():
        try:
            same = written_with(library) in table
        except importlib.metadata.PackageNotFoundError:
            continue
        found += [text for name in architectures if same and (text := line(library, name)) not in table.splitlines()]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="writes nothing; exit code 1 if the table would change")
    if parser.parse_args().check:
        print(*(found := differs()), sep="\n")
        return int(bool(found))
    RESULTS.write_text("\n".join(lines()) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
