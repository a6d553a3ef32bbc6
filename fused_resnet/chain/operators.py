"""The operators that PyTorch sees: a row of chains, its backward, inference.

    forward    y_i = conv(act(s_{i-1} y_{i-1} + t_{i-1}), W_i)       z_i = s_i y_i + t_i,  s = gamma r,  t = beta - mu s
               out = act(z_k + shortcut(x))                             r = 1/sqrt(var + eps)
    backward   dz = dout act'(z)      dbeta = sum dz      dgamma = r sum dz (y - mu)
               dy = A dz + B (y - mu) + C                 A = s,  B = -s r dgamma / M,  C = -s dbeta / M  (frozen: A dz)

The backward needs x, the residual, the weights W_i, the raw convolution outputs y_i, and each unit's vectors s, t, mu
and r. It computes z and act(z) again, by the forward's expression. BatchNorm's own tensors and the convolutions' biases
may change before it, as in PyTorch. In a row of chains the x of a chain is the output of the chain before. The kernel
that computes the gradient of x turns it into that chain's dz, so its dout is never written.

There are two operators, functional, traceable, with fake kernels. ``spec`` is a ``RowSpec``, most often of one chain:
    fused_resnet::chain            (x, residual, params, spec) -> [out_n, out_1 .. out_{n-1}, (y..., (s, t, mu, r, var)
                                   of each unit, argmax) of each chain]
    fused_resnet::chain_backward   (dout, x, residual, weights, saved, spec, needs) -> one gradient per true ``needs``
A third, fused_resnet::chain_inference, is for running statistics without gradients, where BatchNorm folds into W and b.
With running statistics there is no var. If a process group shares statistics (SyncBatchNorm), mu, var and M are those
of all its processes (sync.py), and M is kept after var. forward.py and backward.py compose the operators of primitives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_resnet import reference
from fused_resnet.backends import RowBackward, RowForward, RowInference, forced, forced_again, vector_dtype
from fused_resnet.chain.backward import row_backward
from fused_resnet.chain.forward import inference, memory_format, row_forward
from fused_resnet.planner import run_whole
from fused_resnet.spec import ChainSpec, RowSpec, UnitSpec

_lib = torch.library.Library("fused_resnet", "DEF")
_lib.define("chain(Tensor x, Tensor? residual, Tensor[] params, str spec) -> Tensor[]")
_lib.define(
    "chain_backward(Tensor dout, Tensor x, Tensor? residual, Tensor[] weights, Tensor[] saved, str spec, bool[] needs)"
    " -> Tensor[]"
)
_lib.define("chain_inference(Tensor x, Tensor? residual, Tensor[] params, str spec) -> Tensor")


# ---------------------------------------------------------------------------------------------------- registration
def unit_shapes(x: Tensor, params: Sequence[Tensor], spec: ChainSpec) -> list[tuple[Any, ...]]:
    """The shape of every unit's y, the projection last (sizes may be symbolic)."""
    shapes = []
    parts = spec.split(params)

    def conv(shape: Sequence[Any], p: dict[str, Tensor], unit: UnitSpec) -> tuple[Any, ...]:
        return tuple(shape) if unit.conv is None else unit.conv.out_shape(shape, p["weight"].shape)

    shape: tuple[Any, ...] = tuple(x.shape)
    for unit, p in zip(spec.units, parts, strict=False):
        shape = conv(shape, p, unit)
        shapes.append(shape)
    if spec.shortcut.unit is not None:
        pool = spec.shortcut.pool
        start = x.shape if pool is None else (*x.shape[:2], *pool.out_size(x.shape[2:]))
        shapes.append(conv(start, parts[-1], spec.shortcut.unit))
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
        outs += [x.new_empty(shape[1], dtype=wide) for _ in range(4 + unit.batch_stats)]
        if unit.group is not None:
            outs.append(x.new_empty(1, dtype=wide))
    if spec.pool is not None:
        outs.append(torch.empty_like(outs[0], dtype=torch.uint8))
    return outs


def _closing_fake(x: Tensor, shape: Sequence[Any], spec: ChainSpec, fmt: torch.memory_format) -> Tensor:
    out = x.new_empty(shape).to(memory_format=fmt)
    if spec.pool is None:
        return out
    return x.new_empty((*shape[:2], *spec.pool.out_size(shape[2:]))).to(memory_format=fmt)


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
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    text: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    like, it = [x, residual], iter(weights)
    for unit in RowSpec.decode(text).all_units:
        weight = next(it) if unit.conv is not None else None
        channels = weight.shape[0] if weight is not None else x.shape[1]
        vector = x.new_empty(channels, dtype=vector_dtype(x.dtype))
        like += [weight if name == "weight" else vector for name in unit.param_names]
    return [torch.empty_like(t) for t, need in zip(like, needs, strict=True) if need and t is not None]


