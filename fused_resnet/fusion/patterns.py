"""The meaning of classes and functions in a chain. Other libraries' classes are known by name: none is imported."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# Norms beside torch.nn's BatchNorm2d and SyncBatchNorm: class -> (never uses a batch's statistics, has an activation).
# Those of the first kind hold weight, bias and both statistics as buffers. Those of the second call the activation
# ``act``, after ``drop``.
NORMS: dict[str, tuple[bool, bool]] = {
    "torchvision.ops.misc.FrozenBatchNorm2d": (True, False),
    "timm.layers.norm_act.BatchNormAct2d": (False, True),
    "timm.layers.norm_act.FrozenBatchNormAct2d": (True, True),
}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# What frozen norms hold as buffers, in torchvision, detectron2, transformers' detectors and elsewhere.
_FROZEN = {"weight", "bias", "running_mean", "running_var"}
# Other libraries' activations that equal one of PyTorch's.
ACTS = {"transformers.activations.SiLUActivation": nn.SiLU}
# Methods of a network that its forward calls and that users call too.
METHODS = ("forward_features", "_forward_impl", "forward")
ADDS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
# Activations called as functions or methods -> their names in ``spec.ACTIVATIONS``.
ACT_CALLS: dict[Callable[..., Tensor] | str, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), "sigmoid"),
    F.leaky_relu: "leaky_relu",
    F.elu: "elu",
    F.silu: "silu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
}


class _Constructed:
    """The attributes of a class that defines only a constructor."""

    field: int

    def __init__(self) -> None:
        self.field = 0


_CONSTRUCTED = {*vars(_Constructed), "__annotations__", "__constants__", "extra_repr"}


def class_name(cls: type) -> str:
    """The name under which the tables here know a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def original(m: nn.Module) -> type[nn.Module]:
    """The class of a module before it was fused."""
    return getattr(type(m), "_fr_original", type(m))


def calls_itself(m: nn.Module) -> bool:
    """Whether the class overrides ``__call__``. fx graphs do, without an effect."""
    return type(m).__call__ is not nn.Module.__call__ and not isinstance(m, fx.GraphModule)


def same_as(cls: type) -> type:
    """The class of PyTorch whose behaviour ``cls`` has, because it adds only a constructor; otherwise ``cls``."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch."):
            return base
        if not vars(base).keys() <= _CONSTRUCTED:
            break
    return ACTS.get(class_name(cls), cls)


def norm_kind(cls: type) -> tuple[bool, bool] | None:
    """(frozen, has an activation) of a norm that a chain takes; None for other classes."""
    known = same_as(cls) is nn.BatchNorm2d or cls is nn.SyncBatchNorm
    return (False, False) if known else NORMS.get(class_name(cls))


def looks_like_norm(m: nn.Module) -> bool:
    """Whether it is a BatchNorm of signals, images or volumes, or a frozen one, even if no chain takes its class."""
    compiled = isinstance(m, torch.jit.ScriptModule) and m.original_name in {cls.__name__ for cls in _BATCH_NORMS}
    return compiled or isinstance(m, _BATCH_NORMS) or class_name(type(m)) in NORMS or is_frozen_norm(m)


def is_frozen_norm(m: nn.Module) -> bool:
    """Whether its own tensors are those of a frozen norm."""
    buffers = m.__dict__.get("_buffers")
    return isinstance(buffers, dict) and buffers.keys() == _FROZEN and not m.__dict__.get("_parameters")
