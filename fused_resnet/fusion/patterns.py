"""What classes and functions mean in a chain. Other libraries' classes by name: no library is imported for them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# Norms beside torch.nn's BatchNorm2d and SyncBatchNorm: class -> (never uses a batch's statistics, has an activation of
# its own). The former hold weight, bias and both statistics as buffers; the latter call it ``act``, behind ``drop``.
NORMS: dict[str, tuple[bool, bool]] = {
    "torchvision.ops.misc.FrozenBatchNorm2d": (True, False),
    "timm.layers.norm_act.BatchNormAct2d": (False, True),
    "timm.layers.norm_act.FrozenBatchNormAct2d": (True, True),
}
# Other libraries' activations that are one of PyTorch's.
ACTS = {"transformers.activations.SiLUActivation": nn.SiLU}
# Methods of a network that its forward calls and that users call themselves; the first that there is is replaced.
METHODS = ("forward_features", "_forward_impl", "forward")
ADDS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
# Activations called as functions or methods, and the name of their parameter.
ACT_CALLS: dict[Callable[..., Tensor] | str, tuple[str, str]] = {
    F.relu: ("relu", ""),
    F.relu_: ("relu", ""),
    torch.relu: ("relu", ""),
    torch.relu_: ("relu", ""),
    "relu": ("relu", ""),
    "relu_": ("relu", ""),
    F.leaky_relu: ("leaky_relu", "negative_slope"),
    F.elu: ("elu", "alpha"),
    F.sigmoid: ("sigmoid", ""),
    torch.sigmoid: ("sigmoid", ""),
    "sigmoid": ("sigmoid", ""),
    F.silu: ("silu", ""),
    F.relu6: ("relu6", ""),
    F.hardswish: ("hardswish", ""),
}


class _Constructed:
    """What a class with nothing but a constructor holds."""

    field: int

    def __init__(self) -> None:
        self.field = 0


_CONSTRUCTED = {*vars(_Constructed), "__annotations__", "__constants__", "extra_repr"}


def class_name(cls: type) -> str:
    """The name under which the tables here know a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def original(m: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was fused."""
    return getattr(type(m), "_fr_original", type(m))


def calls_itself(m: nn.Module) -> bool:
    """Whether the class overrides what calling a module does, beside its forward; fx graphs do, to no effect."""
    return type(m).__call__ is not nn.Module.__call__ and not isinstance(m, fx.GraphModule)


def same_as(cls: type) -> type:
    """The class of PyTorch's that ``cls`` does the same as, for it has a constructor of its own and nothing else; or
    ``cls`` itself."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch."):
            return base
        if not vars(base).keys() <= _CONSTRUCTED:
            break
    return ACTS.get(class_name(cls), cls)


def norm_kind(cls: type) -> tuple[bool, bool] | None:
    """(frozen, with an activation) of a norm that a chain takes; None for others."""
    known = same_as(cls) is nn.BatchNorm2d or cls is nn.SyncBatchNorm
    return (False, False) if known else NORMS.get(class_name(cls))


def looks_like_norm(m: nn.Module) -> bool:
    """A BatchNorm of two-dimensional images, whether or not a chain takes its class."""
    compiled = isinstance(m, torch.jit.ScriptModule) and m.original_name == "BatchNorm2d"
    return compiled or isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm) or class_name(type(m)) in NORMS
