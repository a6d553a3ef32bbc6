"""The networks of the paper, with torchvision's names: the ImageNet family and the 6n + 2 family for CIFAR-10."""

from fused_resnet.models.cifar import (
    CifarResNet,
    ZeroPadShortcut,
    cifar_resnet,
    plain20,
    plain32,
    plain44,
    plain56,
    plain110,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
    resnet1202,
)
from fused_resnet.models.resnet import (
    FACTORIES,
    BasicBlock,
    Bottleneck,
    PlainBlock,
    ResNet,
    plain18,
    plain34,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
    wide_resnet101_2,
)


def list_models(family: str | None = None) -> list[str]:
    """The names of all factories of this module: the ImageNet family, then the CIFAR family, by depth within each.

    Args:
        family: "imagenet" or "cifar": only that family. None: both.

    Returns:
        Names ``n`` for which ``getattr(fused_resnet.models, n)()`` builds a network.

    Raises:
        ValueError: there is no such family.
    """
    families = {"imagenet": ResNet, "cifar": CifarResNet}
    if family is not None and family not in families:
        raise ValueError(f"family must be None, {' or '.join(map(repr, families))}, got {family!r}")
    return [name for key, network in families.items() if family in (None, key) for name in FACTORIES[network]]


__all__ = [
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "PlainBlock",
    "ResNet",
    "ZeroPadShortcut",
    "cifar_resnet",
    "list_models",
    "plain18",
    "plain20",
    "plain32",
    "plain34",
    "plain44",
    "plain56",
    "plain110",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet1202",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
