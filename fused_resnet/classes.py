"""The classes that ``fuse`` gives to modules: how they run, how they are made, undone, copied and saved.

A fused class is a subclass of the module's own class, under the same name: a forward that asks for
``type(self).__name__`` gets the answer that it got before. Making it runs no code of the user's: no
``__init_subclass__`` (``FusedModule`` is the first base, and its own ends the chain) and no ``__new__`` or ``__init__``
of a metaclass (``type.__new__`` makes the class). It does appear in ``__subclasses__()`` of its original, which Python
leaves no way around.

A fused module is saved and copied as a module of its original class, by that class's own rules, with its plans beside
the state; it becomes fused again where the state is set.
"""

from __future__ import annotations

import copyreg
import dis
import inspect
from _abc import _abc_init
from abc import ABCMeta
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from fused_resnet.backends import warn_once
from fused_resnet.freezing import CalledOtherwise
from fused_resnet.functional import in_backward
from fused_resnet.locks import Lock
from fused_resnet.modules import ChainModules, graphed, has_hooks, run_row
from fused_resnet.patterns import original
from fused_resnet.plans import Plan, at
from fused_resnet.small import is_small

_making = Lock()


class FusedModule:
    """What a fused class adds to the class it was made from.

    Attributes:
        _fr_class: the fused class itself, which classes that others derive from it are not. _fr_original: the class
            it was made from. _fr_method: what of it is overridden, _fr_plain: and the original.
        _fr_plans: of the module: its plans in eval and in train mode.
        _fr_name, _fr_frozen: of a module inside a frozen model: its name; number of a chain -> the frozen chain's path.
    """

    _fr_class: type[nn.Module]
    _fr_original: type[nn.Module]
    _fr_method: str
    _fr_plain: Callable[..., Any]
    _fr_plans: tuple[Plan, Plan]

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


# ---------------------------------------------------------------------------------------------------- rows
class FusedSequential(FusedModule, nn.Sequential):
    """A stage of a network: consecutive blocks that can run as chains run as one row of chains, as long as nobody could
    tell that they are not called themselves; everything else is called as by any nn.Sequential."""

    _fr_original = nn.Sequential
    _fr_method = "rows"
    _fr_plain = nn.Sequential.forward

    def forward(self, input: Any) -> Any:
        return run_children(self, input)


FusedSequential._fr_class = FusedSequential
FusedSequential.__name__ = FusedSequential.__qualname__ = nn.Sequential.__name__


def run_children(children: Iterable[nn.Module], x: Any) -> Any:
    """One after the other, rows of blocks as rows of chains."""
    rest = list(children)
    while rest:
        blocks = _next_row(rest, x) if _runs_chains(x) else [(rest[0], None)]
        chains = [chain for _, chain in blocks if chain is not None]
        x = run_row(chains, x) if len(chains) > 1 else blocks[0][0](x)
        rest = rest[len(blocks) :]
    return x


def _runs_chains(x: Any) -> bool:
    """Not lists of tensors, nor what torch.fx hands on, or runs for another tool's graph."""
    return isinstance(x, Tensor) and not graphed()


def rows_of(children: Iterable[nn.Module]) -> list[list[tuple[nn.Module, ChainModules | None]]]:
    """The children as they run on large images: rows of blocks with their chains, and those called alone."""
    rest, rows = list(children), []
    while rest:
        rows.append(_next_row(rest, None))
        rest = rest[len(rows[-1]) :]
    return rows


def _next_row(modules: Sequence[nn.Module], x: Any) -> list[tuple[nn.Module, ChainModules | None]]:
    """The first of them, with its chain and all that run in a row with it when it is given x; None: a large image."""
    row: list[tuple[nn.Module, ChainModules | None]] = []
    share = 1.0  # of x's values that are left where the next block begins
    for m in modules:
        plan = plan_of(m)
        if plan is not None and _is_small(m, plan, x, share):
            return row or [(m, None)]
        chain = _row_chain(m)
        # a block that comes twice finds its running statistics updated the second time
        if row and (chain is None or any(m is other for other, _ in row)):
            return row
        row.append((m, chain))
        if plan is None or chain is None:
            return row
        share *= plan.out
    return row


def _row_chain(m: nn.Module) -> ChainModules | None:
    """The chain of a block which nothing but its own forward would see called; else None."""
    plan = plan_of(m)
    whole = plan.whole if plan is not None else None
    if plan is None or whole is None or whole.units[0].conv is None or whole.max_pool is not None:
        return None
    cls: Any = type(m)
    own = cls is cls._fr_class and cls._fr_method == "forward" and cls.__call__ is nn.Module.__call__
    if not own or has_hooks(m) or "forward" in m.__dict__ or m._compiled_call_impl is not None:
        return None
    chains, reason = plan.modules(m)
    return chains[0] if reason is None else None


def plan_of(m: nn.Module) -> Plan | None:
    """What a fused module's forward does in its mode."""
    plans = m.__dict__.get("_fr_plans")
    if plans is None or not isinstance(m, FusedModule):
        return None
    evaluating, training = plans  # torch.compile of 2.11 can't index with a bool
    return training if m.training else evaluating


# ---------------------------------------------------------------------------------------------------- classes
def fused_class(cls: type[nn.Module], method: str) -> Any:
    """The subclass of ``cls`` whose ``method`` runs a plan; one per class, method and process.

    Raises:
        Exception: whatever a metaclass has against it.
    """
    with _making.held():
        for known in type.__subclasses__(cls):  # no table of ours would let a class go that nobody uses any more
            if vars(known).get("_fr_original") is cls and vars(known)["_fr_method"] == method:
                return known
        return _make_fused_class(cls, method)


