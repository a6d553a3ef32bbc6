"""Whether a row of chains pays on an input: measured by ``planner/sizes.py``, beside the operators that it stands for.

Both are timed on copies of the row's tensors and on random images: the forward, and the backward where gradients are
wanted. Nothing of the user's is touched. An answer depends on what the row is made of, its tensors' sizes (batches and
areas of images in steps), dtypes and layouts, on autocast, and on which tensors want gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _current_graph_task_id
from torch._C._autograd import _top_saved_tensors_default_hooks

from fused_resnet.planner import sizes

if TYPE_CHECKING:
    from fused_resnet.fusion.lowering import ChainRow

# What one timed call should take: long enough that its tensors, as those of the whole batch, are in no cache.
_CALL_S = 0.04
# Of a row's answers, one per kind of input; a network whose images all differ has no end of them.
_ANSWERS = 256
# After so many calls without its rows a module is captured again: it may have changed.
_AGAIN = 64
_OWN_TENSORS = (Tensor, nn.Parameter)
_is_initialized = dist.is_initialized if dist.is_available() else bool


class Like(NamedTuple):
    """What of an input, and of the state it comes in, an answer depends on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    wants_grad: bool
    grad: bool
    autocast: torch.dtype | None
    threads: int

    def __str__(self) -> str:
        """For a reader."""
        autocast = f", autocast {_short(self.autocast)}" if self.autocast is not None else ""
        return f"{_sizes(self.shape)} {_short(self.dtype)}{autocast}{', with gradients' if self.grad else ''}"


def like(x: Tensor) -> Like | None:
    """Of x; None where there is nothing to choose: chains run."""
    if type(x) not in _OWN_TENSORS or not x.is_cpu or 0 in x.shape or not sizes.has_choice():
        return None
    return Like(
        tuple(x.shape),
        x.dtype,
        x.is_contiguous(memory_format=torch.channels_last),
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        torch.get_num_threads(),
    )


# ---------------------------------------------------------------------------------------------------- whole calls
class _Thread(threading.local):
    """Of this thread.

    Attributes:
        plain: how many rows ran as operators. other: how many ran as chains, and how many checkpoints ran. inside:
            whether it is in a module's own forward, for none of the module's rows pays.
    """

    plain = other = 0
    inside = False


thread = _Thread()


def _comes_again() -> bool:
    """Whether what runs now may be one of two forwards of a checkpoint, which have to do the same."""
    return _current_graph_task_id() != -1 or _top_saved_tensors_default_hooks(True) is not None


def inside_plain() -> bool:
    """Whether a module around this one runs its own forward, for no row in it pays."""
    return thread.inside and not _comes_again()


_CONSTANTS = (bool, int, str, type(None))


def kind_of_call(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What of a module's call says which rows pay; None: nothing is to be kept of it. One flat function: between two
    forwards of a network caches forget its code, and each function that it called would cost microseconds."""
    if (
        not sizes.has_choice()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _comes_again()
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
            last = value.is_contiguous(memory_format=torch.channels_last)
            kind += (value.shape, value.dtype, last, value.requires_grad)
        elif isinstance(value, Tensor):
            return None
        else:
            kind.append(value if type(value) in _CONSTANTS else type(value))
    return tuple(kind)


class Settled:
    """The kinds of a module's calls of which no row pays: those run the module's own forward."""

    def __init__(self) -> None:
        self.calls: dict[Any, int] = {}  # how many are left until the rows are asked again

    def runs_plain(self, kind: Any) -> bool:
        """Whether such a call does."""
        calls = self.calls.get(kind, 0)
        if calls:
            self.calls[kind] = calls - 1
        return calls > 0

    def plainly(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs it: fused modules in it don't ask either."""
        before, thread.inside = thread.inside, True
        try:
            return forward(*args, **kwargs)
        finally:
            thread.inside = before

    def asking(self, kind: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a forward whose rows are asked, and keeps what they answered."""
        before, thread.inside = thread.inside, False
        plain, other = thread.plain, thread.other
        try:
            out = forward(*args, **kwargs)
        finally:
            thread.inside = before
        if len(self.calls) >= _ANSWERS:
            self.calls.clear()
        if kind is not None:
            self.calls[kind] = _AGAIN if thread.plain > plain and thread.other == other else 0
        return out


# ---------------------------------------------------------------------------------------------------- rows
class Choice:
    """What is known of a row.

    Attributes:
        measured: the measurement for each kind of input. chains, plain: how many calls ran as chains, and how many ran
            the operators that the row stands for.
    """

    def __init__(self) -> None:
        self.measured: dict[Like, sizes.Measured] = {}
        self.chains = self.plain = 0

    def __str__(self) -> str:
        """For a reader: what was measured."""
        return "; ".join(f"{about}: {found}" for about, found in self.measured.items() if found is not sizes.CHAINS)

    def pays(self, row: ChainRow, given: Sequence[Tensor]) -> bool:
        """Whether the row is to run as chains when it is called with these tensors."""
        about = like(given[0])
        if about is None or row.group:
            return True  # all processes of a group run chains, and PyTorch's own norms refuse a CPU
        found = self.measured.get(about)
        if found is None:
            if not all(type(t) in _OWN_TENSORS and t.is_cpu for t in given if isinstance(t, Tensor)):
                return True
            if len(self.measured) >= _ANSWERS:
                self.measured.clear()
            twins, tie = _Twins(row, given, about), sizes.TIE_OF_A_STEP if about.grad else sizes.TIE
            text = _signature(row, given, about)
            found = self.measured[about] = sizes.faster(text, about.shape[0], twins, _CALL_S, tie)
        return found.pays


def _signature(row: ChainRow, given: Sequence[Tensor], x: Like) -> str:
    """What is measured, as the planner's file names it."""
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
    last = "nhwc" if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) else ""
    return f"{_short(t.dtype)}{last} {_sizes(t.shape)}{' wants' if t.requires_grad else ''}"


class _Twins:
    """A row and what it stands for, on copies of its tensors, ready to be timed."""

    def __init__(self, row: ChainRow, given: Sequence[Tensor], x: Like) -> None:
        self.row, self.x = row, x
        self.given = given

    def __call__(self, images: int) -> tuple[sizes.Call, sizes.Call]:
        # the copies are made here, outside a caller's inference mode: made in it they could not learn
        tensors = [self._copy(i, t, images) for i, t in enumerate(self.given)]
        wanted = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad] if self.x.grad else []
        ours, plain = self.row.chained, self.row.plain
        return lambda: self._step(ours, tensors, wanted), lambda: self._step(plain, tensors, wanted)

    def _copy(self, place: int, t: Any, images: int) -> Any:
        if not isinstance(t, Tensor):
            return t  # a momentum
        if place in self.row.images:
            last = t.is_contiguous(memory_format=torch.channels_last)
            made = sizes.images((images, *t.shape[1:]), t.dtype, last)
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
