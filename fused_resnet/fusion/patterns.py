"""The meaning of classes and functions in a chain. Other libraries' classes are known by name: none is imported."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_resnet.base.arguments import number
from fused_resnet.spec import ACTIVATIONS, Act

# Norms beside torch.nn's BatchNorm2d and SyncBatchNorm: class -> (never uses a batch's statistics, has an activation).
# Those of the first kind hold weight, bias and both statistics as buffers. Those of the second call the activation
# ``act``, after ``drop``.
NORMS: dict[str, tuple[bool, bool]] = {
    "torchvision.ops.misc.FrozenBatchNorm2d": (True, False),
    "timm.layers.norm_act.BatchNormAct2d": (False, True),
    "timm.layers.norm_act.FrozenBatchNormAct2d": (True, True),
}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# The buffers of a frozen norm: torchvision's, detectron2's, those of transformers' detectors.
_FROZEN = {"weight", "bias", "running_mean", "running_var"}
# Other libraries' activations that equal one of PyTorch's.
ACTS = {"transformers.activations.SiLUActivation": nn.SiLU}
# Methods of a network that its forward calls and that users call too.
METHODS = ("forward_features", "_forward_impl", "forward")
ADDS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
# PyTorch's activation modules -> their functions' names.
ACT_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity", nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.ELU: "elu", nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.GELU: "gelu", nn.Mish: "mish",
    nn.Softplus: "softplus", nn.Tanh: "tanh", nn.Hardsigmoid: "hardsigmoid", nn.Hardtanh: "hardtanh", nn.SELU: "selu",
    nn.CELU: "celu",
}  # fmt: skip
# Activations called as functions or methods -> their functions' names.
ACT_CALLS: dict[Callable[..., Tensor] | str, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), "tanh"),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    **dict.fromkeys((F.elu, F.elu_), "elu"),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), "hardtanh"),
    **dict.fromkeys((F.selu, F.selu_, torch.selu, torch.selu_), "selu"),
    **dict.fromkeys((F.celu, F.celu_, torch.celu, torch.celu_), "celu"),
    F.silu: "silu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
    F.mish: "mish",
    F.softplus: "softplus",
    F.hardsigmoid: "hardsigmoid",
}
# What these functions, and the attributes of their modules, take beside the tensor: names and defaults.
_ACT_ARGUMENTS: dict[str, dict[str, Any]] = {
    "leaky_relu": {"negative_slope": 0.01},
    "elu": {"alpha": 1.0},
    "gelu": {"approximate": "none"},
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "hardtanh": {"min_val": -1.0, "max_val": 1.0},
    "celu": {"alpha": 1.0},
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


def act_arguments(function: str) -> dict[str, Any]:
    """The arguments of an activation's function beside the tensor and ``inplace``, with their defaults."""
    return _ACT_ARGUMENTS.get(function, {})


def act_of_call(function: str, given: dict[str, Any]) -> Act | None:
    """The activation that a function computes with these arguments; None if the table of activations lacks it.

    Args:
        function: a value of ``ACT_CALLS``. given: all of ``act_arguments``.
    """
    if function == "gelu":
        return {"none": Act("gelu"), "tanh": Act("gelu_tanh")}.get(given["approximate"])
    if not all(isinstance(value, int | float) for value in given.values()):
        return None
    if function == "softplus" and given["threshold"] != 20:
        return None
    if function == "hardtanh":
        low, high = given.values()
        if (low, high) == (0, 6):
            return Act("relu6")
        if low != -high:
            return None
        given = {"limit": high}
    try:
        return Act(function, float(next(iter(given.values()), 0.0)))
    except ValueError:  # the parameter is one that no activation takes
        return None


def act_of_module(m: nn.Module) -> Act | None:
    """The activation that a module computes; None if the table of activations lacks it."""
    function = ACT_MODULES.get(same_as(type(m)))
    if function is None:
        return None
    given = {name: getattr(m, name) for name in act_arguments(function)}
    return act_of_call(function, {n: v if isinstance(v, str) else number(v, f"act: {n}") for n, v in given.items()})


def module_of_act(act: Act) -> nn.Module:
    """PyTorch's module for an activation."""
    if act.name == "gelu_tanh":
        return nn.GELU("tanh")
    if act.name == "hardtanh":
        return nn.Hardtanh(-act.param, act.param)
    kind, parameter = next(m for m, name in ACT_MODULES.items() if name == act.name), ACTIVATIONS[act.name][1]
    return kind(**({parameter: act.param} if parameter else {}))


def looks_like_norm(m: nn.Module) -> bool:
    """Whether it is a BatchNorm of signals, images or volumes, or a frozen one, even if no chain takes its class."""
    compiled = isinstance(m, torch.jit.ScriptModule) and m.original_name in {cls.__name__ for cls in _BATCH_NORMS}
    return compiled or isinstance(m, _BATCH_NORMS) or class_name(type(m)) in NORMS or is_frozen_norm(m)


def is_frozen_norm(m: nn.Module) -> bool:
    """Whether its own tensors are those of a frozen norm."""
    buffers = m.__dict__.get("_buffers")
    return isinstance(buffers, dict) and buffers.keys() == _FROZEN and not m.__dict__.get("_parameters")
