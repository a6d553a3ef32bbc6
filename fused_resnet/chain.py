"""The chain's forward and backward, composed of primitives, and the operators that PyTorch sees.

    forward    y_i = conv(act(s_{i-1} y_{i-1} + t_{i-1}), W_i)       z_i = s_i y_i + t_i,  s = gamma r,  t = beta - mu s
               out = act(z_k + shortcut(x))                             r = 1/sqrt(var + eps)
    backward   dz = dout act'(z)      dbeta = sum dz      dgamma = r sum dz (y - mu)
               dy = A dz + B (y - mu) + C                 A = s,  B = -s r dgamma / M,  C = -s dbeta / M  (frozen: A dz)

Kept for the backward: x, the raw convolution outputs y_i, the batch's mean and variance per channel, and the
parameters; z and act(z) are computed again, by the expression the forward used, where they are needed.

Two operators, functional, traceable, with fake kernels:
    fused_resnet::chain            (x, residual, params, spec) -> [out, y..., mean, var ..., argmax]
    fused_resnet::chain_backward   (dout, x, residual, params, saved, spec, needs) -> one gradient per true ``needs``
and fused_resnet::chain_inference for running statistics without gradients, where BatchNorm folds into W and b.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet import reference
from fused_resnet.backends import DyCoefficients, Norm, Prologue, Sums, forced, forced_again, load, vector_dtype
from fused_resnet.planner import case_of, pick, run
from fused_resnet.spec import Act, ChainSpec, ConvSpec, PoolSpec, UnitSpec

_lib = torch.library.Library("fused_resnet", "DEF")
_lib.define("chain(Tensor x, Tensor? residual, Tensor[] params, str spec) -> Tensor[]")
_lib.define(
    "chain_backward(Tensor dout, Tensor x, Tensor? residual, Tensor[] params, Tensor[] saved, str spec, bool[] needs)"
    " -> Tensor[]"
)
_lib.define("chain_inference(Tensor x, Tensor? residual, Tensor[] params, str spec) -> Tensor")


# ---------------------------------------------------------------------------------------------------- small pieces
def memory_format(x: Tensor, params: Sequence[Tensor]) -> torch.memory_format:
    """The layout in which a chain works: channels_last as soon as x or a weight is, as PyTorch's convolutions."""
    if any(_channels_last(t) for t in (x, *params) if t.dim() == 4):
        return torch.channels_last
    return torch.contiguous_format


def _channels_last(t: Tensor) -> bool:
    """ATen's suggest_memory_format: by strides, which tell the layout where sizes of 1 make a tensor dense in both."""
    if t.stride(1) == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if t.shape[d] == 0 or t.stride(d) < least or (d == 0 and least == t.stride(1)):
            return False
        least = t.stride(d) * t.shape[d]
    return True


def fold(p: dict[str, Tensor], mean: Tensor, var: Tensor, eps: float, wide: torch.dtype, vectors: Any = None) -> Norm:
    """The unit's BatchNorm as vectors, by the backend ``vectors`` (aten)."""
    vectors = vectors or load("aten")[0]
    bias = p.get("bias") if "running_mean" in p else None
    norm: Norm = vectors.bn_fold(mean.to(wide), var.to(wide), p.get("bn_weight"), p.get("bn_bias"), bias, eps)
    return norm


class _Gradients(NamedTuple):
    """What one unit's backward yields: the gradients of its parameters by name, and how dy is formed."""

    params: dict[str, Tensor]
    coef: DyCoefficients


