"""Captures modules with dynamo, reports what was found in the graphs, and checks what dynamo does not guard.

``backend`` is the backend of ``torch.compile(model, backend="fused_resnet")``. A ``Front`` runs a method of a fused
module through the same backend. Each front has a code object of its own, so it has its own graphs and its own limit of
recompilations.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import count
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback, reset_code
from torch._guards import TracingContext

from fused_resnet.backends import warn_lost_speed, warn_once
from fused_resnet.base.locks import wait_before_forks
from fused_resnet.fusion import tags
from fused_resnet.fusion.choosing import Settled
from fused_resnet.fusion.inspection import calling, front_here, named_modules
from fused_resnet.fusion.lowering import lower
from fused_resnet.fusion.matches import Matches
from fused_resnet.fusion.norms import classed, numbered, set_numbers
from fused_resnet.fusion.patterns import METHODS, original
from fused_resnet.fusion.report import GraphReport, Names
from fused_resnet.fusion.sync_norm import sync_batch_norm

log = logging.getLogger("fused_resnet")
# Kept here, because code that replaces torch.compile to turn it off means the caller's own compilations.
_compile = torch.compile
# Dynamo's options while the package captures, in this thread only: dynamo guards hooks, captures a BatchNorm's
# cumulative average, does not split graphs for DDP, and runs plain what it can't capture.
_OPTIONS: dict[str, Any] = {
    "skip_nnmodule_hook_guards": False,
    "capture_scalar_outputs": True,
    "optimize_ddp": False,
    "suppress_errors": True,
    "recompile_limit": 64,
    "error_on_nested_fx_trace": False,  # torch.fx's flag is set whichever thread traces
    # Defaults that the user may have changed: parameters are inputs of the graph and have fixed sizes.
    "prepare_freezing": False,
    "install_free_tensors": False,
    "assume_static_by_default": True,
    "error_on_recompile": False,
}
# Options of Inductor that dynamo reads.
_INDUCTOR_OPTIONS: dict[str, Any] = {"freezing": False}
# PyTorch's modules look these functions up at each call; dynamo guards none of them.
_FUNCTIONS = [
    *((torch, name) for name in ("conv2d", "sigmoid", "relu", "tanh")),
    *((F, f"{name}{dims}d") for name in ("conv", "max_pool", "avg_pool") for dims in (1, 2, 3)),
    *((F, name) for name in (
        "batch_norm", "relu", "silu", "hardswish", "leaky_relu", "elu", "relu6", "hardtanh", "gelu", "mish", "softplus",
        "hardsigmoid", "selu", "celu", "pad",
    )),
]  # fmt: skip

# Hooks of a module that need no guard while they are empty: what is in these is in _forward_hooks, _forward_pre_hooks.
_IMPLIED = frozenset({"_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"})
# Nor do these where there are no gradients, because they never fire.
BACKWARD_HOOKS = frozenset({"_backward_hooks", "_backward_pre_hooks"})

# The ids of the threads that run a front.
_running: set[int] = set()


def _forget_in_child() -> None:
    """Makes a forked child capture again if other threads ran fronts at the fork.

    A thread that checks guards holds their lock. The child does not have this thread, so nobody would release the lock.
    """
    import torch._dynamo as dynamo

    if _running - {threading.get_ident()}:
        _running.intersection_update({threading.get_ident()})
        dynamo.reset_code_caches()


def others_capture() -> bool:
    """Whether a ``torch.compile`` of the user's captures the frames that this thread runs."""
    return get_eval_frame_callback() not in (None, False) and not calling()


class _NotCaptured(logging.Filter):
    """Logs one line for a front's frame that dynamo can't capture, in the place of dynamo's pages of warnings."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        if not calling() or not text.startswith("WON'T CONVERT"):
            return True
        log.info("not captured: %s", text.removeprefix("WON'T CONVERT").strip())
        return False


_QUIET = _NotCaptured()
_NUMBERS = count()  # part of code names: dynamo remembers by a code's name and place which numbers and sizes changed
# At most this many changes of a module's dictionaries are followed before its guards are checked in full.
_MAX_WATCHED = 32
# At most this many states of a module (see ``_unguarded``) are captured, each separately.
_MAX_STATES = 16


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Runs the chains of a captured graph as chains, and the rest of it by PyTorch's operators.

    Args:
        gm: a graph of torch functions. example_inputs: the graph's inputs.

    Returns:
        The function that runs instead of the graph.

    Source: the contract of ``torch.compile``'s backends.
    """
    names = Names(gm.graph, None)
    log.info("captured %s", GraphReport(lower(gm), names))
    return gm.forward


