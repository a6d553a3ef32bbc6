"""What is asked of a network of nn.Modules: who records its calls, which modules it has, who shares its statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fused_resnet.fusion.patterns import original


def graphed() -> bool:
    """Whether a tool records what runs: dynamo, ``torch.jit.trace``, ``torch.export``, either way of
    ``torch.onnx.export``. Modules run their own forwards then: the graph is the plain model's."""
    return torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing() or torch.compiler.is_exporting()


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every place in the model, by its name, and the module there; parents first, and once more what stands in several.
    As ``named_modules(remove_duplicate=False)``, for modules that have an ``__eq__`` of their own, or no hash, too."""
    rest: list[tuple[str, nn.Module, tuple[int, ...]]] = [("", model, ())]
    while rest:
        name, m, above = rest.pop()
        yield name, m
        if id(m) not in above:  # or it holds itself
            children = [(k, child) for k, child in m._modules.items() if child is not None]
            rest += [(f"{name}.{k}".lstrip("."), child, (*above, id(m))) for k, child in reversed(children)]


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Each module of the model once, with its first name; parents first."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, m in places(model):
        found.setdefault(id(m), (name, m))
    return list(found.values())


def shared_by(bn: nn.Module) -> dist.ProcessGroup | None:
    """The process group whose processes share this norm's statistics in training: that of a SyncBatchNorm, where there
    is one and this process is not alone in it."""
    if original(bn) is not nn.SyncBatchNorm or not dist.is_available() or not dist.is_initialized():
        return None
    given: Any = bn.process_group
    group: dist.ProcessGroup | None = dist.group.WORLD if given is None else given
    return group if dist.get_world_size(group) > 1 else None


def copy_of(model: nn.Module) -> nn.Module:
    """``copy.deepcopy`` without a history of its tensors (a ScriptModule's copy has one else), but for process groups,
    of which there is one each."""
    groups = [m.process_group for _, m in named_modules(model) if isinstance(m, nn.SyncBatchNorm)]
    with torch.no_grad():
        return copy.deepcopy(model, {id(group): group for group in groups if group is not None})
