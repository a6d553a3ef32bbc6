"""Networks of torchvision, timm and transformers, small: fused, they compute what they did, and come back as they were.

Per architecture: out, dx, every gradient and every running statistic of a training step, of a step with frozen
statistics and of inference, compared as ``fused-resnet check`` compares whole networks: in float64 element by element,
and of each kind of block one network in float32 and under bfloat16 autocast, with a smooth activation in the place of
ReLU, against plain PyTorch's own error.
The table of whole architectures is benchmarks/results/architectures.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import whole_networks
from source_tree import ROOT
from torch import nn
from torchvision_shim import torchvision

sys.path.insert(0, str(ROOT / "benchmarks"))
import architectures  # noqa: E402

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

CLASSES = 5
models = torchvision.models
resnet = models.resnet


pytestmark = pytest.mark.usefixtures("one_thread")


class Narrow(resnet.Bottleneck):
    """A quarter of the channels between blocks, for the time of the tests."""

    expansion = 1


def _resnet(block: type = Narrow, **kwargs: Any) -> nn.Module:
    return resnet.ResNet(block, [1, 2, 1, 1], **({"num_classes": CLASSES} | kwargs))


def _segmentation(net: type, head: type) -> nn.Module:
    """With an auxiliary head, as torchvision puts them together."""
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.fcn import FCNHead

    backbone = _resnet(replace_stride_with_dilation=[False, True, True])
    body = IntermediateLayerGetter(backbone, {"layer4": "out", "layer3": "aux"})
    return net(body, head(512, CLASSES), FCNHead(256, CLASSES))


def _deeplabv3() -> nn.Module:
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

    return _segmentation(DeepLabV3, DeepLabHead)


def _fcn() -> nn.Module:
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    return _segmentation(FCN, FCNHead)


def _fpn() -> nn.Module:
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    return _resnet_fpn_extractor(_resnet(norm_layer=torchvision.ops.FrozenBatchNorm2d), trainable_layers=3)


def _vgg() -> nn.Module:
    vgg = torchvision.models.vgg
    return vgg.VGG(vgg.make_layers([16, "M", 16, 24, "M", 32, "M"], batch_norm=True), num_classes=CLASSES).features


def _efficientnet() -> nn.Module:
    net = torchvision.models.efficientnet
    setting, last = net._efficientnet_conf("efficientnet_b0", width_mult=0.3, depth_mult=0.4)
    return net.EfficientNet(setting, 0.0, stochastic_depth_prob=0.0, num_classes=CLASSES, last_channel=last)


def _mobilenet_v2() -> nn.Module:
    setting = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 64, 2, 2]]
    return models.MobileNetV2(CLASSES, width_mult=0.5, inverted_residual_setting=setting, dropout=0.0)


def _mobilenet_v3() -> nn.Module:
    """One block of each kind: with and without squeeze-and-excitation, residual add and hardswish."""
    net = torchvision.models.mobilenetv3
    setting, last = net._mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.5)
    return net.MobileNetV3(setting[:6], last, num_classes=CLASSES, dropout=0.0)


def _regnet() -> nn.Module:
    net = torchvision.models.regnet
    blocks = net.BlockParams.from_init_params(depth=6, w_0=16, w_a=20.0, w_m=2.2, group_width=8, se_ratio=0.25)
    return net.RegNet(blocks, num_classes=CLASSES)


def _timm(name: str, **kwargs: Any) -> nn.Module:
    small = {"layers": (1, 2, 1, 1), "channels": (16, 24, 32, 48), "num_classes": CLASSES}
    return timm.create_model(name, **(small | kwargs))


def _transformers(name: str, **kwargs: Any) -> nn.Module:
    kind = "RegNet" if name.startswith("RegNet") else "ResNet"
    small = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "num_labels": CLASSES}
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**(small | kwargs)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision/resnet18": lambda: _resnet(resnet.BasicBlock),
    "torchvision/resnet50": _resnet,
    "torchvision/wide_resnet50_2": lambda: _resnet(width_per_group=128),
    "torchvision/resnext50_32x4d": lambda: _resnet(groups=32, width_per_group=4),
    "torchvision/deeplabv3_resnet50": _deeplabv3,
    "torchvision/fcn_resnet50": _fcn,
    "torchvision/resnet50 FPN (detection)": _fpn,
    "torchvision/mobilenet_v2": _mobilenet_v2,
    "torchvision/mobilenet_v3_small": _mobilenet_v3,
    "torchvision/efficientnet_b0": _efficientnet,
    "torchvision/regnet_y_400mf": _regnet,
    "torchvision/densenet121": lambda: models.DenseNet(8, (2, 3, 2), 16, num_classes=CLASSES),
    "torchvision/shufflenet_v2_x0_5": lambda: models.ShuffleNetV2([2, 3, 2], [24, 48, 96, 192, 256], CLASSES),
    "torchvision/mnasnet0_5": lambda: models.MNASNet(0.25, num_classes=CLASSES, dropout=0.0),
    "torchvision/vgg16_bn": _vgg,
    "timm/resnet18": lambda: _timm("resnet18"),
    "timm/resnet50d": lambda: _timm("resnet50d", stem_width=8),
    "timm/resnext50_32x4d": lambda: _timm("resnext50_32x4d"),
    "timm/wide_resnet50_2": lambda: _timm("wide_resnet50_2"),
    "timm/seresnet50": lambda: _timm("seresnet50"),
    "timm/ecaresnet50t": lambda: _timm("ecaresnet50t"),
    "timm/resnetblur50": lambda: _timm("resnetblur50"),
    "timm/resnet50, drop_path": lambda: _timm("resnet50", drop_path_rate=0.4),
    "timm/resnet50, drop_block": lambda: _timm("resnet50", drop_block_rate=0.1),
    "timm/resnet50, act_layer=silu": lambda: _timm("resnet50", act_layer="silu"),
    "timm/resnet50, act_layer=gelu": lambda: _timm("resnet50", act_layer="gelu"),
    "timm/resnet50d, output_stride=8": lambda: _timm("resnet50d", stem_width=8, output_stride=8),
    "timm/resnet26d, features_only": lambda: _timm("resnet26d", stem_width=8, features_only=True, num_classes=0),
    "timm/densenet121": lambda: timm.create_model(
        "densenet121", growth_rate=8, block_config=(2, 3, 2), num_classes=CLASSES
    ),
    "transformers/ResNetForImageClassification": lambda: _transformers("ResNetForImageClassification"),
    "transformers/ResNetForImageClassification, basic": lambda: _transformers(
        "ResNetForImageClassification", layer_type="basic"
    ),
    "transformers/RegNetForImageClassification": lambda: _transformers("RegNetForImageClassification", groups_width=8),
    "transformers/ResNetBackbone": lambda: _transformers("ResNetBackbone", out_features=["stage1", "stage2"]),
}


# Rounding decides on some gradients of its attention: half an ulp in the parameters changes them by more than the bound
# (fc1.bias with frozen norms, five seeds: ours 2e-6 to 8e-5, plain PyTorch 3e-6 to 6e-5, that change 2e-5 to 1e-4).
ILL_CONDITIONED = {"torchvision/efficientnet_b0"}
# Compared in float32 and bfloat16 as well: of each kind of block one, for the same kernels round. Those of ResNet-18
# and -50 have tests/models/test_real_sizes.py. --full: all.
NARROW = {
    "torchvision/resnext50_32x4d", "torchvision/mobilenet_v3_small", "torchvision/densenet121", "timm/resnet50d",
    "timm/resnet50, act_layer=gelu",
}  # fmt: skip
# What another network has as well.
FULL = {
    "torchvision/wide_resnet50_2", "torchvision/regnet_y_400mf", "torchvision/fcn_resnet50", "torchvision/mnasnet0_5",
    "timm/resnet18", "timm/resnext50_32x4d", "timm/wide_resnet50_2", "timm/resnet50d, output_stride=8",
    "timm/densenet121", "transformers/ResNetBackbone",
}  # fmt: skip


def check(name: str, full: bool) -> None:
    """The network of that name, fused and frozen, beside plain."""
    whole_networks.check(NETWORKS[name], narrow=full or name in NARROW, ill_conditioned=name in ILL_CONDITIONED)


def networks(*libraries: str) -> list[Any]:
    """For the tests' parameters."""
    names = [name for name in NETWORKS if name.startswith(libraries)]
    return [pytest.param(name, marks=pytest.mark.full) if name in FULL else name for name in names]


