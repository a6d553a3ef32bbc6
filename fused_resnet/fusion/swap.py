"""fuse and unfuse: modules whose forward runs through dynamo with the backend of this package, and back again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    get_eval_frame_callback,
    set_code_exec_strategy,
)
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fused_resnet.backends import warn_once
from fused_resnet.chain import transformed
from fused_resnet.fusion.front import CALLING, Front
from fused_resnet.fusion.sync_norm import sync_batch_norm
from fused_resnet.modules import shared_by
from fused_resnet.patterns import METHODS, calls_itself, looks_like_norm

_NEVER_SAVED = ("_fr_fronts", "_fr_group")


class FusedModule:
    """What a fused class adds to the class it was made from.

    Attributes:
        _fr_original: that class. _fr_fronts: of the module: method -> its captured forward, made at its first call.
    """

    _fr_original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__()
        if isinstance(state, dict):
            state = {k: v for k, v in state.items() if k not in _NEVER_SAVED}
        return _rebuild, (self._fr_original,), state

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` asks for.

        Raises:
            TypeError: always.
        """
        raise TypeError("torch.jit.script: TorchScript can't hold chains; fused_resnet.unfuse(model), then script it")


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    """Unpickling and deepcopy: an empty module of the fused class."""
    fused: Any = _fused_class(cls)  # type: ignore[arg-type]
    made: nn.Module = fused.__new__(fused)
    return made


@cache
def _fused_class(cls: Any) -> Any:
    methods = [name for name in METHODS if hasattr(cls, name)]
    added: dict[str, Any] = {name: _fused_method(name, getattr(cls, name)) for name in methods}
    added |= {"_fr_original": cls, "__module__": __name__}
    return type(f"Fused{cls.__name__}", (FusedModule, cls), added)


def _fused_method(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return plain(self, *args, **kwargs)
        if not CALLING.get() and callable(get_eval_frame_callback()):
            return compiled(self, *args, **kwargs)  # for somebody's torch.compile
        return _call(self, name, plain, args, kwargs)

    # Dynamo remembers what it captured, and how often, by the code. It does not begin at ``forward``: where the capture
    # of a module around is broken off before this call, the call is captured by itself.
    compiled.__code__, forward.__code__ = compiled.__code__.replace(), forward.__code__.replace()
    set_code_exec_strategy(forward.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))
    return wraps(plain)(forward)


def _call(self: Any, name: str, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _plain_here(args, kwargs):
        return plain(self, *args, **kwargs)
    fronts = self.__dict__.setdefault("_fr_fronts", {})  # one for all threads
    front = fronts.get(name) or fronts.setdefault(name, Front(plain))
    if dist.is_available() and dist.is_initialized():
        name_groups(self)
    return front(self, args, kwargs)


set_code_exec_strategy(_call.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def _plain_here(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether somebody traces, counts or fakes the call: they are to see the plain module."""
    return (
        _watched()
        or torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or nn_module._has_any_global_hook()
        or transformed()
        or _has_proxy(args)
        or _has_proxy(kwargs)
    )


def _watched() -> bool:
    """Whether a dispatch mode sees every operator, but for those that say that a compiler's graphs are as good: the
    modes of selective checkpoints."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return not all(mode.ignore_compile_internals() for mode in _get_current_dispatch_mode_stack())


def _has_proxy(value: Any) -> bool:
    """Whether torch.fx traces the call."""
    if isinstance(value, list | tuple):
        return any(map(_has_proxy, value))
    return isinstance(value, fx.Proxy) or (isinstance(value, dict) and any(map(_has_proxy, value.values())))


class FusedSyncBatchNorm(FusedModule, nn.SyncBatchNorm):
    """A SyncBatchNorm that dynamo sees as one call, on any device."""

    _fr_original = nn.SyncBatchNorm

    def forward(self, input: Tensor) -> Tensor:
        group = self.__dict__.get("_fr_group")
        if group is None or not self.training:
            return nn.SyncBatchNorm.forward(self, input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        mean, var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        return sync_batch_norm(input, mean, var, self.weight, self.bias, True, momentum, self.eps, group)


def name_groups(module: nn.Module) -> None:
    """Tells every SyncBatchNorm in a module the name of its process group, as a constant that dynamo guards."""
    for m in module.modules():
        if isinstance(m, nn.SyncBatchNorm):
            if type(m) is nn.SyncBatchNorm:
                m.__class__ = FusedSyncBatchNorm
            group = shared_by(m)
            m.__dict__["_fr_group"] = group.group_name if group is not None else None


def why_not_fused(m: nn.Module) -> str | None:
    """Why a module's own forward can't be captured, or None."""
    if isinstance(m, torch.jit.ScriptModule):
        return "a ScriptModule"
    if type(m).forward is nn.Module.forward:
        return "a container without a forward"
    if "forward" in m.__dict__:
        return "its forward was replaced"
    if calls_itself(m):
        return "its class overrides __call__"
    return None


def fuse(model: nn.Module) -> nn.Module:
    """Gives every module of ``model`` that has a norm in it a class of its own, in place, and returns the model.

    The class is a subclass of the module's own. Its forward is captured by dynamo at the first call, with guards on all
    that it read; the residual blocks, stems and conv -> norm -> act units in it run as chains, the rest as it was.
    Parameters, buffers, names, ``state_dict``, optimizers made before or after, hooks: everything stays. What can't be
    captured runs plain; ``explain`` says what runs. Fusing twice changes nothing. SyncBatchNorm and
    DistributedDataParallel may come before or after; a SyncBatchNorm in a chain shares its statistics with the other
    processes of its group on any device.

    Args:
        model: any module: of torchvision, timm, transformers, of this package or your own.

    Returns:
        The same ``model``.

    Raises:
        TypeError: not an nn.Module.
    """
    _check(model)
    found = False
    for m in model.modules():
        if isinstance(m, FusedModule):
            found = True
        elif not looks_like_norm(m) and any(looks_like_norm(child) for child in m.modules()):
            if why_not_fused(m) is None:
                m.__class__ = _fused_class(type(m))  # type: ignore[arg-type]
                found = True
    if not found:
        warn_once(f"fuse: nothing in this {type(model).__name__} could be fused; print(fused_resnet.explain(model))")
    return model


@lru_cache
def _unfused_class(cls: Any) -> type:
    if "_fr_original" in vars(cls):
        return cls._fr_original
    bases = tuple(_unfused_class(base) if issubclass(base, FusedModule) else base for base in cls.__bases__)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__.replace("Fused", "", 1), bases, own)


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every fused module of ``model`` its own class back, in place, and returns it.

    Raises:
        TypeError: not an nn.Module.
    """
    _check(model)
    for m in model.modules():
        if isinstance(m, FusedModule):
            m.__class__ = _unfused_class(type(m))  # type: ignore[arg-type]
            for name in _NEVER_SAVED:
                m.__dict__.pop(name, None)
    return model


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