class _Row(torch.autograd.Function):
    """The gradient of fused_resnet::chain with respect to x, the residual (if any) and the parameters, as a flat list.

    ``torch.library.register_autograd`` would pack and unpack nested lists in every call, which takes a fifth of a small
    chain's time.

    PyTorch raises an error if a tensor that it saved changes before the backward. The tensors that its own operators
    would save are saved here too, so the same changes raise. The others are kept as ``ctx.rest`` with their versions:
    the backward does not read their values, except to be differentiable itself, where a change raises.
    """

    @staticmethod
    def forward(ctx: Any, below: Any, text: str, has_residual: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.text, ctx.forced, ctx.has_residual = text, forced(), has_residual
        output = _redispatch(below, *_row_arguments(tensors, has_residual), text)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.saves = _saves(text, has_residual, *(t.requires_grad for t in tensors))
        ctx.rest = [(t, _version(t)) for t, saves in zip(tensors, ctx.saves, strict=True) if not saves]
        # Autograd saves no inference tensor. Plain PyTorch saves x only for a weight's gradient, so inference tensors
        # as images may train the norms after a convolution that is not trained. Here a copy of them is saved.
        given = [t.clone() if t.is_inference() and i <= has_residual else t for i, t in enumerate(tensors)]
        kept = [t for t, saves in zip(given, ctx.saves, strict=True) if saves]
        ctx.save_for_backward(*kept, *output[1:])
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * (3 + len(ctx.saves))
        kept = iter(ctx.saved_tensors)  # read once: at the first read a checkpoint computes them again
        others = iter(ctx.rest)
        given = [(next(kept), None) if saves else next(others) for saves in ctx.saves]
        x, residual, params = _row_arguments([t for t, _ in given], ctx.has_residual)
        saved = list(kept)
        wanted = ctx.needs_input_grad[3:]
        needs = [wanted[0], ctx.has_residual and wanted[1], *wanted[1 + ctx.has_residual :]]
        batched = torch._C._functorch.is_legacy_batchedtensor(dout)  # is_grads_batched=True
        if torch.is_grad_enabled() or batched or transformed():
            if any(then is not None and _version(t) != then for t, then in given):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    "a chain's backward that is itself differentiated needs all parameters as they were"
                )
            found = iter(_differentiable_backward(dout, x, residual, params, ctx.text, needs))
        else:
            weights = [params[i] for i in _weights(ctx.text)]
            with forced_again(ctx.forced):
                ops = torch.ops.fused_resnet
                found = iter(ops.chain_backward(dout, x, residual, weights, saved, ctx.text, needs))
        return None, None, None, *[next(found) if need else None for need in wanted]


@lru_cache(maxsize=4096)
def _saves(text: str, has_residual: bool, x: bool, *wants: bool) -> list[bool]:
    """Which of x, the residual (if any) and the parameters ``_Row`` saves, given which of them need a gradient.

    As in PyTorch: a convolution saves its input and its weight, a norm saves all but its bias, if their output needs a
    gradient. x and the residual are also saved if the backward computes z or the first convolution again from them.
    """
    row = RowSpec.decode(text)
    first, shortcut = row.chains[0], row.chains[0].shortcut
    again = first.units[-1].act.name != "identity"
    saves_x = (again and shortcut.kind in ("identity", "pad")) or shortcut.pool is not None
    saves: list[bool] = []
    needs, params = x, row.split(wants[has_residual:])
    for spec, flat in zip(row.chains, params, strict=True):
        start = needs
        for i, (unit, own) in enumerate(zip(spec.all_units, spec.split(flat), strict=True)):
            before = start if i == len(spec.units) else needs  # a projection reads the chain's input
            y = before or own.get("weight", False) or own.get("bias", False) or (spec.recompute and i == 0)
            needs = before or any(own.values())
            kept = {"weight": y, "bn_weight": needs, "running_mean": needs, "running_var": needs}
            saves += [kept.get(name, False) for name in own]
            if spec is first and i in (0, len(spec.units)):
                saves_x |= y or unit.conv is None
        needs = start or any(flat)
    return [saves_x, *[again] * has_residual, *saves]


@lru_cache(maxsize=4096)
def _weights(text: str) -> list[int]:
    """The positions of the convolutions' weights among a row's parameters."""
    names = [name for unit in RowSpec.decode(text).all_units for name in unit.param_names]
    return [i for i, name in enumerate(names) if name == "weight"]


def _version(t: Tensor) -> int:
    """A number that changes with the tensor's values. PyTorch counts no changes of inference tensors."""
    return 0 if t.is_inference() else t._version


def _row_arguments(tensors: Sequence[Tensor], has_residual: bool) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    return tensors[0], tensors[1] if has_residual else None, list(tensors[1 + has_residual :])


def _redispatch(below: Any, *args: Any) -> list[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fused_resnet.chain.default.redispatch(below, *args)


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
# PyTorch asks for the module of this file, and would compare the files of all modules: a sixth of the package's import.
inspect.modulesbyfile[__file__] = __name__
torch.library.register_fake("fused_resnet::chain", _forward_fake, lib=_lib)
torch.library.register_fake("fused_resnet::chain_backward", _backward_fake, lib=_lib)
torch.library.register_fake("fused_resnet::chain_inference", _inference_fake, lib=_lib)
_lib.impl("chain", _autograd, "Autograd", with_keyset=True)
