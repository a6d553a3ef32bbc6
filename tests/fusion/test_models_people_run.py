"""Networks of video, volumes, signals, faces, detection and segmentation: fused and frozen they compute what they did.

Those of libraries that are not installed are skipped.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from source_tree import ROOT
from torch import Tensor, nn
from whole_networks import check

import fused_resnet as fr

sys.path.insert(0, str(ROOT / "benchmarks"))
from small_networks import ecg_resnet, iresnet50  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def _iresnet() -> nn.Module:
    return iresnet50((2,), width=8, side=16, features=6)


def _ecg() -> nn.Module:
    net = ecg_resnet((1, 1), width=8, classes=5)
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return net


def _video(block: str, conv: Callable[[Any], list[Any]], stem: str) -> nn.Module:
    from torchvision_shim import torchvision

    video = torchvision.models.video.resnet
    net: nn.Module = video.VideoResNet(
        getattr(video, block), conv(video), [1, 1, 1, 1], getattr(video, stem), num_classes=5
    )
    net.layer3, net.layer4, net.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 5)
    return _fourth(net)


def _fourth(model: nn.Module) -> nn.Module:
    """With a fourth of the channels of volumes."""
    for m in model.modules():
        if isinstance(m, nn.Conv3d):
            cin = m.in_channels if m.in_channels == 3 else -(-m.in_channels // 4)
            geometry = m.kernel_size, m.stride, m.padding
            nn.Conv3d.__init__(m, cin, -(-m.out_channels // 4), *geometry, bias=m.bias is not None)
        elif isinstance(m, nn.BatchNorm3d):
            m.__init__(-(-m.num_features // 4))  # type: ignore[misc]
        elif isinstance(m, nn.Linear):
            m.__init__(m.in_features // 4, m.out_features)  # type: ignore[misc]
    return model


def _r3d() -> nn.Module:
    return _video("BasicBlock", lambda v: [v.Conv3DSimple] * 4, "BasicStem")


def _mc3() -> nn.Module:
    return _video("BasicBlock", lambda v: [v.Conv3DSimple, *[v.Conv3DNoTemporal] * 3], "BasicStem")


def _r2plus1d() -> nn.Module:
    return _video("BasicBlock", lambda v: [v.Conv2Plus1D] * 4, "R2Plus1dStem")


def _monai() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    planes = [4, 8, 8, 8]
    net: nn.Module = nets.resnet.ResNet(
        "bottleneck", [1, 2, 1, 1], planes, spatial_dims=3, n_input_channels=1, num_classes=5
    )
    return net


def _smp(name: str) -> nn.Module:
    import torchvision_shim  # noqa: F401

    package = pytest.importorskip("segmentation_models_pytorch")
    small = {"decoder_channels": (32, 16, 16, 8, 8)} if name == "Unet" else {"decoder_channels": 16}
    net: nn.Module = getattr(package, name)(encoder_name="resnet18", encoder_weights=None, **small)
    return net


class _Raw(nn.Module):
    """What a YOLO predicts, in evaluation too, without the boxes that it decodes there."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> object:
        out = self.net(x)
        return out[1] if isinstance(out, tuple) else out


def _yolo(name: str) -> nn.Module:
    import torchvision_shim  # noqa: F401

    tasks = pytest.importorskip("ultralytics.nn.tasks")
    config = tasks.yaml_model_load(f"{name}.yaml")
    config |= {"scales": {"n": [0.33, 0.0625, 1024]}, "nc": 3}
    return _Raw(tasks.DetectionModel(config, verbose=False))


def _backbone(name: str) -> nn.Module:
    import torchvision_shim  # noqa: F401

    transformers = pytest.importorskip("transformers")
    small = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    if name == "rt_detr":
        config = transformers.RTDetrResNetConfig(**small, layer_type="bottleneck", out_features=["stage1", "stage2"])
        rt_detr: nn.Module = transformers.RTDetrResNetBackbone(config)
        return rt_detr
    stages = transformers.ResNetConfig(**small, out_features=["stage2"])
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=stages, d_model=16, encoder_layers=1, decoder_layers=1
    )
    detr: nn.Module = transformers.DetrModel(config).backbone.model
    return detr


IMAGES, VOLUMES, CLIPS, SIGNALS, FACES = (
    (2, 3, 64, 64),
    (2, 1, 32, 32, 32),
    (2, 3, 4, 24, 24),
    (3, 12, 96),
    (3, 3, 16, 16),
)
# network -> how it is built, and its input's shape
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "iresnet50": (_iresnet, FACES),
    "ecg": (_ecg, SIGNALS),
    "r3d_18": (_r3d, CLIPS),
    "mc3_18": (_mc3, CLIPS),
    "r2plus1d_18": (_r2plus1d, CLIPS),
    "monai": (_monai, VOLUMES),
    "detr": (lambda: _backbone("detr"), IMAGES),
    "rt_detr": (lambda: _backbone("rt_detr"), IMAGES),
    "unet": (lambda: _smp("Unet"), IMAGES),
    "deeplabv3+": (lambda: _smp("DeepLabV3Plus"), IMAGES),
    "yolov8n": (lambda: _yolo("yolov8n"), IMAGES),
    "yolo11n": (lambda: _yolo("yolo11n"), IMAGES),
}

# What another network has as well.
FULL = {"mc3_18", "r2plus1d_18", "rt_detr", "deeplabv3+", "yolo11n"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) if n in FULL else n for n in NETWORKS])
def test_fused_equals_plain(name: str) -> None:
    build, shape = NETWORKS[name]
    wrong = [str(f) for f in check(build, shape) if not f.error <= 1e-8]
    assert not wrong, wrong


def _detector(name: str) -> nn.Module:
    """On images of 64x64, with frozen norms whose numbers tell mistakes apart."""
    from torchvision_shim import torchvision

    models = torchvision.models
    net = models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=torchvision.ops.FrozenBatchNorm2d)
    backbone = models.detection.backbone_utils._resnet_fpn_extractor(net, 3)
    for m in backbone.modules():
        if isinstance(m, torchvision.ops.FrozenBatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.running_mean, 0.0, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    detector: nn.Module = getattr(models.detection, name)(backbone, num_classes=5, min_size=64, max_size=64).double()
    return detector


def _detected(model: Any) -> dict[str, Tensor]:
    """Losses and gradients of a training step, and what is found in evaluation; each from the same random numbers."""
    images = [torch.linspace(0, i + 1, 3 * 64 * 64, dtype=torch.float64).sin().view(3, 64, 64) for i in range(2)]
    box, mask = torch.tensor([[4.0, 6.0, 40.0, 50.0]], dtype=torch.float64), torch.ones(1, 64, 64, dtype=torch.uint8)
    targets = [{"boxes": box, "labels": torch.tensor([i + 1]), "masks": mask} for i in range(2)]
    torch.manual_seed(1)
    found = dict(model.train()(images, targets))
    sum(found.values()).backward()
    found |= {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        found |= {f"{k} {i}": t for i, one in enumerate(model.eval()(images)) for k, t in one.items()}
    return {name: t.detach() for name, t in found.items()}


@pytest.mark.full
@pytest.mark.parametrize("name", ["RetinaNet", "FasterRCNN", "MaskRCNN"])
def test_detectors(name: str) -> None:
    """With their backbones fused, as docs/trainers.md does it."""
    plain = _detector(name)
    model: Any = copy.deepcopy(plain)
    fr.fuse(model.backbone)
    want, got = _detected(plain), _detected(model)
    assert all(row.fused for row in fr.explain(model.backbone).rows)
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-8, atol=1e-8, msg=lambda t, k=key: f"{k}: {t}")