def why_no_class(cls: type[nn.Module], method: str) -> str | None:
    """Why modules of ``cls`` can't be given a fused class, or None."""
    if asks_for_its_class(cls, method):
        return "its forward compares its own class with others"
    try:
        fused_class(cls, method)
    except Exception as error:  # whatever a metaclass has against it
        return f"no class can be derived from {cls.__name__}: {error}"
    return None


def set_class(m: nn.Module, cls: type[nn.Module]) -> None:
    """``m.__class__ = cls``, past a ``__setattr__`` or ``__class__`` of the class's own."""
    vars(object)["__class__"].__set__(m, cls)


def unfuse_module(m: Any) -> None:
    """Gives a fused module the class that it had."""
    set_class(m, _unfused_class(type(m)))
    m.__dict__.pop("_fr_plans", None)


def _make_fused_class(cls: Any, method: str) -> type:
    plain = getattr(cls, method)

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(self)
        frozen = self.__dict__.get("_fr_frozen")
        # a slice of an nn.Sequential is made by the class, without a plan
        if plan is None or len(args) != 1 or kwargs or not plan.fits(args[0]):
            if frozen is not None:
                raise CalledOtherwise(self._fr_name, "other arguments, or of another class or size")
            return plain(self, *args, **kwargs)
        if frozen is None and (graphed() or _is_small(self, plan, args[0])):
            return _own_forward(self, plan, args[0])
        chains, reason = ([], None) if frozen is not None else plan.modules(self)
        if reason is not None:
            if not torch.compiler.is_compiling():
                warn_once(f"a fused {cls.__name__} runs plain: {reason}")
            return plain(self, *args)
        return plan.run(self, args[0], chains if frozen is None else [at(self, p) for p in frozen], run_children)

    added = {
        **{name: _copied_by(getattr(cls, name)) for name in ("__deepcopy__", "__copy__") if hasattr(cls, name)},
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_fr_original": cls,
        "_fr_method": method,
        "_fr_plain": plain,
        method: forward,
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


def _is_small(m: nn.Module, plan: Plan, x: Any, share: float = 1.0) -> bool:
    """Whether the module had better run its own forward on ``share`` of x's values (``small.py``); never, among
    processes, with a SyncBatchNorm, whose own forward refuses a CPU."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return False
    kind = "training" if torch.is_grad_enabled() else "evaluation"
    if not is_small(x, x.numel() * share * plan.values, kind):
        return False
    among_others = dist.is_available() and dist.is_initialized()
    return not (among_others and any(type(bn) is nn.SyncBatchNorm for bn in _norms(m, plan)))


def _norms(m: nn.Module, plan: Plan) -> list[Any]:
    return [at(m, unit.bn) for chain in plan.chains for unit in chain.all_units]


def _own_forward(m: Any, plan: Plan, x: Any) -> Any:
    """What the module did before it was fused; a forward inside a backward updates no statistics, as in a chain."""
    if not (m.training and in_backward()):
        return m._fr_plain(x)
    kept = [(b, b.clone()) for bn in _norms(m, plan) for b in bn.buffers(recurse=False)]
    try:
        return m._fr_plain(x)
    finally:
        for buffer, value in kept:
            buffer.data.copy_(value)  # the backward to come has kept it, and asks for its version


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
    """What ``fuse`` and ``freeze`` keep in a module."""
    return {name: value for name, value in m.__dict__.items() if name.startswith("_fr_")}


def _fused_again(m: nn.Module, method: str, marks: dict[str, Any]) -> None:
    if not isinstance(m, FusedModule):
        set_class(m, fused_class(type(m), method))
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
    return rebuild, (m._fr_method, make, *args), (own, _marks(m)), *rest[1:]  # type: ignore[arg-type]


def rebuild(method: str, make: Callable[..., nn.Module] | None, *args: Any) -> nn.Module:
    """Unpickling and deepcopy: a module of the original class that becomes a fused one when its state is set.

    ``torch.load(weights_only=True)`` sets the state of classes that it was told of alone, and fused classes have no
    place to import them from.

    Args:
        method: that the fused class overrides. make, args: as in what the original's ``__reduce_ex__`` returned; None
            instead of ``copyreg.__newobj__``.
    """
    made: Any = args[0].__new__(*args) if make is None else make(*args)
    made.__dict__["__setstate__"] = partial(_set_state, made, method)
    return made


def _set_state(m: nn.Module, method: str, state: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    del m.__dict__["__setstate__"]
    own, marks = state
    if own:
        m.__setstate__(*own)
    for plan in marks.get("_fr_plans", ()):
        plan.check_children(m)
    _fused_again(m, method, marks)


def _copied_by(copier: Callable[..., Any]) -> Callable[..., Any]:
    """A class's own ``__deepcopy__`` or ``__copy__``, whose copies of fused modules are fused."""

    @wraps(copier)
    def copied(self: Any, *memo: Any) -> Any:
        made = copier(twin := _plain_twin(self), *memo)
        if memo:  # it knows objects by their address, which the twin's must not lose before the copying ends
            memo[0].setdefault(id(memo[0]), []).append(twin)
            memo[0][id(self)] = made
        if type(made) is type(twin) or isinstance(made, fx.GraphModule):
            _fused_again(made, self._fr_method, _marks(self))
        return made

    return copied


def _recompile(self: Any) -> Any:
    """A graph that was changed: its class gets another forward, and plans are for the one before."""
    unfuse_module(self)
    return self.recompile()
