"""The networks of the paper, with torchvision's names: the ImageNet family and the 6n + 2 family for CIFAR-10."""

from fused_resnet.models import cifar, resnet
from fused_resnet.models.cifar import *
from fused_resnet.models.resnet import *

__all__ = ["list_models", *cifar.__all__, *resnet.__all__]


def list_models(family: str | None = None) -> list[str]:
    """The names of all factories of this module: the ImageNet family, then the CIFAR family, by depth within each.

    Args:
        family: "imagenet" or "cifar": only that family. None: both.

    Returns:
        Names ``n`` for which ``getattr(fused_resnet.models, n)()`` builds a network.

    Raises:
        ValueError: there is no such family.
    """
    families = {"imagenet": resnet.ResNet, "cifar": cifar.CifarResNet}
    if family is not None and family not in families:
        raise ValueError(f"family must be None, {' or '.join(map(repr, families))}, got {family!r}")
    return [name for key, network in families.items() if family in (None, key) for name in resnet.FACTORIES[network]]
