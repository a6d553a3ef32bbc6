"""Decides whether a row of chains pays on an input.

``planner/sizes.py`` times the row beside the operators that it replaces.

Both are timed on copies of the row's tensors and on random images: the forward, and also the backward if gradients are
needed. The user's tensors are not touched. An answer depends on the row's layers, its tensors' sizes (batches and areas
of images in steps), dtypes and layouts, on autocast, and on which tensors need gradients.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch._C._autograd import _top_saved_tensors_default_hooks

from fused_resnet.base.layouts import is_channels_last
from fused_resnet.planner import sizes

if TYPE_CHECKING:
    from fused_resnet.fusion.lowering import ChainRow

# Seconds that one timed call should take: so long that its tensors fit into no cache, like those of the whole batch.
_CALL_S = 0.08
# A row keeps at most this many answers, one per kind of input: images of ever new sizes would make ever more.
_ANSWERS = 256
# After this many plain calls a module's rows are asked again: the module may have changed.
_AGAIN = 64
_OWN_TENSORS = (Tensor, nn.Parameter)
_is_initialized = dist.is_initialized if dist.is_available() else bool


class Like(NamedTuple):
    """The properties of an input, and of the current modes, on which an answer depends."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    wants_grad: bool
    grad: bool
    autocast: torch.dtype | None
    threads: int

    def __str__(self) -> str:
        """The text that ``explain`` prints."""
        autocast = f", autocast {_short(self.autocast)}" if self.autocast is not None else ""
        return f"{_sizes(self.shape)} {_short(self.dtype)}{autocast}{', with gradients' if self.grad else ''}"


def like(x: Tensor) -> Like | None:
    """The properties of x; None if there is no choice, so that chains run."""
    if type(x) not in _OWN_TENSORS or not x.is_cpu or 0 in x.shape or not sizes.has_choice():
        return None
    return Like(
        tuple(x.shape),
        x.dtype,
        is_channels_last(x),
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        torch.get_num_threads(),
    )


# ---------------------------------------------------------------------------------------------------- whole calls
class _Thread(threading.local):
    """The state of a thread.

    Attributes:
        plain: the number of rows that ran as operators. gained: the milliseconds that rows gained as chains; infinite
            if one of them was not measured, or if a checkpoint ran. inside: whether the thread is in a module's own
            forward because its rows do not pay.
    """

    plain = 0
    gained = 0.0
    inside = False


thread = _Thread()


def comes_again() -> bool:
    """Whether the current forward may be one of a checkpoint's two forwards. Both have to run the same operators."""
    return _current_graph_task_id() != -1 or _top_saved_tensors_default_hooks(True) is not None


_CONSTANTS = (bool, int, str, type(None))


