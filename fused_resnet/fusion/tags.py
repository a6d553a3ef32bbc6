"""Dynamo's tags of dictionaries: it skips the guards of a module while no dictionary of the module has changed.

A guard costs some nanoseconds, but a network has thousands, and its weights drive what they read out of the cache.
With tags they take a third of the time. Python counts the changes of each dictionary, and dynamo compares the counts.
It does not see another class or another ``__dict__`` of a module: ``Watched`` does. Below Python 3.12 it also reads the
counts of dictionaries that may be gone (pytorch#188101): ``Watched`` keeps them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext

# The first version of PyTorch that keeps weak references to the tensors that it compares.
AVAILABLE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
OPTIONS: dict[str, Any] = {
    "use_recursive_dict_tags_for_guards": True,
    "max_saved_pointers_for_recursive_dict_tags_check": 1 << 20,  # dictionaries and tensors
    "assume_dunder_attributes_remain_unchanged": False,  # of functions
}
# From this version on dynamo is told when a dictionary changes or goes.
_TELLS = sys.version_info >= (3, 12)
_dict_of, _children_of = attrgetter("__dict__"), itemgetter("_modules")


class Watched:
    """The modules of a network as they are now: their classes, dictionaries and children."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())
        self.classes, self.dicts = list(map(type, self.modules)), list(map(_dict_of, self.modules))
        self.tables = list(map(_children_of, self.dicts))
        self.children = list(chain.from_iterable(map(dict.values, self.tables)))
        self.kept = [] if _TELLS else [d for own in self.dicts for d in _inside(own)]
        # those in which other dictionaries may be exchanged
        self.counted = [] if _TELLS else [*self.dicts, *(d for d in self.kept if any(_inside(d)))]
        self.counts = self.count()

    def count(self) -> list[int]:
        """How often the dictionaries have changed."""
        from torch._C._dynamo.guards import dict_version

        return list(map(dict_version, self.counted))

    def same_modules(self) -> bool:
        """Whether every module still has its class, its dictionary and its children."""
        return (
            all(map(is_, map(type, self.modules), self.classes))
            and all(map(is_, map(_dict_of, self.modules), self.dicts))
            and all(map(is_, map(_children_of, self.dicts), self.tables))
            and sum(map(len, self.tables)) == len(self.children)
            and all(map(is_, chain.from_iterable(map(dict.values, self.tables)), self.children))
        )

    def same_dicts(self) -> bool:
        """Whether the dictionaries that are kept are all that there are."""
        return self.count() == self.counts


def _inside(of: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
    """The dictionaries in a dictionary, each once."""
    rest, found = [of], {id(of)}
    while rest:
        for value in rest.pop().values():
            if isinstance(value, dict) and id(value) not in found:
                found.add(id(value))
                rest.append(value)
                yield value


def suits(module: nn.Module, name: str) -> bool:
    """Whether the graph that is being captured reads no modules but those that ``Watched`` finds, none TorchScript's.

    Args:
        module: the network. name: dynamo's name of it.
    """
    from torch._dynamo.source import NNModuleSource

    context = TracingContext.try_get()
    if context is None or not all(isinstance(m.__dict__.get("_modules"), dict) for m in module.modules()):
        return False
    found = set()
    for guard in context.guards_context.dynamo_guards.inner:
        source: Any = guard.originating_source
        while source is not None:
            if isinstance(source, NNModuleSource):
                found.add(source.name)
            source = getattr(source, "base", None)
    inner = (path.split(".") if path else [] for path, _ in module.named_modules())
    return found <= {name + "".join(f"._modules[{part!r}]" for part in path) for path in inner}
