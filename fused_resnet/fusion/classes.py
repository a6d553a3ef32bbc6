"""Makes, undoes, copies and saves the classes that ``fuse`` and ``freeze`` give to modules.

Such a class is a subclass of the module's own class and has the same name, so a forward that reads
``type(self).__name__`` finds the same name as before. Making the class runs no user code: no ``__init_subclass__``
(``FusedModule`` is the first base, and its own does not call the next one) and no ``__new__`` or ``__init__`` of a
metaclass (``type.__new__`` makes the class). The class does appear in ``__subclasses__()`` of its original; Python
can't prevent that.

A module of such a class is saved and copied as a module of its original class, by that class's rules. The file or copy
holds our own data beside the state. Setting the state sets the class again.
"""

from __future__ import annotations

import copyreg
import dis
import inspect
from _abc import _abc_init
from abc import ABCMeta
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any

from torch import fx, nn

from fused_resnet.base.locks import Lock
from fused_resnet.fusion.patterns import original

# Kind of class -> the function that returns the methods which the class overrides: name -> function.
KINDS: dict[str, Callable[[Any], dict[str, Any]]] = {}
# The module that puts the kinds there.
_HOME = f"{__package__}.swap"
# A norm's numbers -> the attributes that hold them as Python floats while they are captured.
NUMBERS = {"momentum": "_fr_momentum", "eps": "_fr_eps"}
# The attributes that belong to one module in one process.
_NEVER_COPIED = ("_fr_fronts", "_fr_group", "_fr_named", *NUMBERS.values())
_making = Lock()


class FusedModule:
    """The base of our classes: what they add to the original classes.

    Attributes:
        _fr_class: the class itself. A class that others derive from it inherits this, so it differs there.
            _fr_original: the class that it was made from. _fr_kind: a key of ``KINDS``; it says what is overridden.
    """

    _fr_class: type[nn.Module]
    _fr_original: type[nn.Module]
    _fr_kind: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Does not call the original's, which might register the class, require keywords, or refuse it."""

    def _get_name(self) -> str:
        """The module's name in the text of a model."""
        return f"Fused{type(self).__name__}"

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        return _reduced(self, protocol)

    def __prepare_scriptable__(self) -> Any:
        """``torch.jit.script`` calls this.

        Raises:
            TypeError: always.
        """
        raise TypeError("torch.jit.script: TorchScript can't hold chains; call fused_resnet.unfuse(model) first")


# ---------------------------------------------------------------------------------------------------- classes
def fused_class(cls: type[nn.Module], kind: str) -> Any:
    """The subclass of ``cls`` of a kind. There is one per class, kind and process.

    Raises:
        Exception: whatever a metaclass raises.
    """
    with _making.held():
        for known in type.__subclasses__(cls):  # a table of ours would keep unused classes alive
            if vars(known).get("_fr_original") is cls and vars(known)["_fr_kind"] == kind:
                return known
        return _make_fused_class(cls, kind)


def why_no_class(cls: type[nn.Module], kind: str) -> str | None:
    """The reason why modules of ``cls`` can't get a fused class, or None."""
    if asks_for_its_class(cls, "forward"):
        return "its forward compares its own class with others"
    try:
        fused_class(cls, kind)
    except Exception as error:  # a metaclass may raise anything
        return f"no class can be derived from {cls.__name__}: {error}"
    return None


def set_class(m: nn.Module, cls: type[nn.Module]) -> None:
    """Sets ``m.__class__ = cls`` without calling the class's own ``__setattr__`` or ``__class__``."""
    vars(object)["__class__"].__set__(m, cls)


def unfuse_module(m: Any) -> None:
    """Gives a fused module its original class back."""
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
    """Makes a class without calling its metaclass."""
    made: Any = type.__new__(meta, name, bases, namespace)
    if issubclass(meta, ABCMeta):
        _abc_init(made)  # otherwise it would share its original's caches of isinstance
    return made


_unfused: dict[type, type] = {}


def _unfused_class(cls: Any) -> Any:
    """``cls`` without what ``fuse`` put into it.

    This also works for a class that others derived from a fused one, as torch.distributed.fsdp.fully_shard does.
    """
    if vars(cls).get("_fr_class") is cls:
        return cls._fr_original
    if cls not in _unfused:
        bases = tuple(_unfused_class(base) if issubclass(base, FusedModule) else base for base in cls.__bases__)
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        functions = (f for f in own.values() if isinstance(f, FunctionType))
        if any("__class__" in f.__code__.co_freevars for f in functions):
            return cls  # super() in its methods refers to this class, which runs plain in a module that is not fused
        made = _make_class(type(cls), cls.__name__, (FusedModule, *bases), own)
        type.__setattr__(made, "__bases__", bases)  # set later: otherwise their __init_subclass__ would run
        _unfused[cls] = made
    return _unfused[cls]


def asks_for_its_class(cls: type[nn.Module], method: str) -> bool:
    """Whether ``method``, or a method that it names, uses ``type(self)`` or ``self.__class__`` itself.

    Reading an attribute of it (a name, a constant) does not count. A comparison with the module's original class would
    fail.
    """
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
    """A module of the original class that shares all state with ``m``; the class's own rules are applied to it."""
    cls = original(m)
    twin: Any = object.__new__(cls)
    twin.__dict__.update((name, value) for name, value in m.__dict__.items() if not name.startswith("_fr_"))
    for name in copyreg._slotnames(cls):  # type: ignore[attr-defined]
        if hasattr(m, name):
            object.__setattr__(twin, name, getattr(m, name))
    return twin


def _marks(m: nn.Module) -> dict[str, Any]:
    """The data that ``freeze`` keeps in a module."""
    return {k: value for k, value in m.__dict__.items() if k.startswith("_fr_") and k not in _NEVER_COPIED}


def _fused_again(m: nn.Module, kind: str, marks: dict[str, Any]) -> None:
    if not isinstance(m, FusedModule):
        set_class(m, fused_class(type(m), kind))
    m.__dict__.update(marks)


def _reduced(m: FusedModule, protocol: Any) -> str | tuple[Any, ...]:
    """Reduces a fused module, for pickle and copy.deepcopy, as they reduce a plain one, but to ``rebuild``."""
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
    """Makes a module of the original class when unpickling or copying. Setting its state makes it a fused one.

    ``torch.load(weights_only=True)`` sets the state only of classes that it was told of, and fused classes can't be
    imported from a module.

    Args:
        kind: the kind of the class. make, args: from the result of the original's ``__reduce_ex__``; None in the place
            of ``copyreg.__newobj__``.
    """
    if kind not in KINDS:  # the process has loaded a file before it asked for ``fuse``
        import_module(_HOME)
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
    """The class's own ``__deepcopy__`` or ``__copy__``, with copies of fused modules made fused."""

    @wraps(copier)
    def copied(self: Any, *memo: Any) -> Any:
        made = copier(twin := _plain_twin(self), *memo)
        if memo:  # the memo knows objects by address, so the twin must live until the copying ends
            memo[0].setdefault(id(memo[0]), []).append(twin)
            memo[0][id(self)] = made
        if type(made) is type(twin) or isinstance(made, fx.GraphModule):
            _fused_again(made, self._fr_kind, _marks(self))
        return made

    return copied


def _recompile(self: Any) -> Any:
    """A graph that was changed; its class gets another forward."""
    unfuse_module(self)
    return self.recompile()
