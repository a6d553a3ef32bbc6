"""What a module's forward does to its input: torch.fx on one module at a time, and what makes such a trace wrong.

A trace holds for every input as long as the module stays what it was: its class, its children's names, its plain
attributes (``Guard``), the sizes that its forward compared with constants (``Trace.sizes``). What a trace can't show
is refused: random numbers that the forward draws itself, attributes that it sets, values that it keeps elsewhere, modes
that it enters (``torch.no_grad``, autocast, a checkpoint), branches on values, on classes or on whether gradients are
wanted.
"""

from __future__ import annotations

import operator
import pickle
import random
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from fused_resnet.patterns import calls_itself, original

_PLAIN = (bool, int, float, str, type(None))
_NO_INPUT = Parameter("none", Parameter.KEYWORD_ONLY)
# What nn.Module itself keeps in a module.
_OWN = frozenset(nn.Module().__dict__)


class CannotTrace(Exception):
    """A forward whose trace would not be the whole truth; the message is the reason."""


@dataclass(frozen=True)
class Guard:
    """A module as it was traced: a forward may depend on these, and its trace holds as long as they stay."""

    path: tuple[str, ...]
    cls: type[nn.Module]
    children: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(path: tuple[str, ...], m: nn.Module) -> Guard:
        attributes = {k: v for k, v in m.__dict__.items() if k not in _OWN and not k.startswith("_fr_") and _plain(v)}
        absent = {k: None for k, v in m._modules.items() if v is None}
        return Guard(path, original(m), tuple(m._modules), tuple((attributes | absent).items()))

    def broken(self, m: nn.Module) -> str | None:
        """What is different now, or None."""
        if original(m) is not self.cls:
            return f"a {self.cls.__name__} became a {original(m).__name__}"
        if tuple(m._modules) != self.children:
            return f"a {self.cls.__name__} has other children"
        for name, value in self.attributes:
            if getattr(m, name, None) != value:
                return f"{name!r} of a {self.cls.__name__} changed"
        return None


@dataclass(frozen=True)
class Trace:
    """A forward as calls of its children and of functions.

    Attributes:
        graph: one placeholder; ``meta["within"]`` of a node is the path of the inlined module that made it.
        takes: the class of the input, Tensor or list.
        inlined: paths of the modules that were traced through, with the module's own, "".
        sizes: (dimension, size) that the input must have.
        calls: what the graph says, to compare (``same``).
    """

    graph: fx.Graph
    takes: type
    inlined: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    calls: list[tuple[Any, ...]]

    def same(self, other: Trace) -> bool:
        """The same calls in the same order, of the same input."""
        return (self.takes, self.sizes, self.calls) == (other.takes, other.sizes, other.calls)


def parts(path: str) -> tuple[str, ...]:
    """A module's path in steps; none for the module itself."""
    return tuple(path.split(".")) if path else ()


def trace(m: nn.Module, method: str, inline: Iterable[str], training: bool, grad: bool) -> Trace:
    """The trace of ``m.method`` in a mode, with the children at the paths ``inline`` traced through.

    Raises:
        CannotTrace: there is none that would hold.
    """
    inlined = tuple(sorted({"", *inline}))
    try:
        return _trace(m, method, inlined, Tensor, training, grad)
    except _AsksType:
        return _trace(m, method, inlined, list, training, grad)


def _trace(m: nn.Module, method: str, inlined: tuple[str, ...], takes: type, training: bool, grad: bool) -> Trace:
    _check_signature(m, method)
    tracer = _Tracer(frozenset(inlined), takes, method)
    with torch.set_grad_enabled(grad), _unchanged(m, inlined, training), _no_contexts():
        tracer.modes = _modes()
        try:
            graph = tracer.trace(m)
        except CannotTrace:
            raise
        except Exception as error:  # whatever a forward does when it is handed no tensor
            told = str(error).strip().splitlines()
            raise CannotTrace(f"its forward can't be traced: {told[0] if told else type(error).__name__}") from error
    # parameters' stay in fx's own cache
    if any(value.node.op != "get_attr" for ref in tracer.values if (value := ref()) is not None):
        raise CannotTrace("its forward keeps a value beyond its call")
    _forget_shapes(graph)
    for node in graph.nodes:
        if node.op == "call_function" and not _importable(node.target):
            raise CannotTrace(f"its forward calls {node.target}, which has no name to import it by")
    return Trace(graph, takes, inlined, tuple(tracer.sizes), [_key(node) for node in graph.nodes])


