"""Whole models in files for ``torch.load(weights_only=True)``."""

from __future__ import annotations

import importlib
import io
import pickle
import pickletools
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import torch
from torch import nn

from fused_resnet.frozen import cuda_graphs, modules
from fused_resnet.fusion.classes import rebuild

# This package's own classes and functions.
_OWN: tuple[Any, ...] = (rebuild, cuda_graphs.Graphs, modules.Frozen, modules._made_again)


def safe_globals(*models: nn.Module | type) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """The list that ``torch.load(weights_only=True)`` needs to load whole models that ``fuse`` or ``freeze`` made.

    A plain model of the same architecture names all that a fused or frozen one needs, except functions of other
    packages that its forward calls (``torch.serialization.get_unsafe_globals_in_checkpoint`` names those).

    Args:
        models: modules (all classes in them are listed) and classes.

    Returns:
        A list for ``torch.serialization.safe_globals`` (a context) or ``torch.serialization.add_safe_globals``.

    Raises:
        TypeError: an argument is neither a module nor a class.

    Example:
        >>> with torch.serialization.safe_globals(fused_resnet.safe_globals(torchvision.models.resnet50())):
        ...     model = torch.load("model.pt", weights_only=True)
    """
    found: dict[str, Any] = {f"{each.__module__}.{each.__qualname__}": each for each in _OWN}
    for i, model in enumerate(models):
        if isinstance(model, type):
            found[f"{model.__module__}.{model.__qualname__}"] = model
        elif isinstance(model, nn.Module):
            found |= _named_in(model)
        else:
            raise TypeError(f"models[{i}]: expected an nn.Module or a class, got {type(model).__name__}")
    return [(each, name) for name, each in found.items()]


class _WithoutTensors(pickle.Pickler):
    """Writes the structure of a pickle, as torch.save does."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, 2, fix_imports=False)

    def persistent_id(self, obj: Any) -> str | None:
        return "tensor" if isinstance(obj, torch.Tensor) and type(obj) in (torch.Tensor, nn.Parameter) else None


def _named_in(model: nn.Module) -> dict[str, Any]:
    """The classes and functions that a pickle of the model names, except ``getattr``, which can reach everything."""
    buffer = io.BytesIO()
    _WithoutTensors(buffer).dump(model)
    return {name: each for name, each in _globals(buffer.getvalue()) if each is not getattr}


def _globals(pickled: bytes) -> Iterator[tuple[str, Any]]:
    for code, argument, _ in pickletools.genops(pickled):
        if code.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            yield f"{module}.{name}", reduce(getattr, name.split("."), importlib.import_module(module))
