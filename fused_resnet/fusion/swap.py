"""fuse and unfuse. A fused module's forward runs through dynamo with the backend of this package."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as nn_module
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fused_resnet.backends import warn_once
from fused_resnet.chain.operators import transformed
from fused_resnet.fusion.choosing import comes_again, kind_of_call, thread
from fused_resnet.fusion.classes import KINDS, FusedModule, fused_class, set_class, unfuse_module, why_no_class
from fused_resnet.fusion.front import Front, others_capture
from fused_resnet.fusion.inductor import announce
from fused_resnet.fusion.inspection import graphed, named_modules
from fused_resnet.fusion.lowering import lower
from fused_resnet.fusion.norms import name_groups
from fused_resnet.fusion.patterns import METHODS, calls_itself, looks_like_norm


def _fused_methods(cls: Any) -> dict[str, Any]:
    return {name: _fused_method(cls, name) for name in METHODS if hasattr(cls, name)}


def _fused_method(cls: Any, name: str) -> Callable[..., Any]:
    """The method ``name`` of a fused class. Each gets its own code object, because dynamo keeps its data per code."""

    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(cls, name)(self, *args, **kwargs)  # looked up at each call: it may be replaced at any time

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            announce()
            return plain(self, *args, **kwargs)
        method = getattr(cls, name)
        if thread.inside and not comes_again():  # asked by each module inside, so no function more than is needed
            return method(self, *args, **kwargs)
        kind = kind_of_call(self, args, kwargs)
        front = self.__dict__.get("_fr_fronts", _NO_FRONTS).get(method)
        if front is not None and front.settled.runs_plain(kind):
            return front.settled.plainly(method, self, *args, **kwargs)
        # a slice of an nn.Sequential is made by its class and lacks the mark
        if graphed() or "_fr_fused" not in self.__dict__ or others_capture() or plain_here(args, kwargs):
            return plain(self, *args, **kwargs)
        return _captured(self, method, kind, args, kwargs)

    plain.__code__ = plain.__code__.replace()
    forward.__code__ = forward.__code__.replace()
    _never_first(forward)
    return wraps(getattr(cls, name))(forward)


def _never_first(function: Any, below: _FrameAction = _FrameAction.DEFAULT) -> None:
    """Lets dynamo take calls of ``function`` into graphs, but begin no graph at it.

    If a capture breaks off before such a call, a fused module is then captured on its own, and a torch.compile of the
    user's begins at the plain method.

    Args:
        below: whether dynamo may begin a graph in a function that ``function`` calls.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, below))


_NO_FRONTS: dict[Any, Front] = {}


def _captured(self: Any, plain: Callable[..., Any], kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    fronts = self.__dict__.setdefault("_fr_fronts", {})  # shared by all threads
    front = fronts.get(plain) or fronts.setdefault(plain, Front(self, plain, lambda gm, _: lower(gm)))
    if dist.is_available() and (dist.is_initialized() or "_fr_named" in self.__dict__):
        name_groups(self)
    return front.asked(kind, self, args, kwargs)


def plain_here(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a tool traces, counts or fakes the call: it must see the plain module."""
    return _watched() or nn_module._has_any_global_hook() or transformed() or _has_proxy(args) or _has_proxy(kwargs)


def _watched() -> bool:
    """Whether a dispatch mode watches every operator.

    The modes of selective checkpoints do not count: they declare that they ignore a compiler's internals.
    """
    if not torch._C._len_torch_dispatch_stack():
        return False
    return not all(mode.ignore_compile_internals() for mode in _get_current_dispatch_mode_stack())


_never_first(others_capture)
for function in (graphed, comes_again, kind_of_call, plain_here, _captured):
    _never_first(function, _FrameAction.SKIP)


def _has_proxy(value: Any) -> bool:
    """Whether torch.fx traces the call."""
    if isinstance(value, list | tuple):
        return any(map(_has_proxy, value))
    return isinstance(value, fx.Proxy) or (isinstance(value, dict) and any(map(_has_proxy, value.values())))


KINDS["fused"] = _fused_methods


def why_not_fused(m: nn.Module) -> str | None:
    """The reason why a module's own forward can't be captured, or None."""
    try:
        return _why_not_fused(m)
    except Exception as error:  # a module's class and properties may raise anything when they are read
        return f"it can't be inspected: {type(error).__name__}: {error}"


def _why_not_fused(m: nn.Module) -> str | None:
    if isinstance(m, FusedModule):
        return None
    tensors = [t for _, child in named_modules(m) for t in (*child._parameters.values(), *child._buffers.values())]
    if any(t is not None and is_lazy(t) for t in tensors):
        return "its parameters are lazy and have no shapes yet"
    if isinstance(m, torch.jit.ScriptModule):
        return "TorchScript compiled it"
    if type(m).forward is nn.Module.forward:
        return "a container without a forward"
    if "forward" in m.__dict__:
        return "its forward was replaced"
    if calls_itself(m):
        return "its class overrides __call__"
    of = getattr(type(m).forward, "__module__", None) or ""
    if of.startswith(("torch.nn.parallel.", "torch.distributed.")):
        return "its forward only communicates around another module"  # that module is fused on its own
    return why_no_class(type(m), "fused")


def fuse(model: nn.Module) -> nn.Module:
    """Fuses a model in place, and returns it: every module that contains a norm gets a class of its own.

    The class is a subclass of the module's own class. Dynamo captures its forward at the first call, with guards on all
    that it read. Residual blocks, stems and conv -> norm -> act units in it run as chains; the rest runs as before.
    Parameters, buffers, names, ``state_dict``, optimizers made before or after, and hooks stay. What can't be captured
    runs plain; ``explain`` says what runs. Fusing twice changes nothing. SyncBatchNorm and DistributedDataParallel may
    be applied before or after. A SyncBatchNorm in a chain shares its statistics with the other processes of its group
    on any device.

    Args:
        model: any module: from torchvision, timm, transformers or this package, or your own.

    Returns:
        The same ``model``.

    Raises:
        TypeError: ``model`` is not an nn.Module.
    """
    _check(model)
    everything = named_modules(model)
    compiled = [m for _, m in everything if isinstance(m, torch.jit.ScriptModule)]
    inside = {id(m) for outer in compiled for _, m in named_modules(outer)}
    found = False
    for _, m in everything:
        if id(m) not in inside and _has_norms(m) and why_not_fused(m) is None:
            if not isinstance(m, FusedModule):
                set_class(m, fused_class(type(m), "fused"))
            m.__dict__["_fr_fused"] = found = True
    if not found:
        warn_once(f"fuse: nothing in this {type(model).__name__} could be fused: print(fused_resnet.explain(model))")
    return model


def _has_norms(m: nn.Module) -> bool:
    """Whether the module is not a norm itself but contains norms of images.

    A BatchNorm1d is one of vectors, unless there is a convolution of signals.
    """
    inside = [child for _, child in named_modules(m)]
    signals = any(isinstance(child, nn.Conv1d) for child in inside)
    norms = (child for child in inside if signals or not isinstance(child, nn.BatchNorm1d))
    return not looks_like_norm(m) and any(map(looks_like_norm, norms))


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every fused module of ``model`` its original class back, in place, and returns the model.

    Raises:
        TypeError: ``model`` is not an nn.Module.
    """
    _check(model)
    for _, m in named_modules(model):
        if isinstance(m, FusedModule):
            unfuse_module(m)
    return model


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
