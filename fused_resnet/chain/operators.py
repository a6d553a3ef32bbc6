"""The operators that PyTorch sees: a row of chains, its backward, inference.

    forward    y_i = conv(act(s_{i-1} y_{i-1} + t_{i-1}), W_i)       z_i = s_i y_i + t_i,  s = gamma r,  t = beta - mu s
               out = act(z_k + shortcut(x))                             r = 1/sqrt(var + eps)
    backward   dz = dout act'(z)      dbeta = sum dz      dgamma = r sum dz (y - mu)
               dy = A dz + B (y - mu) + C                 A = s,  B = -s r dgamma / M,  C = -s dbeta / M  (frozen: A dz)

The backward needs x, the raw convolution outputs y_i, the batch's mean and variance per channel, and the parameters. It
computes z and act(z) again, by the forward's expression. In a row of chains the x of a chain is the output of the chain
before. The kernel that computes the gradient of x turns it into that chain's dz, so its dout is never written.

There are two operators, functional, traceable, with fake kernels. ``spec`` is a ``RowSpec``, most often of one chain:
    fused_resnet::chain            (x, residual, params, spec) -> [out_n, out_1 .. out_{n-1}, (y..., mean, var ...,
                                   argmax) of each chain]
    fused_resnet::chain_backward   (dout, x, residual, params, saved, spec, needs) -> one gradient per true ``needs``
A third, fused_resnet::chain_inference, is for running statistics without gradients, where BatchNorm folds into W and b.
If a process group shares statistics (SyncBatchNorm), mean, var and M are those of all its processes (sync.py), and a
third tensor, M, is kept beside mean and var. forward.py and backward.py compose the operators of primitives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_resnet import reference
from fused_resnet.backends import (
    RowBackward,
    RowForward,
    RowInference,
    forced,
    forced_again,
    vector_dtype,
)
from fused_resnet.chain.backward import row_backward
from fused_resnet.chain.forward import inference, memory_format, row_forward
from fused_resnet.planner import run_whole
from fused_resnet.spec import ChainSpec, ConvSpec, RowSpec, UnitSpec

_lib = torch.library.Library("fused_resnet", "DEF")
_lib.define("chain(Tensor x, Tensor? residual, Tensor[] params, str spec) -> Tensor[]")
_lib.define(
    "chain_backward(Tensor dout, Tensor x, Tensor? residual, Tensor[] params, Tensor[] saved, str spec, bool[] needs)"
    " -> Tensor[]"
)
_lib.define("chain_inference(Tensor x, Tensor? residual, Tensor[] params, str spec) -> Tensor")


# ---------------------------------------------------------------------------------------------------- registration
def unit_shapes(x: Tensor, params: Sequence[Tensor], spec: ChainSpec) -> list[tuple[Any, ...]]:
    """The shape of every unit's y, the projection last (sizes may be symbolic)."""
    shapes = []
    parts = spec.split(params)

    def conv(shape: Sequence[Any], p: dict[str, Tensor], unit: UnitSpec) -> tuple[Any, ...]:
        if unit.conv is None:
            return tuple(shape)
        weight = p["weight"]
        return (shape[0], weight.shape[0], *unit.conv.out_size(shape[2:], weight.shape[2:]))

    shape: tuple[Any, ...] = tuple(x.shape)
    for unit, p in zip(spec.units, parts, strict=False):
        shape = conv(shape, p, unit)
        shapes.append(shape)
    if spec.shortcut.unit is not None:
        start = reference.shortcut_input(x, spec.shortcut) if spec.shortcut.pool else x
        shapes.append(conv(start.shape, parts[-1], spec.shortcut.unit))
    return shapes