@pytest.mark.parametrize("name", networks("torchvision/"))
def test_fused_equals_plain(name: str, pytestconfig: pytest.Config) -> None:
    check(name, pytestconfig.getoption("--full"))


# Of each library, of those with everything in chains and of those with reasons why not; all of them:
# python benchmarks/architectures.py --check
CHECKED = {
    "torchvision": ["resnet18", "mobilenet_v2", "densenet121", "retinanet_resnet50_fpn, backbone"],
    "timm": ["resnet50d", "ecaresnet50t", "dla34", "resnet26d, features_only"],
    "transformers": ["ResNetForImageClassification, basic", "DetrModel, backbone"],
    architectures.OURS: ["ResNet of 12-lead ECGs, 1-D"],
}


@pytest.mark.parametrize(("library", "name"), [(library, n) for library, names in CHECKED.items() for n in names])
def test_table_is_what_fuse_does(library: str, name: str) -> None:
    """benchmarks/results/architectures.md."""
    if library != architectures.OURS:
        pytest.importorskip(library)
    table = architectures.RESULTS.read_text()
    if architectures.written_with(library) not in table:
        pytest.skip("the table was written with another version of the library")
    assert architectures.line(library, name) in table.splitlines(), "rewrite it: python benchmarks/architectures.py"