def kind_of_call(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The properties of a module's call that decide which rows pay; None: the call must not be remembered.

    This is one flat function for speed. Between two forwards of a network its code leaves the caches, so each function
    that it called would cost microseconds.
    """
    if (
        not sizes.has_choice()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or comes_again()
    ):
        return None
    kind: list[Any] = [
        m.training,
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        _is_initialized(),
    ]
    for value in (*args, *kwargs, *kwargs.values()):
        if type(value) in _OWN_TENSORS:
            if not value.is_cpu:
                return None
            last = is_channels_last(value)
            kind += (value.shape, value.dtype, last, value.requires_grad)
        elif isinstance(value, Tensor):
            return None
        else:
            kind.append(value if type(value) in _CONSTANTS else type(value))
    return tuple(kind)


class Settled:
    """The kinds of a module's calls in which its rows do not pay. Such calls run the module's own forward.

    Attributes:
        calls: kind -> the number of plain calls left until the rows are asked again. guards: kind -> the milliseconds
            that the call's guards take. outweighed: kind -> what its rows would gain, in milliseconds, if the guards
            take longer.
    """

    def __init__(self) -> None:
        self.calls: dict[Any, int] = {}
        self.guards: dict[Any, float] = {}
        self.outweighed: dict[Any, float] = {}

    def runs_plain(self, kind: Any) -> bool:
        """Whether a call of this kind runs the module's own forward."""
        calls = self.calls.get(kind, 0)
        if calls:
            self.calls[kind] = calls - 1
        return calls > 0

    def plainly(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the module's own forward. Fused modules inside run their own forwards too."""
        before, thread.inside = thread.inside, True
        try:
            return forward(*args, **kwargs)
        finally:
            thread.inside = before

    def asking(self, kind: Any, forward: Callable[[], Any], guards: Callable[[], float]) -> Any:
        """Runs a forward whose rows choose how they run, and keeps their answer.

        Args:
            guards: gives the milliseconds that the guards of such a call take; called right after the forward.
        """
        inside, gained, plain = thread.inside, thread.gained, thread.plain
        thread.inside, thread.gained = False, 0.0
        try:
            out = forward()
            if kind is not None:
                self._settle(kind, thread.plain > plain, guards)
        finally:
            thread.inside, thread.gained = inside, gained + thread.gained
        return out

    def _settle(self, kind: Any, plain: bool, guards: Callable[[], float]) -> None:
        """``plain``: whether some rows ran as operators."""
        if len(self.calls) >= _ANSWERS:
            for kept in (self.calls, self.guards, self.outweighed):
                kept.clear()
        pays = not plain and not thread.gained
        if thread.gained:
            if kind not in self.guards:
                self.guards[kind] = 0.0 if math.isinf(thread.gained) else guards()
            pays = thread.gained > self.guards[kind]
            self.outweighed.pop(kind, None)
            if not pays:
                self.outweighed[kind] = thread.gained
        self.calls[kind] = 0 if pays else _AGAIN

    def __str__(self) -> str:
        """The text that ``explain`` prints."""
        some = [f"{gain:.2g} against {self.guards[kind]:.2g} ms" for kind, gain in self.outweighed.items()]
        return f"plain where chains gain less than dynamo's guards take: {', '.join(some)}" if some else ""


# ---------------------------------------------------------------------------------------------------- rows
class Choice:
    """The measurements and calls of a row.

    Attributes:
        measured: the measurement for each kind of input. chains, plain: the numbers of calls that ran as chains, and
            that ran the operators which the row replaces.
    """

    def __init__(self) -> None:
        self.measured: dict[Like, sizes.Measured] = {}
        self.chains = self.plain = 0

    def __str__(self) -> str:
        """The measurements as ``explain`` prints them."""
        return "; ".join(f"{about}: {found}" for about, found in self.measured.items() if found is not sizes.CHAINS)

    def pays(self, row: ChainRow, given: Sequence[Tensor]) -> bool:
        """Whether the row runs as chains when it is called with these tensors. Counts the answer."""
        found = self._found(row, given)
        if found.pays:
            self.chains += 1
            gained = found.plain - found.ours
            thread.gained += math.inf if math.isnan(gained) else gained
        else:
            self.plain += 1
            thread.plain += 1
        return found.pays

    def _found(self, row: ChainRow, given: Sequence[Tensor]) -> sizes.Measured:
        about = like(given[0])
        if about is None or row.group:
            # all processes of a group must run chains, and PyTorch's own SyncBatchNorm refuses a CPU
            return sizes.CHAINS
        found = self.measured.get(about)
        if found is None:
            if not all(type(t) in _OWN_TENSORS and t.is_cpu for t in given if isinstance(t, Tensor)):
                return sizes.CHAINS
            if len(self.measured) >= _ANSWERS:
                self.measured.clear()
            twins, tie = _Twins(row, given, about), sizes.TIE_TO_OURS if about.grad else sizes.TIE
            text = _signature(row, given, about)
            found = self.measured[about] = sizes.faster(text, about.shape[0], twins, _CALL_S, tie)
        return found


def _signature(row: ChainRow, given: Sequence[Tensor], x: Like) -> str:
    """The key of the measurement in the planner's file."""
    tensors = [_tensor(t) for i, t in enumerate(given) if i not in row.images and isinstance(t, Tensor)]
    summands = [f"{sizes.size(given[i].shape, given[i].dtype)}" for i in row.images[1:]]
    state = "with gradients" if x.grad else "without gradients"
    if x.autocast is not None:
        state += f", autocast {_short(x.autocast)}"
    if torch.are_deterministic_algorithms_enabled():
        state += ", deterministic"
    if torch.get_float32_matmul_precision() != "highest":
        state += f", products {torch.get_float32_matmul_precision()}"
    layout = f"{' nhwc' if x.channels_last else ''}{' wants' if x.wants_grad else ''}"
    return " | ".join([row.text, " ".join(tensors), sizes.size(x.shape, x.dtype) + layout, *summands, state])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _tensor(t: Tensor) -> str:
    last = "nhwc" if is_channels_last(t) else ""
    return f"{_short(t.dtype)}{last} {_sizes(t.shape)}{' wants' if t.requires_grad else ''}"


class _Twins:
    """A row and the operators that it replaces, on copies of its tensors, ready to be timed."""

    def __init__(self, row: ChainRow, given: Sequence[Tensor], x: Like) -> None:
        self.row, self.x = row, x
        self.given = given

    def __call__(self, images: int) -> tuple[sizes.Call, sizes.Call]:
        # the copies are made outside the caller's inference mode: tensors made in it can't require gradients
        tensors = [self._copy(i, t, images) for i, t in enumerate(self.given)]
        wanted = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad] if self.x.grad else []
        ours, plain = self.row.chained, self.row.plain
        return lambda: self._step(ours, tensors, wanted), lambda: self._step(plain, tensors, wanted)

    def _copy(self, place: int, t: Any, images: int) -> Any:
        if not isinstance(t, Tensor):
            return t  # a momentum
        if place in self.row.images:
            made = sizes.images((images, *t.shape[1:]), t.dtype, is_channels_last(t))
        else:
            made = t.detach().clone()
        return made.requires_grad_(t.requires_grad)

    def _step(self, run: Any, tensors: list[Any], wanted: list[Tensor]) -> None:
        dtype = self.x.autocast
        with torch.set_grad_enabled(bool(wanted)):
            with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
                out = run(*tensors)
            if wanted:
                torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)