def _of_front(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """The backend of all fronts. It is one function, because dynamo keeps every backend that it has seen."""
    front: Front = front_here.get()
    return front.lowered(gm, example_inputs)


class _Runs(threading.local):
    """The number of a front's graphs that this thread ran."""

    graphs = 0


@cache
def _set_up() -> None:
    """Sets dynamo up, once in a process."""
    import torch._dynamo as dynamo

    dynamo.allow_in_graph(sync_batch_norm)
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_QUIET)
    wait_before_forks(dynamo.convert_frame.compile_lock)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_in_child)


class Front:
    """A captured method of a module.

    Args:
        module: fused or frozen. plain: the method of the module's original class. lower: puts rows into a graph; it is
            called with the graph and example inputs. unguarded: names of the modules' dictionaries of hooks for which
            an empty one needs no guard. tagged: dynamo's name of the module if its guards may be skipped by ``tags``;
            then the front keeps the module alive.

    Attributes:
        graphs: a report of each captured graph, oldest first. calls: the number of calls. without: the number of calls
            that ran no graph, because of dynamo's limit of recompilations, say.
    """

    def __init__(
        self,
        module: nn.Module,
        plain: Callable[..., Any],
        lower: Callable[[fx.GraphModule, Sequence[Any]], Matches],
        unguarded: frozenset[str] = frozenset(),
        tagged: str = "",
    ) -> None:
        import torch._dynamo as dynamo
        from torch._inductor import config as inductor_config

        _set_up()
        self.module, self.plain, self.lower = weakref.ref(module), plain, lower
        self.settled, self.unguarded = Settled(), _IMPLIED | unguarded
        self.tagged = tagged if tags.AVAILABLE else ""
        self.changeable = False  # its modules' dictionaries change all the time
        own = _OPTIONS | (tags.OPTIONS if self.tagged else {})
        configs = ((dynamo.config, own), (inductor_config, _INDUCTOR_OPTIONS))
        self.options = [(config, name, value) for config, wanted in configs for name, value in wanted.items()]
        self.graphs: list[GraphReport] = []
        self.calls = self.without = 0
        self.runs = _Runs()
        self._forget()

    def _forget(self) -> None:
        """Makes the next call capture again."""
        self.captured: dict[Any, Callable[..., Any]] = {}
        self.whole = True  # so far each call ran exactly one graph
        self.looked_up: list[tuple[Any, str, Any]] = []
        self.norms: list[nn.Module] = []
        self.watched: list[tags.Watched] = []  # as they were at the captures and since
        self.classed = 0

    def _captured(self, state: Any) -> Callable[..., Any]:
        if state not in self.captured:
            if len(self.captured) == _MAX_STATES:
                self.captured.clear()
            function = _with_own_code(self.plain)
            self.captured[state] = captured = _compile(function, backend=_of_front)
            # dynamo's table of codes keeps each code with all its captured graphs
            weakref.finalize(captured, reset_code, function.__code__).atexit = False
        return self.captured[state]

    def lowered(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The function that runs instead of a captured graph. After an error here dynamo runs the forward plain."""
        module = self.module()
        assert module is not None
        names = Names(gm.graph, module)
        try:
            report = GraphReport(self.lower(gm, example_inputs), names)
        except Exception as error:
            about = f"this {original(module).__name__} runs PyTorch's own operators, because its graph was not lowered"
            warn_once(f"fuse: {about}: {type(error).__name__}: {error}. Please report this")
            raise
        log.info("captured %s", report)
        self.graphs.append(report)
        if self.tagged and not self.changeable and tags.suits(module, self.tagged):
            self.watched.append(tags.Watched(module))
        elif self.tagged:
            torch._dynamo.config.use_recursive_dict_tags_for_guards = False  # of this capture: ``run`` resets it
        _drop_guards(self.unguarded)
        forward, runs = gm.forward, self.runs

        def counted(*args: Any) -> Any:  # a global of the module's file refers to it, so it must not refer to the front
            report.ran += 1
            runs.graphs += 1
            return forward(*args)

        return counted

    def asked(self, kind: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs through dynamo; the rows choose how they run. Warns once per kind of call that runs no chain."""
        new = kind not in self.settled.calls
        out = self.settled.asking(
            kind, lambda: self.run(module, args, kwargs), lambda: self.guards_ms(module, args, kwargs)
        )
        if new and self.settled.calls.get(kind) and not calling():
            warn_lost_speed(
                f"fuse: this {original(module).__name__} runs PyTorch's own operators on inputs of this size, "
                f"because they are faster here: print(fused_resnet.explain(model))"
            )
        return out

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the method through dynamo."""
        self.calls += 1
        if any(getattr(owner, name, None) != found for owner, name, found in self.looked_up):
            self._forget()
        held = self.watched  # what dynamo points to stays during the call, even if another thread's call forgets it
        if held and not self._watch(held, module):
            self._forget()
            held = self.watched
        if not self.captured or not self.whole or self.classed != classed[0]:
            self.norms, self.classed = numbered(module), classed[0]
        set_numbers(self.norms)
        known, ran = len(self.graphs), self.runs.graphs
        captured = self._captured(() if self.whole else _unguarded(module, args))
        outermost = not calling()
        if outermost:
            _running.add(threading.get_ident())
        found = [(config, name, getattr(config, name), value) for config, name, value in self.options]
        token, other = front_here.set(self), [option for option in found if option[2] != option[3]]
        try:
            # like dynamo.config.patch, which would make a class at each call
            for config, name, _, value in other:
                setattr(config, name, value)
            out = captured(module, *args, **kwargs)
            self.without += self.runs.graphs == ran
            if self.whole and self.runs.graphs - ran != 1:
                if list(map(id, numbered(module))) != list(map(id, self.norms)):
                    self._forget()  # a number of a norm has become one that dynamo can't trace
                else:
                    self.whole, self.captured = False, {_unguarded(module, args): captured}
            return out
        except Exception:
            self._forget()  # dynamo does not capture a frame again that raised
            raise
        finally:
            for config, name, before, _ in other if len(self.graphs) == known else found:
                setattr(config, name, before)
            front_here.reset(token)
            if outermost:
                _running.discard(threading.get_ident())
            if len(self.graphs) > known or not self.looked_up:
                self.looked_up = list(_looked_up(module))

    def _watch(self, watched: list[tags.Watched], module: nn.Module) -> bool:
        """Looks at what tags do not see. Returns whether what was captured can still be used."""
        if not watched[-1].same_modules():
            return False
        if not watched[-1].same_dicts():
            watched.append(tags.Watched(module))
            self.changeable = len(watched) > _MAX_WATCHED
        return not self.changeable

    def guards_ms(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """The milliseconds that the guards of such a call take now; 0 if they can't be timed.

        After a forward they are as far from the processor as the next call will find them.
        """
        from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

        with suppress(Exception):  # what can't be timed is no reason to raise
            function = inspect.unwrap(self._captured(() if self.whole else _unguarded(module, args)))
            given = inspect.signature(function).bind(module, *args, **kwargs)
            given.apply_defaults()
            variables = dict(given.arguments, **inspect.getclosurevars(function).nonlocals)
            guards = _debug_get_cache_entry_list(function.__code__)[0].guard_manager
            start = time.thread_time()
            if guards.check(variables):
                return (time.thread_time() - start) * 1e3
        return 0.0


def _drop_guards(hooks: frozenset[str]) -> None:
    """Drops the guards of the graph that is being captured that these dictionaries of hooks are empty."""
    context = TracingContext.try_get()
    if context is not None:
        guards = context.guards_context.dynamo_guards.inner
        for guard in list(guards):
            empty = guard.create_fn_name() == "EMPTY_NN_MODULE_HOOKS_DICT"
            if empty and getattr(guard.originating_source, "member", None) in hooks:
                guards.discard(guard)


def _unguarded(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """The state that may make dynamo give up a frame or break its graph. Dynamo does not look at such a frame again."""
    modules = [
        (m.training, id(m.__dict__.get("forward")), *m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks,
         *m._backward_pre_hooks)
        for _, m in named_modules(module)
    ]  # fmt: skip
    return (*modules, *map(type, args))


def _with_own_code(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with its own code object. PyTorch's own functions, which dynamo skips, get a wrapper."""
    from torch._dynamo import trace_rules

    if not isinstance(plain, FunctionType) or trace_rules.check(plain):

        def call(*args: Any, **kwargs: Any) -> Any:
            return plain(*args, **kwargs)

        call.__code__ = call.__code__.replace(co_name=f"call_{next(_NUMBERS)}")
        return call
    code = plain.__code__.replace(co_name=f"{plain.__name__}_{next(_NUMBERS)}")
    made = FunctionType(code, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
    made.__kwdefaults__ = plain.__kwdefaults__
    return made


def _looked_up(module: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """What a call of the module looks up in classes and in torch although dynamo assumes it to be constant."""
    for cls in {cls for _, m in named_modules(module) for cls in (type(m), original(m))}:
        for name in {*METHODS, "__call__", "_conv_forward", "_check_input_dim", *_methods(cls)}:
            with suppress(Exception):  # a metaclass may raise anything
                yield cls, name, getattr(cls, name)
    for owner, name in _FUNCTIONS:
        yield owner, name, getattr(owner, name)


def _methods(cls: type) -> Iterator[str]:
    """The names of the methods and properties that a module's class and its bases outside torch define."""
    for base in cls.__mro__:
        if not str(base.__module__).startswith("torch."):
            for name, value in vars(base).items():
                if isinstance(value, FunctionType | property | staticmethod | classmethod):
                    yield name