def _forward_fake(x: Tensor, residual: Tensor | None, params: Sequence[Tensor], text: str) -> list[Tensor]:
    row = RowSpec.decode(text)
    fmt = memory_format(x, params)
    outs: list[Tensor] = []
    saved: list[Tensor] = []
    for spec, p in zip(row.chains, row.split(params), strict=True):
        x, *more = _chain_fake(x, p, spec, fmt)
        outs.append(x)
        saved += more
    return [outs[-1], *outs[:-1], *saved]


def _chain_fake(x: Tensor, params: Sequence[Tensor], spec: ChainSpec, fmt: torch.memory_format) -> list[Tensor]:
    wide = vector_dtype(x.dtype)
    shapes = unit_shapes(x, params, spec)
    outs = [_closing_fake(x, shapes[len(spec.units) - 1], spec, fmt)]
    for i, (unit, shape) in enumerate(zip(spec.all_units, shapes, strict=True)):
        if unit.conv is not None and not (spec.recompute and i == 0):
            outs.append(x.new_empty(shape).to(memory_format=fmt))
    for unit, shape in zip(spec.all_units, shapes, strict=True):
        if unit.batch_stats:
            outs += [x.new_empty(shape[1], dtype=wide), x.new_empty(shape[1], dtype=wide)]
        if unit.group is not None:
            outs.append(x.new_empty(1, dtype=wide))
    if spec.pool is not None:
        outs.append(torch.empty_like(outs[0], dtype=torch.uint8))
    return outs


def _closing_fake(x: Tensor, shape: Sequence[Any], spec: ChainSpec, fmt: torch.memory_format) -> Tensor:
    out = x.new_empty(shape).to(memory_format=fmt)
    if spec.pool is None:
        return out
    p = spec.pool
    pooled = ConvSpec(p.stride, p.padding).out_size(shape[2:], p.kernel)
    return x.new_empty((*shape[:2], *pooled)).to(memory_format=fmt)


def _inference_fake(x: Tensor, residual: Tensor | None, params: Sequence[Tensor], text: str) -> Tensor:
    row = RowSpec.decode(text)
    fmt = memory_format(x, params)
    for spec, p in zip(row.chains, row.split(params), strict=True):
        x = _closing_fake(x, unit_shapes(x, p, spec)[len(spec.units) - 1], spec, fmt)
    return x


