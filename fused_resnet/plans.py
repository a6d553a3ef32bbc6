"""What a fused module's forward does instead: chains of its children, and the rest of its calls as they were.

A plan holds names, never modules: what runs is read off the module each time, so that what was changed in between is
seen, and copies and pickles carry it along.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pickle import UnpicklingError
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.modules import ChainModules, UnitModules, has_hooks
from fused_resnet.patterns import ZERO_PAD, class_name
from fused_resnet.spec import Act
from fused_resnet.tracing import Guard

Path = tuple[str, ...]
_AVG_POOL, _MAX_POOL = class_name(nn.AvgPool2d), class_name(nn.MaxPool2d)
# What runs children one after the other (``run_children`` of convert.py).
Children = Callable[[Sequence[nn.Module], Any], Any]


# ---------------------------------------------------------------------------------------------------- functions by name
_NAMESPACES = {"torch": torch._C._VariableFunctions, "torch.nn.functional": F, "operator": operator}
_CONTAINERS = (Tensor, torch.Size, tuple, list, dict)


def _name_of(function: Any) -> str | None:
    """The name of a function that computes and does nothing else, of PyTorch or Python; None for all others."""
    if function is getattr:
        return "builtins.getattr"
    name = getattr(function, "__name__", "")
    if not isinstance(function, FunctionType | BuiltinFunctionType) or name.startswith("_"):
        return None
    for space, names in _NAMESPACES.items():
        own = space != "torch.nn.functional" or function.__module__ in (space, "torch._C._nn")
        if own and name not in ("from_file", "call") and getattr(names, name, None) is function:
            return f"{space}.{name}"
    return None


def _function_of(name: str, args: tuple[Any, ...]) -> Any:
    """The function that ``_name_of`` gave the name to."""
    space, _, own = name.rpartition(".")
    found = getattr if name == "builtins.getattr" else getattr(_NAMESPACES.get(space), own, None)
    if _name_of(found) != name or (found is getattr and not _reads_attribute(args)):
        raise UnpicklingError(f"function {name!r}: not one that computes and does nothing else")
    return found


def _reads_attribute(args: tuple[Any, ...]) -> bool:
    """Of ``getattr``: a public attribute of a value."""
    return len(args) == 2 and isinstance(args[1], str) and not args[1].startswith("_")


def _is_safe_method(name: Any) -> bool:
    return isinstance(name, str) and not name.startswith("_") and any(hasattr(cls, name) for cls in _CONTAINERS)


@dataclass(frozen=True)
class Ref:
    """The value of an earlier step, or of the input."""

    name: str


def at(m: nn.Module, path: Path) -> Any:
    """The child, or attribute, at a path.

    Raises:
        AttributeError: there is none.
    """
    return reduce(getattr, path, m)


@dataclass(frozen=True)
class UnitPaths:
    """Where the modules of a unit are; an activation that is a function stands for itself."""

    conv: Path | None
    bn: Path
    act: Path | Act | None = None

    def modules(self, m: nn.Module) -> UnitModules:
        conv = at(m, self.conv) if self.conv is not None else None
        return UnitModules(conv, at(m, self.bn), at(m, self.act) if isinstance(self.act, tuple) else self.act)

    @property
    def paths(self) -> list[Path]:
        return [p for p in (self.conv, self.bn, self.act) if isinstance(p, tuple)]


@dataclass(frozen=True)
class ChainPaths:
    """Where the modules of a chain are.

    Attributes:
        shortcut: the projection; "identity"; "pad" and where the padding module is; "tensor": what the step is given.
    """

    units: tuple[UnitPaths, ...]
    shortcut: UnitPaths | str | None = None
    pad: Path | None = None
    avg_pool: Path | None = None
    max_pool: Path | None = None

    def modules(self, m: nn.Module) -> ChainModules:
        """The modules as they are now (raises AttributeError where one is missing)."""
        shortcut = self.shortcut.modules(m) if isinstance(self.shortcut, UnitPaths) else self.shortcut
        return ChainModules(
            [u.modules(m) for u in self.units],
            None if shortcut == "tensor" else shortcut,
            at(m, self.pad).stride if self.pad is not None else 1,
            at(m, self.avg_pool) if self.avg_pool is not None else None,
            at(m, self.max_pool) if self.max_pool is not None else None,
        )

    def checked(self, m: nn.Module) -> tuple[ChainModules | None, str | None]:
        """``modules``, and why they can't run, or None."""
        for path, expected in ((self.pad, ZERO_PAD), (self.avg_pool, _AVG_POOL), (self.max_pool, _MAX_POOL)):
            if path is None:
                continue
            layer, cls = at(m, path), expected.rpartition(".")[2]
            if class_name(type(layer)) != expected:
                return None, f"{type(layer).__name__} in the place of {cls}"
            if has_hooks(layer) or "forward" in layer.__dict__:
                return None, f"a {cls} has hooks, or a forward of its own"
        chain = self.modules(m)
        return chain, chain.why_not()

    @property
    def all_units(self) -> list[UnitPaths]:
        return [*self.units, *([self.shortcut] if isinstance(self.shortcut, UnitPaths) else [])]

    @property
    def paths(self) -> list[Path]:
        """All modules' of the chain."""
        own = [p for p in (self.pad, self.avg_pool, self.max_pool) if p is not None]
        return [p for u in self.all_units for p in u.paths] + own

    @property
    def owners(self) -> set[Path]:
        """Of the modules that these are in, but for the one whose forward it is."""
        return {p[:n] for p in self.paths for n in range(1, len(p))} - set(self.paths)


