"""Counts the bytes that a network reads and writes on a GPU, without a GPU.

First the network runs on tensors without memory. Then each of its chains runs on meta tensors, by the same code as on a
GPU. There kernels are not started but recorded with the bytes that they read and write. PyTorch's own operators,
between the chains and inside them, are counted too, each time that they run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fused_resnet.chain  # noqa: F401  (registers the operators)
from fused_resnet.backends import BackendUnavailable, forced_again, load
from fused_resnet.chain.backward import row_backward
from fused_resnet.chain.forward import inference, row_forward
from fused_resnet.frozen.modules import Frozen
from fused_resnet.fusion.classes import FusedModule
from fused_resnet.fusion.front import backend
from fused_resnet.fusion.inspection import copy_of

if TYPE_CHECKING:
    from fused_resnet.backends.triton.runtime import Launch, Traffic

_CHAIN: dict[Any, Callable[..., Any]] = {
    torch.ops.fused_resnet.chain.default: row_forward,
    torch.ops.fused_resnet.chain_backward.default: row_backward,
    torch.ops.fused_resnet.chain_inference.default: inference,
}
# Operators that read none of their tensors, and operators that neither read nor write.
_FILL = ("zeros", "ones", "full", "fill", "zero", "new_zeros", "new_ones", "new_full")
_FREE = ("empty", "empty_strided", "new_empty", "new_empty_strided", "as_strided_", "_unsafe_view", "lift_fresh")


def network_traffic(
    model: nn.Module,
    batch: int,
    size: int | tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    training: bool = True,
) -> Traffic:
    """The launches of one step of a network and the bytes that each reads and writes, with the Triton backend.

    A training step is forward and backward (of the sum of the outputs, without an optimizer). It runs inside autocast
    if the parameters have another dtype. Each distinct element counts once: a second read comes from a cache.

    Args:
        model: a fused or frozen network, on the CPU or a GPU. It is not changed.
        batch, size: the input is [batch, 3, size, size] (or size as (height, width)), channels_last, in ``dtype``.
        dtype: float32, bfloat16 or float16.
        training: forward and backward with batch statistics, or the forward alone in eval mode without gradients.

    Returns:
        A ``Traffic``: ``total`` bytes and ``launches``, each with ``kernel``, ``read`` and ``written``; operators of
        PyTorch are named "aten::...".

    Raises:
        BackendUnavailable: Triton is not installed. ValueError: a frozen model can't train.

    Example:
        >>> model = fused_resnet.models.resnet50().to(memory_format=torch.channels_last)
        >>> network_traffic(model, 256, 224).total / 256 / 1e9  # GB per image
    """
    module, reason = load("triton", to_run=False)
    if module is None:
        raise BackendUnavailable(f"backend 'triton': {reason}")
    from fused_resnet.backends.triton.runtime import traffic

    height, width = (size, size) if isinstance(size, int) else size
    shape = (batch, 3, height, width)
    if isinstance(model, Frozen):
        if training:
            raise ValueError("training: this model is frozen for inference, count the one it was made from")
        meta = torch.device("meta")
        copied, x = copy_of(model.model).to(meta, dtype), _input(shape, dtype, meta)
        frozen = Frozen(copied, dtype, dtype, meta, portable=False)
        with traffic() as record, forced_again("triton"), torch.no_grad():
            call = partial(frozen.front().run, frozen.model, (x,), {})
            call()  # captures the forward and folds the weights
            record.launches.clear()
            with _Count(record.launches):
                call()
        return record
    steps: list[Any] = []
    _walk(model, shape, dtype, training, steps)
    with traffic() as record, forced_again("triton"), _Count(record.launches):
        for step in steps:
            if isinstance(step, tuple):
                function, args = step
                function(*tree_map_only(_Shape, _Shape.meta, args))
            else:
                record.launches.append(step)
    return record


def _input(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)


def _walk(model: nn.Module, shape: Sequence[int], dtype: torch.dtype, training: bool, steps: list[Any]) -> None:
    """Runs a copy of the model without memory. ``steps`` gets its operators and its chains' arguments, in order."""
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    parameter = next(model.parameters())
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):
        copied = copy_of(model).train(training)
    mixed = dtype != parameter.dtype
    with fake, torch.autocast(parameter.device.type, dtype, enabled=mixed), torch.set_grad_enabled(training):
        x = _input(shape, dtype, parameter.device)
        # fused modules would run plain under a counting mode, so the model is compiled first
        has_chains = any(isinstance(m, FusedModule) for m in copied.modules())
        call = torch.compile(copied, backend=backend) if has_chains else copied
        with _Count(steps):
            out = call(x)
            if training:
                out.sum().backward()


class _Shape:
    """The description of a tensor without its memory."""

    def __init__(self, t: Tensor) -> None:
        self.sizes, self.strides, self.dtype = tuple(t.shape), t.stride(), t.dtype

    def meta(self) -> Tensor:
        return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device="meta")


class _Count(TorchDispatchMode):
    """Records every operator as a launch, and a chain's operator as its arguments."""

    def __init__(self, steps: list[Any]) -> None:
        super().__init__()
        self.steps = steps

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: the compiled graph runs under this mode, which counts the graph's operators."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _CHAIN:
            self.steps.append((_CHAIN[func], tree_map_only(Tensor, _Shape, args)))
        elif (launch := _launch(func, args, kwargs, out)) is not None:
            self.steps.append(launch)
        return out


def _launch(func: Any, args: Any, kwargs: Any, out: Any) -> Launch | None:
    """The launch of an operator; None if it moves no bytes."""
    from fused_resnet.backends.triton.runtime import Launch

    name = func._schema.name.split("::")[-1].removesuffix("_like")
    if func.is_view or func.namespace == "prim" or name in _FREE:
        return None
    reads = [] if name.rstrip("_") in _FILL else [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    writes = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if not any(map(_bytes, reads + writes)):
        return None
    return Launch(func._schema.name, sum(map(_bytes, reads)), sum(map(_bytes, writes)))


def _bytes(t: Tensor) -> int:
    """The bytes of a tensor. An expanded tensor has fewer than its sizes say."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