def _backward_fake(
    dout: Tensor,
    x: Tensor,
    residual: Tensor | None,
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    text: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    like = [x, residual, *params]
    return [torch.empty_like(t) for t, need in zip(like, needs, strict=True) if need and t is not None]


class _Row(torch.autograd.Function):
    """The gradient of fused_resnet::chain with respect to x, the residual (if any) and the parameters, as a flat list.

    ``torch.library.register_autograd`` would pack and unpack nested lists in every call, which takes a fifth of a small
    chain's time.
    """

    @staticmethod
    def forward(ctx: Any, below: Any, text: str, has_residual: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.text, ctx.forced, ctx.has_residual, ctx.n_tensors = text, forced(), has_residual, len(tensors)
        output = _redispatch(below, *_row_arguments(tensors, has_residual), text)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        # Autograd saves no inference tensor. Plain PyTorch saves x only for a weight's gradient, so inference tensors
        # as images may train the norms after a convolution that is not trained. Here a copy of them is saved.
        first = 1 + has_residual
        given = [t.clone() if t.is_inference() else t for t in tensors[:first]]
        ctx.save_for_backward(*given, *tensors[first:], *output[1:])
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * (3 + ctx.n_tensors)
        kept = ctx.saved_tensors  # read once: at the first read a checkpoint computes them again
        x, residual, params = _row_arguments(kept[: ctx.n_tensors], ctx.has_residual)
        saved = list(kept[ctx.n_tensors :])
        wanted = ctx.needs_input_grad[3:]
        needs = [wanted[0], ctx.has_residual and wanted[1], *wanted[1 + ctx.has_residual :]]
        batched = torch._C._functorch.is_legacy_batchedtensor(dout)  # is_grads_batched=True
        if torch.is_grad_enabled() or batched or transformed():
            found = iter(_differentiable_backward(dout, x, residual, params, ctx.text, needs))
        else:
            with forced_again(ctx.forced):
                ops = torch.ops.fused_resnet
                found = iter(ops.chain_backward(dout, x, residual, params, saved, ctx.text, needs))
        return None, None, None, *[next(found) if need else None for need in wanted]


def _row_arguments(tensors: Sequence[Tensor], has_residual: bool) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    return tensors[0], tensors[1] if has_residual else None, list(tensors[1 + has_residual :])


def _redispatch(below: Any, *args: Any) -> list[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        out: list[Tensor] = torch.ops.fused_resnet.chain.default.redispatch(below, *args)
    return out


def _autograd(keyset: Any, x: Tensor, residual: Tensor | None, params: list[Tensor], text: str) -> list[Tensor]:
    """The operator as PyTorch's autograd sees it."""
    below = keyset & torch._C._after_autograd_keyset
    tensors = (x, *([residual] if residual is not None else []), *params)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return _redispatch(below, x, residual, params, text)
    return list(_Row.apply(below, text, residual is not None, *tensors))


def _differentiable_backward(
    dout: Tensor, x: Tensor, residual: Tensor | None, params: list[Tensor], text: str, needs: list[bool]
) -> Sequence[Tensor]:
    """The gradients by plain PyTorch.

    With create_graph=True they can be differentiated again, and torch.func's transforms have rules for them.
    """
    wide, create_graph = vector_dtype(x.dtype), torch.is_grad_enabled()
    with torch.enable_grad():
        # one view each, so that a tensor passed twice (a residual that is x, a shared weight) has a gradient per
        # argument
        given = [None if t is None else t.view_as(t) for t in (x, residual, *params)]
        a, r, *rest = [None if t is None else t.to(wide) for t in given]
        assert a is not None
        out = reference.row(a, r, [p for p in rest if p is not None], RowSpec.decode(text)).out
    inputs = [t for t, need in zip(given, needs, strict=True) if need and t is not None]
    return torch.autograd.grad(
        out, inputs, dout.to(wide), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp ...) or forward-mode differentiation is active.

    PyTorch has no rules for these operators there, and forward mode would silently use a derivative of zero.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# In compiled code this runs while the transform is traced; dynamo itself guards the stack of transforms.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _below_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs without autocast, because a chain chooses its own dtypes.

    An empty batch goes to PyTorch's operators. It comes here only because other processes wait for its share of their
    statistics.
    """

    @wraps(function)
    def run(*args: Any) -> Any:
        empty = forced_again("aten") if args[0].numel() == 0 else nullcontext()
        with torch._C._DisableAutocast(), empty:
            return function(*args)

    return run


def _whole(kind: type[RowForward | RowBackward | RowInference], composed: Callable[..., Any]) -> Callable[..., Any]:
    """The whole row in one call of a backend that offers it, or else ``composed`` of primitives."""

    def run(*args: Any) -> Any:
        call: Any = kind(*args)
        found = None if RowSpec.decode(call.spec).shares_statistics else run_whole(call)
        return composed(*args) if found is None else found

    return run


_lib.impl("chain", _below_autocast(_whole(RowForward, row_forward)), "CompositeExplicitAutograd")
_lib.impl("chain_backward", _below_autocast(_whole(RowBackward, row_backward)), "CompositeExplicitAutograd")
_lib.impl("chain_inference", _below_autocast(_whole(RowInference, inference)), "CompositeExplicitAutograd")
torch.library.register_fake("fused_resnet::chain", _forward_fake, lib=_lib)
torch.library.register_fake("fused_resnet::chain_backward", _backward_fake, lib=_lib)
torch.library.register_fake("fused_resnet::chain_inference", _inference_fake, lib=_lib)
_lib.impl("chain", _autograd, "Autograd", with_keyset=True)
