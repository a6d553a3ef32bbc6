"""Inspects a network of nn.Modules: its modules, tools that record its calls, process groups that share statistics."""

from __future__ import annotations

import copy
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fused_resnet.fusion.patterns import original

# The front that captures or runs in the current thread.
front_here: ContextVar[Any] = ContextVar("fused_resnet_front", default=None)


def calling() -> bool:
    """Whether a front captures or runs in this thread."""
    return front_here.get() is not None


calling._dynamo_marked_constant = True  # type: ignore[attr-defined]


def graphed() -> bool:
    """Whether a tool records a graph: dynamo, ``torch.jit.trace``, ``torch.export``, either way of
    ``torch.onnx.export``.

    Modules then run their own forwards, so that the graph is the plain model's.
    """
    return torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing() or torch.compiler.is_exporting()


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Each module of the model once, with its first name, parents first.

    This is ``model.named_modules()``, but it also works for modules with their own ``__eq__`` or without a hash.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    rest = [("", model)]
    while rest:
        name, m = rest.pop()
        if id(m) not in found:
            found[id(m)] = name, m
            children = [(k, child) for k, child in m._modules.items() if child is not None]
            rest += [(f"{name}.{k}".lstrip("."), child) for k, child in reversed(children)]
    return list(found.values())


def shared_by(bn: nn.Module) -> dist.ProcessGroup | None:
    """The process group that shares this norm's statistics in training.

    It is a SyncBatchNorm's group; None if there is no group, or if this process is alone in it.
    """
    if original(bn) is not nn.SyncBatchNorm or not dist.is_available() or not dist.is_initialized():
        return None
    given: Any = bn.process_group
    group: dist.ProcessGroup | None = dist.group.WORLD if given is None else given
    return group if dist.get_world_size(group) > 1 else None


def copy_of(model: nn.Module) -> nn.Module:
    """``copy.deepcopy`` without autograd history, which a ScriptModule's copy would have. Process groups are shared."""
    groups = [m.process_group for _, m in named_modules(model) if isinstance(m, nn.SyncBatchNorm)]
    with torch.no_grad():
        return copy.deepcopy(model, {id(group): group for group in groups if group is not None})
