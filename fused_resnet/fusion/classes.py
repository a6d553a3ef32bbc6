"""The classes that ``fuse`` and ``freeze`` give to modules: how they are made, undone, copied and saved.

Such a class is a subclass of the module's own class, under the same name: a forward that asks for
``type(self).__name__`` gets the answer that it got before. Making it runs no code of the user's: no
``__init_subclass__`` (``FusedModule`` is the first base, and its own ends the chain) and no ``__new__`` or ``__init__``
of a metaclass (``type.__new__`` makes the class). It does appear in ``__subclasses__()`` of its original, which Python
leaves no way around.

A module of such a class is saved and copied as a module of its original class, by that class's own rules, with what we
keep in it beside the state; it gets its class again where the state is set.
"""

from __future__ import annotations

import copyreg
import dis
import inspect
from _abc import _abc_init
from abc import ABCMeta
from collections.abc import Callable
from functools import partial, wraps
from types import CodeType, FunctionType
from typing import Any

from torch import fx, nn

from fused_resnet.base.locks import Lock
from fused_resnet.fusion.patterns import original

# Kind of class -> what it overrides of the class that it is made from: name -> function.
KINDS: dict[str, Callable[[Any], dict[str, Any]]] = {}
# What belongs to one module in one process.
_NEVER_COPIED = ("_fr_fronts", "_fr_group", "_fr_named")
_making = Lock()


