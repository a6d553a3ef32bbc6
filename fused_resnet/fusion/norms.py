"""Classes of norms that dynamo can capture: SyncBatchNorms, and norms whose momentum or eps is no constant.

Dynamo makes an input of a graph of a NumPy number or a 0-d tensor, and can't trace ``batch_norm`` with it. So while a
front captures, a norm that has one reads Python floats instead. Dynamo guards them, and the front sets them before each
call (``set_numbers``). Elsewhere the norm runs its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.batchnorm import _BatchNorm

from fused_resnet.base.arguments import number
from fused_resnet.fusion.classes import KINDS, NUMBERS, FusedModule, fused_class, set_class, why_no_class
from fused_resnet.fusion.inspection import calling, named_modules, shared_by
from fused_resnet.fusion.sync_norm import sync_batch_norm

_CONSTANTS = (float, int, bool, type(None))
_FORWARD = _BatchNorm.forward
# The number of norms that got their class for their numbers, in a list so that all fronts see it.
classed = [0]


# ---------------------------------------------------------------------------------------------------- forwards
def _captured() -> bool:
    return is_dynamo_compiling() and calling()


def _number(m: Any, name: str) -> Any:
    """``m.momentum`` or ``m.eps``; in a front's capture the Python float that stands for it."""
    own, key = m.__dict__, NUMBERS[name]
    return own[key] if _captured() and key in own else getattr(m, name)


def _count(m: Any) -> Any:
    """Counts a batch in training. Returns the weight of its statistics."""
    momentum = _number(m, "momentum")
    if m.training and m.track_running_stats and m.num_batches_tracked is not None:
        m.num_batches_tracked.add_(1)
        if momentum is None:
            return 1.0 / float(m.num_batches_tracked)
    return 0.0 if momentum is None else momentum


def _batch_norm(m: Any, input: Tensor) -> Tensor:
    """``_BatchNorm.forward``."""
    m._check_input_dim(input)
    momentum = _count(m)
    training = m.training or (m.running_mean is None and m.running_var is None)
    mean, var = (m.running_mean, m.running_var) if not m.training or m.track_running_stats else (None, None)
    return F.batch_norm(input, mean, var, m.weight, m.bias, training, momentum, _number(m, "eps"))


def _numbered_methods(cls: Any) -> dict[str, Callable[..., Any]]:
    def forward(self: Any, input: Tensor) -> Tensor:
        own = cls.forward  # looked up at each call: it may be replaced at any time
        return _batch_norm(self, input) if own is _FORWARD and _captured() else own(self, input)

    return {"forward": wraps(cls.forward)(forward)}


def _sync_methods(cls: Any) -> dict[str, Callable[..., Any]]:
    """The methods of a SyncBatchNorm that dynamo captures as one call, on any device."""

    def forward(self: Any, input: Tensor) -> Tensor:
        group = self.__dict__.get("_fr_group")
        if group is None or not self.training:  # alone in its group: PyTorch's would refuse a CPU's tensors
            return _batch_norm(self, input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        momentum, eps = _count(self), _number(self, "eps")
        mean, var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        return sync_batch_norm(input, mean, var, self.weight, self.bias, True, momentum, eps, group)

    return {"forward": wraps(cls.forward)(forward)}


KINDS["numbered"], KINDS["sync"] = _numbered_methods, _sync_methods


# ---------------------------------------------------------------------------------------------------- before calls
def numbered(module: nn.Module) -> list[nn.Module]:
    """The norms of a module whose numbers are or were no constants, each with a class that reads floats instead."""
    found: list[nn.Module] = []
    for _, m in named_modules(module):
        own = m.__dict__
        odd = any(key in own or type(own.get(name)) not in _CONSTANTS for name, key in NUMBERS.items())
        if odd and isinstance(m, _BatchNorm):
            if type(m).forward is _FORWARD and why_no_class(type(m), "numbered") is None:
                set_class(m, fused_class(type(m), "numbered"))
                classed[0] += 1
            if isinstance(m, FusedModule):
                found.append(m)
    return found


def set_numbers(norms: Sequence[nn.Module]) -> None:
    """Sets the floats to the present values. What is no number stays as it is, and PyTorch refuses it."""
    for own in (m.__dict__ for m in norms):
        for name, key in NUMBERS.items():
            value = own.get(name)
            try:
                own[key] = None if value is None else number(value, name)
            except (TypeError, ValueError):
                own[key] = value


def name_groups(module: nn.Module) -> None:
    """Stores in every SyncBatchNorm of a module the name of its process group, as a constant that dynamo guards.

    The name is None if the process is alone in the group, or if the processes are gone.
    """
    if dist.is_initialized():
        module.__dict__["_fr_named"] = True
    else:
        module.__dict__.pop("_fr_named", None)
    for _, m in named_modules(module):
        if isinstance(m, nn.SyncBatchNorm):
            if type(m) is nn.SyncBatchNorm:
                set_class(m, fused_class(nn.SyncBatchNorm, "sync"))
            group = shared_by(m)
            m.__dict__["_fr_group"] = group.group_name if group is not None else None