def _check_signature(m: nn.Module, method: str) -> None:
    """One input by position; arguments behind it keep their defaults."""
    first, *others = list(signature(getattr(original(m), method)).parameters.values())[1:] or [_NO_INPUT]
    if first.kind not in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.POSITIONAL_ONLY):
        raise CannotTrace("its forward takes no input by position")
    if any(p.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) for p in others):
        raise CannotTrace("its forward takes any number of arguments")
    if any(p.default is Parameter.empty for p in others):
        raise CannotTrace("its forward takes several inputs")


# ---------------------------------------------------------------------------------------------------- the tracer
class _AsksType(CannotTrace):
    """A forward that tests the class of its input."""


class _Value(fx.Proxy):
    """A value of unknown class: whoever asks for it outside torch would get the wrong answer."""

    tracer: _Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asks = sys._getframe(1).f_globals.get("__name__", "")
        if asks.partition(".")[0] in ("torch", __package__):
            return _Value
        if self.node.op == "placeholder" and self.tracer.takes is list:
            return list
        raise _AsksType("its forward tests the class of a value")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise CannotTrace(f"its forward sets {name!r} of a value")
        super().__setattr__(name, value)


def _in_place(name: str) -> Any:
    function = getattr(operator, name)

    def record(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


# fx takes x += y for x = x + y, which the tensor's other holders would not notice.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Value, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # a forward that updates a buffer is replayed, not run

    def __init__(self, inlined: frozenset[str], takes: type, method: str) -> None:
        super().__init__()
        self.inlined, self.takes = inlined, takes
        self.within = [""]
        self.calls: Counter[str] = Counter()
        self.sizes: list[tuple[int, int]] = []
        self.values: list[weakref.ref[fx.Proxy]] = []
        self.modes: tuple[Any, ...] = ()
        self.traced_func_name = method

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        if hasattr(type(root), "_fr_plain"):
            self.traced_func_name = "_fr_plain"
        return super().trace(root, concrete_args)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.inlined

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if calls_itself(m):
            raise CannotTrace(f"the class {type(m).__name__} of {path!r} overrides __call__")
        self.calls[path] += 1
        if path not in self.inlined:
            return super().call_module(m, forward, args, kwargs)
        if self.calls[path] > 1:
            raise CannotTrace(f"its forward calls {path!r} twice")
        self.within.append(path)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.within.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self.modes != _modes():
            raise CannotTrace("its forward switches gradients or autocast on or off")
        node = super().create_node(*args, **kwargs)
        node.meta["within"] = self.within[-1]
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = _Value(node, self)
        self.values.append(weakref.ref(value))
        return value

    def create_arg(self, a: Any) -> Any:
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A size compared with a constant: assumed to be as expected, and checked at every call."""
        node = obj.node
        equal = {operator.eq: True, operator.ne: False}.get(node.target)  # type: ignore[arg-type]
        if equal is not None and len(node.args) == 2 and isinstance(node.args[1], int):
            dimension = _dimension(node.args[0])
            if dimension is not None:
                self.sizes.append((dimension, node.args[1]))
                return equal
        return super().to_bool(obj)


def _dimension(node: Any) -> int | None:
    """d of a node that is x.shape[d] or x.size(d), x the input."""
    if not isinstance(node, fx.Node) or len(node.args) != 2 or type(node.args[1]) is not int:
        return None
    x: Any = node.args[0]
    if node.op == "call_function" and node.target is operator.getitem and _is_shape(x):
        x = x.args[0]
    elif node.op != "call_method" or node.target != "size":
        return None
    return node.args[1] if isinstance(x, fx.Node) and x.op == "placeholder" else None


def _is_shape(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is getattr and node.args[1:] == ("shape",)


def _forget_shapes(graph: fx.Graph) -> None:
    """Drops what nobody uses of those comparisons."""
    for node in reversed(list(graph.nodes)):
        pure = node.target in (operator.eq, operator.ne, operator.getitem) or _is_shape(node) or node.target == "size"
        if pure and not node.users:
            graph.erase_node(node)


# ---------------------------------------------------------------------------------------------------- what would lie
def _modes() -> tuple[Any, ...]:
    """What a graph does not tell of how a call runs."""
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


@contextmanager
def _no_contexts() -> Iterator[None]:
    """Refuses autocast, also for devices that this machine has not, and hooks on what is saved, as checkpoints set."""

    with ExitStack() as stack:
        for cls in (torch.autocast, torch.autograd.graph.saved_tensors_hooks):
            refuse = mock.Mock(side_effect=CannotTrace(f"its forward enters {cls.__name__}"))
            stack.enter_context(mock.patch.object(cls, "__enter__", refuse))
        yield


@contextmanager
def _unchanged(root: nn.Module, inlined: tuple[str, ...], training: bool) -> Iterator[None]:
    """Traces in a mode. Refuses a forward that draws random numbers or sets attributes of modules, and undoes that."""
    original = [(m, dict(m.__dict__)) for m in root.modules()]
    for path in inlined:
        root.get_submodule(path).__dict__["training"] = training
    before = [(m, dict(m.__dict__), {k: _copied(v) for k, v in m.__dict__.items()}) for m, _ in original]
    drawn = _random_states()
    changed = None
    try:
        yield
    finally:
        for m, attributes, copies in before:
            for name in m.__dict__.keys() | attributes.keys():
                same = name in m.__dict__ and name in attributes and m.__dict__[name] is attributes[name]
                if not (same and _items(attributes[name]) == _items(copies[name])):
                    changed = changed or name
                    if name in attributes and isinstance(attributes[name], list | dict | set):
                        _restore(attributes[name], copies[name])
        for m, attributes in original:
            m.__dict__.clear()
            m.__dict__.update(attributes)
    if changed is not None:
        raise CannotTrace(f"its forward sets {changed!r}")
    if not _same_states(drawn, _random_states()):
        raise CannotTrace("its forward draws random numbers")


def _copied(value: Any) -> Any:
    return type(value)(value) if type(value) in (list, dict, set) else value


def _items(value: Any) -> Any:
    """What a container holds, by identity."""
    if isinstance(value, dict):
        return [(k, id(v)) for k, v in value.items()]
    return list(map(id, value)) if isinstance(value, list | set) else id(value)


def _restore(value: Any, copied: Any) -> None:
    value.clear()
    value.extend(copied) if isinstance(value, list) else value.update(copied)


def _random_states() -> list[Any]:
    """Of the generators that a forward may use."""
    numpy = sys.modules.get("numpy")
    states: list[Any] = [random.getstate(), torch.get_rng_state()]
    return states + ([*numpy.random.get_state()] if numpy is not None else [])


def _same_states(before: list[Any], after: list[Any]) -> bool:
    """Generators' states hold tensors and arrays, which have no one answer to ==."""
    return all(bool((a == b).all()) if hasattr(a, "all") else a == b for a, b in zip(before, after, strict=True))


def _plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value))


def _importable(function: Any) -> bool:
    """A copy of the model, on this machine or another, finds the same function."""
    try:
        return pickle.loads(pickle.dumps(function)) is function
    except Exception:  # whatever a class's own pickling raises: what can't travel is refused by name above
        return False


def _key(node: fx.Node) -> tuple[Any, ...]:
    name = lambda n: n.name  # noqa: E731
    return node.op, node.name, node.target, fx.map_arg(node.args, name), fx.map_arg(node.kwargs, name)