def _unit_gradients(unit: UnitSpec, norm: Norm, sums: Sums, y: Tensor, vectors: Any) -> _Gradients:
    """dgamma, dbeta (and the convolution bias's) from the sums; A, B, C of dy."""
    dgamma, coef = vectors.bn_coefficients(norm, sums, y.numel() // y.shape[1] if unit.batch_stats else None)
    grads = {"bn_weight": dgamma, "bn_bias": sums.dz}
    if unit.conv is not None and unit.conv.bias:
        # y minus its mean does not depend on the bias
        grads["bias"] = torch.zeros_like(sums.dz) if unit.batch_stats else norm.scale * sums.dz
    return _Gradients(grads, coef)


# ---------------------------------------------------------------------------------------------------- forward
def _conv(
    x: Tensor, p: dict[str, Tensor], conv: ConvSpec, prologue: Prologue | None, stats: bool, fmt: torch.memory_format
) -> tuple[Tensor, Any, Any]:
    y, mean, var = run("conv_stats", x, p["weight"], conv, prologue, stats)
    # a copy only where sizes of 1 leave a convolution another layout than the chain's
    return y.contiguous(memory_format=fmt), mean, var


def _unit_forward(
    x: Tensor, p: dict[str, Tensor], unit: UnitSpec, prologue: Prologue | None, fmt: torch.memory_format
) -> tuple[Tensor, Norm, list[Tensor]]:
    """y, its normalisation, and [mean, var] when they are this batch's."""
    if unit.conv is not None:
        y, mean, var = _conv(x, p, unit.conv, prologue, unit.batch_stats, fmt)
    else:
        y = x
        mean, var = run("bn_stats", x) if unit.batch_stats else (None, None)
    wide, vectors = vector_dtype(x.dtype), pick("bn_fold", case_of(x))
    if unit.batch_stats:
        return y, fold(p, mean, var, unit.eps, wide, vectors), [mean, var]
    return y, fold(p, p["running_mean"], p["running_var"], unit.eps, wide, vectors), []


def _forward(x: Tensor, residual: Tensor | None, params: Sequence[Tensor], text: str) -> list[Tensor]:
    spec = ChainSpec.decode(text)
    fmt = memory_format(x, params)
    x = x.contiguous(memory_format=fmt)
    parts = spec.split(params)
    ys: list[Tensor] = []
    stats: list[Tensor] = []
    h, prologue = x, None
    for i, (unit, p) in enumerate(zip(spec.units, parts, strict=False)):
        h, norm, unit_stats = _unit_forward(h, p, unit, prologue, fmt)
        prologue = Prologue(norm, unit.act)
        stats += unit_stats
        if unit.conv is not None and not (spec.recompute and i == 0):
            ys.append(h)
    assert prologue is not None
    if spec.pool is not None:
        out, argmax = run("bn_act_max_pool", h, *prologue, spec.pool)
        return [out, *ys, *stats, argmax]
    summand, summand_norm = _summand(x, residual, spec, fmt), None
    if spec.shortcut.unit is not None:
        assert summand is not None
        summand, summand_norm, unit_stats = _unit_forward(summand, parts[-1], spec.shortcut.unit, None, fmt)
        ys.append(summand)
        stats += unit_stats
    out = run("bn_act", h, *prologue, summand, summand_norm)
    return [out, *ys, *stats]


def _summand(x: Tensor, residual: Tensor | None, spec: ChainSpec, fmt: torch.memory_format) -> Tensor | None:
    """The tensor that the shortcut starts from: x, x averaged or strided and padded, or somebody else's."""
    if spec.shortcut.kind == "none":
        return None
    summand = residual if spec.shortcut.kind == "tensor" else reference.shortcut_input(x, spec.shortcut)
    assert summand is not None
    return summand.contiguous(memory_format=fmt)


def _inference(x: Tensor, residual: Tensor | None, params: Sequence[Tensor], text: str) -> Tensor:
    """BatchNorm with running statistics folded into the convolutions, conv(x, s W) + t, and into a closing max-pool."""
    spec = ChainSpec.decode(text)
    fmt = memory_format(x, params)
    x = x.contiguous(memory_format=fmt)
    parts = spec.split(params)
    wide, vectors = vector_dtype(x.dtype), pick("bn_fold", case_of(x))

    def unit(h: Tensor, p: dict[str, Tensor], u: UnitSpec, act: Act, summand: Tensor | None) -> Tensor:
        norm = fold(p, p["running_mean"], p["running_var"], u.eps, wide, vectors)
        if u.conv is None:
            bn_act: Tensor = run("bn_act", h, norm, act, summand, None)
            return bn_act
        weight = p["weight"].to(wide) * norm.scale[:, None, None, None]
        out: Tensor = run("conv_bias_act", h, weight, norm.shift, u.conv, act, summand)
        return out

    summand = _summand(x, residual, spec, fmt)
    if spec.shortcut.unit is not None:
        assert summand is not None
        summand = unit(summand, parts[-1], spec.shortcut.unit, Act("identity"), None)
    h = x
    for u, p in zip(spec.units[:-1], parts, strict=False):
        h = unit(h, p, u, u.act, None)
    last, p = spec.units[-1], parts[len(spec.units) - 1]
    if spec.pool is None:
        h = unit(h, p, last, last.act, summand)
    else:
        # the pool normalises what it loads: nothing to fold into W, and no tensor of places as wide as PyTorch's
        y, norm, _ = _unit_forward(h, p, last, None, fmt)
        h = _max_pool(y, norm, last.act, spec.pool)
    # an operator's output may be none of its inputs
    return h.clone() if h is x or h is residual else h


def _max_pool(y: Tensor, norm: Norm, act: Act, pool: PoolSpec) -> Tensor:
    backend = pick("bn_act_max_pool", case_of(y))
    aten: Any = load("aten")[0]
    if backend is aten:  # which would work out the places as well, in operators of their own
        a = aten.bn_act(y, norm, act)
        return torch.nn.functional.max_pool2d(a, pool.kernel, pool.stride, pool.padding)
    out: Tensor = backend.bn_act_max_pool(y, norm, act, pool)[0]
    return out


# ---------------------------------------------------------------------------------------------------- backward
def _backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor | None,
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    text: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    spec = ChainSpec.decode(text)
    fmt = memory_format(x, params)
    like = [x, residual, *params]
    x, dout = x.contiguous(memory_format=fmt), dout.contiguous(memory_format=fmt)
    parts = spec.split(params)
    wanted = spec.split(needs[2:])
    ys, norms, argmax = _recall(x, parts, saved, spec, fmt)
    k = len(spec.units)
    grads: list[dict[str, Tensor]] = [{} for _ in spec.all_units]
    dx: Tensor | None = None  # what the shortcut passes to x
    dresidual: Tensor | None = None

    # close: through the add and the last activation (and the stem's max-pool)
    act = spec.units[-1].act
    shortcut_sums: Sums | None = None
    if spec.pool is not None:
        dz, sums = run("bn_act_max_pool_backward", dout, argmax, ys[k - 1], norms[k - 1], act, spec.pool)
    else:
        summand = ys[k] if spec.shortcut.unit is not None else _summand(x, residual, spec, fmt)
        summand_norm = norms[k] if spec.shortcut.unit is not None else None
        dz, sums, shortcut_sums = run("bn_act_backward", dout, ys[k - 1], norms[k - 1], act, summand, summand_norm)

    # the shortcut
    kind = spec.shortcut.kind
    if kind == "tensor" and needs[1]:
        assert residual is not None
        dresidual = dz.to(residual.dtype)
    elif kind == "identity" and needs[0]:
        dx = dz
    elif kind == "pad" and needs[0]:
        dx = _pad_backward(dz, x, spec)

    closing, vectors = dz, pick("bn_coefficients", case_of(x))

    # the units, last to first
    for i in range(k - 1, -1, -1):
        unit, y = spec.units[i], ys[i]
        g = _unit_gradients(unit, norms[i], sums, y, vectors)
        grads[i] |= g.params
        need_input = needs[0] or any(any(w.values()) for w in wanted[:i])
        if unit.conv is None:
            if need_input:
                dy = run("bn_backward", dz, y, g.coef)
                dx = dy if dx is None else dx + dy
            continue
        prologue = Prologue(norms[i - 1], spec.units[i - 1].act) if i else None
        start = ys[i - 1] if i else x
        if i or need_input or wanted[i]["weight"]:
            add = None if i else dx
            dz, dw, sums = _conv_backward(
                dz, y, g.coef, start, prologue, parts[i], unit, need_input, wanted[i]["weight"], add
            )
            if dw is not None:
                grads[i]["weight"] = dw
            if i == 0:
                dx = dz
            elif not need_input:
                break

    # the projection adds its own gradient to x
    if spec.shortcut.unit is not None:
        assert shortcut_sums is not None
        g = _unit_gradients(spec.shortcut.unit, norms[k], shortcut_sums, ys[k], vectors)
        # its dbeta is the last unit's, and an operator's outputs share no memory
        grads[k] = g.params | {"bn_bias": shortcut_sums.dz.clone()}
        start = reference.shortcut_input(x, spec.shortcut).contiguous(memory_format=fmt)
        pooled = spec.shortcut.pool
        dstart, dw, _ = _conv_backward(
            closing, ys[k], g.coef, start, None, parts[k], spec.shortcut.unit, needs[0], wanted[k]["weight"],
            dx if pooled is None else None,
        )  # fmt: skip
        if dw is not None:
            grads[k]["weight"] = dw
        if pooled is None or dstart is None:
            dx = dstart
        else:
            dx = dx + torch.ops.aten.avg_pool2d_backward(
                dstart.to(x.dtype), x, pooled.kernel, pooled.stride, pooled.padding, pooled.ceil_mode,
                pooled.count_include_pad, None,
            )  # fmt: skip

    have: list[Tensor | None] = [dx, dresidual]
    for p, g_ in zip(parts, grads, strict=True):
        have += [g_.get(name) for name in p]
    return [
        _like(g, t)
        for g, t, need in zip(have, like, needs, strict=True)
        if need and t is not None  # in order
    ]


def _recall(
    x: Tensor, parts: list[dict[str, Tensor]], saved: Sequence[Tensor], spec: ChainSpec, fmt: torch.memory_format
) -> tuple[list[Tensor], list[Norm], Tensor]:
    """The raw outputs (x where there was no convolution), their normalisations and the pool's argmax, as in forward."""
    it = iter(saved)
    ys: list[Tensor] = []
    for i, (unit, p) in enumerate(zip(spec.all_units, parts, strict=True)):
        if unit.conv is None:
            ys.append(x)
        elif spec.recompute and i == 0:
            ys.append(_conv(x, p, unit.conv, None, False, fmt)[0])
        else:
            ys.append(next(it))
    wide, vectors = vector_dtype(x.dtype), pick("bn_fold", case_of(x))
    norms = []
    for unit, p in zip(spec.all_units, parts, strict=True):
        mean, var = (next(it), next(it)) if unit.batch_stats else (p["running_mean"], p["running_var"])
        norms.append(fold(p, mean, var, unit.eps, wide, vectors))
    return ys, norms, next(it, x)


def _conv_backward(
    dz: Tensor,
    y: Tensor,
    coef: DyCoefficients,
    start: Tensor,
    prologue: Prologue | None,
    p: dict[str, Tensor],
    unit: UnitSpec,
    need_input: bool,
    need_weight: bool,
    add: Tensor | None,
) -> Any:
    if not (need_input or need_weight):
        return None, None, None
    assert unit.conv is not None
    return run(
        "conv_backward", dz, y, coef, start, prologue, p["weight"], unit.conv, need_input, need_weight, add
    )  # fmt: skip


def _pad_backward(dz: Tensor, x: Tensor, spec: ChainSpec) -> Tensor:
    """Option A: the gradient of x's own channels, back at the pixels that were taken."""
    dx = torch.zeros_like(x, dtype=dz.dtype)
    dx[:, :, :: spec.shortcut.stride[0], :: spec.shortcut.stride[1]] = dz[:, : x.shape[1]]
    return dx


def _like(g: Tensor | None, t: Tensor) -> Tensor:
    """The gradient in its tensor's dtype and strides (autograd would otherwise copy it later), zero where none came."""
    if g is None:
        return torch.zeros_like(t)
    g = g.to(t.dtype)
    strides = torch.empty_like(t, device="meta").stride()
    if g.stride() == strides:
        return g
    if all(n == 1 or have == want for n, have, want in zip(t.shape, g.stride(), strides, strict=True)):
        return g.as_strided(t.shape, strides)
    return torch.empty_like(t).copy_(g)


# ---------------------------------------------------------------------------------------------------- registration
def unit_shapes(x: Tensor, params: Sequence[Tensor], spec: ChainSpec) -> list[tuple[Any, ...]]:
    """The shape of every unit's y, projection last (sizes may be symbolic)."""
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
    spec = ChainSpec.decode(text)
    fmt = memory_format(x, params)
    wide = vector_dtype(x.dtype)
    shapes = unit_shapes(x, params, spec)
    k = len(spec.units)
    outs = [_closing_fake(x, shapes[k - 1], spec, fmt)]
    for i, (unit, shape) in enumerate(zip(spec.all_units, shapes, strict=True)):
        if unit.conv is not None and not (spec.recompute and i == 0):
            outs.append(x.new_empty(shape).to(memory_format=fmt))
    for unit, shape in zip(spec.all_units, shapes, strict=True):
        if unit.batch_stats:
            outs += [x.new_empty(shape[1], dtype=wide), x.new_empty(shape[1], dtype=wide)]
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
    spec = ChainSpec.decode(text)
    fmt = memory_format(x, params)
    return _closing_fake(x, unit_shapes(x, params, spec)[len(spec.units) - 1], spec, fmt)


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, residual, params, ctx.text = inputs
    ctx.forced = forced()
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.has_residual = residual is not None
    ctx.n_params = len(params)
    ctx.save_for_backward(x, *([residual] if ctx.has_residual else []), *params, *output[1:])


def _autograd(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    dout = grads[0]
    x, *rest = ctx.saved_tensors
    residual = rest.pop(0) if ctx.has_residual else None
    params, saved = rest[: ctx.n_params], rest[ctx.n_params :]
    if dout is None:
        return None, None, [None] * len(params), None
    flat_needs = [ctx.needs_input_grad[0], ctx.has_residual and ctx.needs_input_grad[1]]
    param_needs = ctx.needs_input_grad[2]
    needs = flat_needs + (list(param_needs) if isinstance(param_needs, list | tuple) else [param_needs] * len(params))
    if torch.is_grad_enabled():
        found = _differentiable_backward(dout, x, residual, params, ctx.text, needs)
    else:
        with forced_again(ctx.forced):
            found = torch.ops.fused_resnet.chain_backward(dout, x, residual, params, saved, ctx.text, needs)
    it = iter(found)
    flat = [next(it) if need else None for need in needs]
    return flat[0], flat[1], flat[2:], None


def _differentiable_backward(
    dout: Tensor, x: Tensor, residual: Tensor | None, params: list[Tensor], text: str, needs: list[bool]
) -> Sequence[Tensor]:
    """create_graph=True: the gradients by plain PyTorch, so that they can be differentiated again."""
    wide = vector_dtype(x.dtype)
    # a view each: a tensor that comes twice (a residual that is x, a shared weight) has one gradient per place
    given = [None if t is None else t.view_as(t) for t in (x, residual, *params)]
    a, r, *rest = [None if t is None else t.to(wide) for t in given]
    assert a is not None
    out = reference.chain(a, r, [p for p in rest if p is not None], ChainSpec.decode(text)).out
    inputs = [t for t, need in zip(given, needs, strict=True) if need and t is not None]
    return torch.autograd.grad(out, inputs, dout.to(wide), create_graph=True, allow_unused=True, materialize_grads=True)


def _below_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """A chain chooses its own dtypes: autocast must not cast again inside it."""

    @wraps(function)
    def run(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return function(*args)

    return run


_lib.impl("chain", _below_autocast(_forward), "CompositeExplicitAutograd")
_lib.impl("chain_backward", _below_autocast(_backward), "CompositeExplicitAutograd")
_lib.impl("chain_inference", _below_autocast(_inference), "CompositeExplicitAutograd")
torch.library.register_fake("fused_resnet::chain", _forward_fake, lib=_lib)
torch.library.register_fake("fused_resnet::chain_backward", _backward_fake, lib=_lib)
torch.library.register_fake("fused_resnet::chain_inference", _inference_fake, lib=_lib)
torch.library.register_autograd("fused_resnet::chain", _autograd, setup_context=_setup_context, lib=_lib)