@dataclass(frozen=True)
class Step:
    """One call, whose result is ``name`` for the steps behind it.

    Attributes:
        kind: "chain" (target: its number), "children" (paths, called one after the other), "function", "method",
            "attribute" (a path).
        args, kwargs: with a ``Ref`` for each value. dead: the values that no later step uses.
    """

    name: str
    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    dead: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """With names of functions that are safe to call: torch.load(weights_only=True) must be told of no others."""
        state = dict(self.__dict__)
        if self.kind == "method" and not _is_safe_method(self.target):
            state["target"] = operator.methodcaller(self.target)
        elif self.kind == "function" and (self.target is not getattr or _reads_attribute(self.args)):
            state["target"] = _name_of(self.target) or self.target
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raises pickle.UnpicklingError for what ``__getstate__`` would not have written."""
        kind, target, args = state["kind"], state["target"], state["args"]
        if kind == "function" and isinstance(target, str):
            state = state | {"target": _function_of(target, args)}
        elif kind == "method" and isinstance(target, operator.methodcaller):
            state = state | {"target": target.__reduce__()[1][0]}
        elif kind == "method" and not _is_safe_method(target):
            raise UnpicklingError(f"method {target!r}: not one of a tensor or container")
        elif kind in ("attribute", "children"):
            for path in [target] if kind == "attribute" else target:
                if any(name.startswith("__") for name in path):
                    raise UnpicklingError(f"{kind}: {'.'.join(path)} is no child")
        self.__dict__.update(state)


@dataclass(frozen=True)
class Plan:
    """A forward with chains in it.

    Attributes:
        guards: of the module itself and of those whose forwards are part of it. passed: nn.Identity's that are skipped.
        modal: it holds in one mode, train or eval, alone.
        left: what of norms and adds the chains don't take, one sentence each.
    """

    takes: type
    input: str
    steps: tuple[Step, ...]
    output: Any
    chains: tuple[ChainPaths, ...]
    guards: tuple[Guard, ...]
    passed: tuple[Path, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    modal: bool = False
    left: tuple[str, ...] = ()

    @property
    def whole(self) -> ChainPaths | None:
        """The chain that is all there is, from the input to the output."""
        if len(self.steps) != 1 or self.sizes or self.takes is not Tensor:
            return None
        (step,) = self.steps
        alone = step.kind == "chain" and step.args == (Ref(self.input),) and self.output == Ref(step.name)
        return self.chains[step.target] if alone else None

    def modules(self, m: nn.Module) -> tuple[list[ChainModules], str | None]:
        """The chains as they are now, and why they can't run, or None."""
        try:
            if reason := self._changed(m):
                return [], reason
            checked = [chain.checked(m) for chain in self.chains]
        except AttributeError as missing:
            return [], str(missing)
        return [c for c, _ in checked if c is not None], next((why for _, why in checked if why), None)

    def _changed(self, m: nn.Module) -> str | None:
        for guard in self.guards:
            child = at(m, guard.path)
            if reason := guard.broken(child):
                return f"{reason}; call fuse again"
            if guard.path and (has_hooks(child) or "forward" in child.__dict__):
                return f"a {guard.cls.__name__} has hooks, or a forward of its own"
            if self.modal and child.training is not m.training:
                return f"a {guard.cls.__name__} is in another mode"
        for path in self.passed:
            child = at(m, path)
            if type(child) is not nn.Identity or has_hooks(child) or "forward" in child.__dict__:
                return f"{'.'.join(path)!r} is no plain Identity any more"
        return None

    def check_children(self, m: nn.Module) -> None:
        """Of a plan that comes from a file: what it calls of ``m`` must be modules.

        Raises:
            pickle.UnpicklingError: it is something else.
        """
        for step in self.steps:
            for path in step.target if step.kind == "children" else ():
                called: Any = m
                for name in path:
                    called = getattr(called, name, None)
                if called is not None and not isinstance(called, nn.Module):
                    raise UnpicklingError(f"children: {'.'.join(path)} is a {type(called).__name__}, no module")

    def fits(self, x: Any) -> bool:
        """Whether the input is of the class and the sizes that the forward was traced for."""
        sizes = x.shape if self.sizes and isinstance(x, Tensor) else ()
        return isinstance(x, self.takes) and all(sizes[d] == size for d, size in self.sizes)

    def run(self, m: nn.Module, x: Any, chains: Sequence[Callable[..., Tensor]], children: Children) -> Any:
        """The forward; ``chains`` as ``modules`` returned them, or what does the same."""
        values = {self.input: x}
        for step in self.steps:
            args = _filled(step.args, values)
            if step.kind == "chain":
                value: Any = chains[step.target](*args)
            elif step.kind == "children":
                called = [at(m, path) for path in step.target]
                if step.kwargs or len(args) != 1:
                    value = called[0](*args, **_filled(step.kwargs or {}, values))
                else:
                    value = children(called, *args)
            elif step.kind == "attribute":
                value = at(m, step.target)
            else:
                call = step.target if step.kind == "function" else getattr(args[0], step.target)
                value = call(*args[step.kind == "method" :], **_filled(step.kwargs or {}, values))
            del args
            values[step.name] = value
            del value
            for name in step.dead:
                del values[name]
        return _filled(self.output, values)


def _filled(arguments: Any, values: dict[str, Any]) -> Any:
    """``arguments`` with values in the place of their names."""
    if isinstance(arguments, Ref):
        return values[arguments.name]
    if isinstance(arguments, tuple):
        filled = [_filled(a, values) for a in arguments]
        return type(arguments)(*filled) if hasattr(arguments, "_fields") else tuple(filled)
    if isinstance(arguments, list):
        return [_filled(a, values) for a in arguments]
    if isinstance(arguments, dict):
        return {k: _filled(v, values) for k, v in arguments.items()}
    if isinstance(arguments, slice):
        return slice(*(_filled(a, values) for a in (arguments.start, arguments.stop, arguments.step)))
    return arguments