class FusedModule:
    """What our classes add to those that they are made from.

    Attributes:
        _fr_class: the class itself, which classes that others derive from it are not. _fr_original: the class that it
            was made from. _fr_kind: what of it is overridden, a key of ``KINDS``.
    """

    _fr_class: type[nn.Module]
    _fr_original: type[nn.Module]
    _fr_kind: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Ends here: the original's would register the class, ask for keywords, or refuse it."""

    def _get_name(self) -> str:
        """Of the module in the text of a model."""
        return f"Fused{type(self).__name__}"

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        return _reduced(self, protocol)

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` asks for.

        Raises:
            TypeError: always.
        """
        raise TypeError("torch.jit.script: TorchScript can't hold chains; fused_resnet.unfuse(model), then script it")


# ---------------------------------------------------------------------------------------------------- classes
def fused_class(cls: type[nn.Module], kind: str) -> Any:
    """The subclass of ``cls`` of a kind; one per class, kind and process.

    Raises:
        Exception: whatever a metaclass has against it.
    """
    with _making.held():
        for known in type.__subclasses__(cls):  # no table of ours would let a class go that nobody uses any more
            if vars(known).get("_fr_original") is cls and vars(known)["_fr_kind"] == kind:
                return known
        return _make_fused_class(cls, kind)


def why_no_class(cls: type[nn.Module], kind: str) -> str | None:
    """Why modules of ``cls`` can't be given a fused class, or None."""
    if asks_for_its_class(cls, "forward"):
        return "its forward compares its own class with others"
    try:
        fused_class(cls, kind)
    except Exception as error:  # whatever a metaclass has against it
        return f"no class can be derived from {cls.__name__}: {error}"
    return None


def set_class(m: nn.Module, cls: type[nn.Module]) -> None:
    """``m.__class__ = cls``, past a ``__setattr__`` or ``__class__`` of the class's own."""
    vars(object)["__class__"].__set__(m, cls)


def unfuse_module(m: Any) -> None:
    """Gives a fused module the class that it had."""
    set_class(m, _unfused_class(type(m)))
    for name in [name for name in m.__dict__ if name.startswith("_fr_")]:
        del m.__dict__[name]


def _make_fused_class(cls: Any, kind: str) -> type:
    added = {
        **{name: _copied_by(getattr(cls, name)) for name in ("__deepcopy__", "__copy__") if hasattr(cls, name)},
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_fr_original": cls,
        "_fr_kind": kind,
        **KINDS[kind](cls),
    }
    if issubclass(cls, fx.GraphModule):
        added["recompile"] = _recompile
    made = _make_class(type(cls), cls.__name__, (FusedModule, cls), added)
    type.__setattr__(made, "_fr_class", made)
    return made


def _make_class(meta: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
    """A class without a call of its metaclass."""
    made: Any = type.__new__(meta, name, bases, namespace)
    if issubclass(meta, ABCMeta):
        _abc_init(made)  # or it would share its original's caches of isinstance
    return made


_unfused: dict[type, type] = {}


def _unfused_class(cls: Any) -> Any:
    """``cls`` without what ``fuse`` put into it, also where others derived a class from the fused one since, as
    torch.distributed.fsdp.fully_shard does."""
    if vars(cls).get("_fr_class") is cls:
        return cls._fr_original
    if cls not in _unfused:
        bases = tuple(_unfused_class(base) if issubclass(base, FusedModule) else base for base in cls.__bases__)
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        functions = (f for f in own.values() if isinstance(f, FunctionType))
        if any("__class__" in f.__code__.co_freevars for f in functions):
            return cls  # super() in them means this very class, which without plans runs plain
        made = _make_class(type(cls), cls.__name__, (FusedModule, *bases), own)
        type.__setattr__(made, "__bases__", bases)  # with them from the start their __init_subclass__ would be called
        _unfused[cls] = made
    return _unfused[cls]


def asks_for_its_class(cls: type[nn.Module], method: str) -> bool:
    """Whether ``method``, or another of the class that it names, takes ``type(self)`` or ``self.__class__`` for more
    than an attribute (a name, a constant): a comparison with the class that the module had would fail."""
    seen: set[str] = set()
    rest = [method]
    while rest:
        name = rest.pop()
        if name in seen:
            continue
        seen.add(name)
        found = [inspect.unwrap(f) for base in cls.__mro__ if isinstance(f := vars(base).get(name), FunctionType)]
        for function in (f for f in found if isinstance(f, FunctionType)):
            if (function.__module__ or "").partition(".")[0] == "torch":
                continue
            if _takes_its_class(function.__code__):
                return True
            rest += function.__code__.co_names
    return False


def _takes_its_class(code: CodeType) -> bool:
    if not code.co_argcount or not {"type", "__class__"}.intersection(code.co_names):
        return False
    skipped = ("CACHE", "PRECALL", "PUSH_NULL", "RESUME", "NOP")
    steps = [(i.opname, i.argval) for i in dis.get_instructions(code) if i.opname not in skipped]
    this = code.co_varnames[0]
    for before, (load, name), (operation, argument), (after, _) in zip(
        [("", None), *steps], steps, steps[1:], [*steps[2:], ("", None)], strict=False
    ):
        if not load.startswith("LOAD_") or name != this:
            continue
        of_type = before[0].startswith("LOAD_GLOBAL") and before[1] == "type" and operation.startswith("CALL")
        of_attribute = operation.startswith("LOAD_ATTR") and argument == "__class__"
        if (of_type or of_attribute) and not after.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            return True
    return False


# ---------------------------------------------------------------------------------------------------- copies and files
def _plain_twin(m: Any) -> Any:
    """A module of the original class that shares everything with ``m``, for the class's own rules to look at."""
    cls = original(m)
    twin: Any = object.__new__(cls)
    twin.__dict__.update((name, value) for name, value in m.__dict__.items() if not name.startswith("_fr_"))
    for name in copyreg._slotnames(cls):  # type: ignore[attr-defined]
        if hasattr(m, name):
            object.__setattr__(twin, name, getattr(m, name))
    return twin


def _marks(m: nn.Module) -> dict[str, Any]:
    """What ``freeze`` keeps in a module."""
    return {k: value for k, value in m.__dict__.items() if k.startswith("_fr_") and k not in _NEVER_COPIED}


def _fused_again(m: nn.Module, kind: str, marks: dict[str, Any]) -> None:
    if not isinstance(m, FusedModule):
        set_class(m, fused_class(type(m), kind))
    m.__dict__.update(marks)


def _reduced(m: FusedModule, protocol: Any) -> str | tuple[Any, ...]:
    """What pickle and copy.deepcopy make of a fused module: what they make of a plain one, by way of ``rebuild``."""
    twin = _plain_twin(m)
    registered = copyreg.dispatch_table.get(type(twin))
    plain = registered(twin) if registered is not None else twin.__reduce_ex__(protocol)
    if isinstance(plain, str):
        return plain
    make, args, *rest = plain
    make = None if make is copyreg.__newobj__ else make  # type: ignore[attr-defined]
    own = () if not rest or rest[0] is None else (rest[0],)
    return rebuild, (m._fr_kind, make, *args), (own, _marks(m)), *rest[1:]  # type: ignore[arg-type]


def rebuild(kind: str, make: Callable[..., nn.Module] | None, *args: Any) -> nn.Module:
    """Unpickling and deepcopy: a module of the original class that becomes a fused one when its state is set.

    ``torch.load(weights_only=True)`` sets the state of classes that it was told of alone, and fused classes have no
    place to import them from.

    Args:
        kind: of the class. make, args: as in what the original's ``__reduce_ex__`` returned; None
            instead of ``copyreg.__newobj__``.
    """
    made: Any = args[0].__new__(*args) if make is None else make(*args)
    made.__dict__["__setstate__"] = partial(_set_state, made, kind)
    return made


def _set_state(m: nn.Module, kind: str, state: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    del m.__dict__["__setstate__"]
    own, marks = state
    if own:
        m.__setstate__(*own)
    _fused_again(m, kind, marks)


def _copied_by(copier: Callable[..., Any]) -> Callable[..., Any]:
    """A class's own ``__deepcopy__`` or ``__copy__``, whose copies of fused modules are fused."""

    @wraps(copier)
    def copied(self: Any, *memo: Any) -> Any:
        made = copier(twin := _plain_twin(self), *memo)
        if memo:  # it knows objects by their address, which the twin's must not lose before the copying ends
            memo[0].setdefault(id(memo[0]), []).append(twin)
            memo[0][id(self)] = made
        if type(made) is type(twin) or isinstance(made, fx.GraphModule):
            _fused_again(made, self._fr_kind, _marks(self))
        return made

    return copied


def _recompile(self: Any) -> Any:
    """A graph that was changed: its class gets another forward."""
    unfuse_module(self)
    return self.recompile()
