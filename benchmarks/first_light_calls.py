"""Calls of every primitive on small shapes, and their comparison with PyTorch's operators in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from primitives import double, flat, image, vectors
from tolerances import assert_as_good, assert_close
from torch.utils._pytree import tree_leaves

from fused_resnet.backends import (
    Backend,
    BnAct,
    BnActBackward,
    BnActMaxPool,
    BnActMaxPoolBackward,
    BnBackward,
    BnCoefficients,
    BnFold,
    BnStats,
    Call,
    ConvBackward,
    ConvBiasAct,
    ConvStats,
    DyCoefficients,
    Prologue,
    Sums,
)
from fused_resnet.backends.aten import BACKEND as ATEN
from fused_resnet.spec import Act, ConvSpec, PoolSpec

# channels, output channels, image, kernel, convolution
CONVOLUTIONS = {
    "1x1": (64, 128, (9, 7), 1, ConvSpec()),
    "3x3": (64, 64, (9, 7), 3, ConvSpec(padding=(1, 1))),
    "3x3/2": (64, 128, (9, 7), 3, ConvSpec(stride=(2, 2), padding=(1, 1))),
    "1x1/2": (64, 64, (8, 6), 1, ConvSpec(stride=(2, 2))),
    "stem": (3, 64, (19, 17), 7, ConvSpec(stride=(2, 2), padding=(3, 3))),
}
RELU = Act("relu")


def small_calls(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Call[Any]]]:
    """(what it is, the call): the passes, then the convolutions."""
    name = str(dtype).removeprefix("torch.")
    for shape in ((2, 64, 15, 13), (3, 24, 7, 9)):
        for call in passes(shape, device, dtype):
            tensors = sum(torch.is_tensor(leaf) for leaf in tree_leaves(call.arguments))
            yield f"{name} {call.name}, {tensors} tensors of {shape[1]} channels", call
    for what, case in CONVOLUTIONS.items():
        for call in convolutions(case, device, dtype):
            yield f"{name} {call.name} {what}", call


def passes(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Iterator[Call[Any]]:
    """The primitives that memory bounds, with and without a summand, and those of vectors."""
    where = str(device)
    y, r, dout = (image(*shape, dtype=dtype, device=where) for _ in range(3))
    n, m = (vectors(shape[1], dtype, where) for _ in range(2))
    yield BnStats(y)
    yield BnAct(y, n, RELU)
    yield BnAct(y, n, RELU, r)
    yield BnAct(y, n, RELU, r, m)
    yield BnActBackward(dout, y, n, RELU)
    yield BnActBackward(dout, y, n, RELU, r)
    yield BnActBackward(dout, y, n, RELU, r, m)
    yield BnBackward(dout, y, DyCoefficients(*m))
    pool = PoolSpec.make(3, 2, 1)
    pooled = BnActMaxPool(y, n, RELU, pool)
    yield pooled
    out, place = pooled.on(ATEN)
    yield BnActMaxPoolBackward(out, place, y, n, RELU, pool)
    yield BnFold(n.center, n.rstd, m.scale, m.shift, None, 1e-5)
    yield BnCoefficients(n, Sums(m.scale, m.shift), 1000)


def convolutions(case: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Iterator[Call[Any]]:
    """Of inference, and of training with a prologue and without."""
    c, k, size, kernel, conv = case
    where = str(device)
    out = conv.out_size(size, (kernel, kernel))
    x, add = (image(2, c, *size, dtype=dtype, device=where) for _ in range(2))
    dz, y = (image(2, k, *out, dtype=dtype, device=where) for _ in range(2))
    weight = (torch.randn(k, c, kernel, kernel) / (c * kernel * kernel) ** 0.5).to(device)
    bias, coef = torch.randn(k).to(device), DyCoefficients(*vectors(k, dtype, where))
    before = Prologue(vectors(c, dtype, where), RELU)
    yield ConvBiasAct(x, weight.to(dtype), bias, conv, RELU, y)
    yield ConvStats(x, weight, conv, None, True)
    yield ConvBackward(dz, y, coef, x, None, weight, conv, True, True, add)
    if c > 3:  # no prologue comes before a network's first convolution
        yield ConvStats(x, weight, conv, before, True)
        yield ConvBackward(dz, y, coef, x, before, weight, conv, True, True, None)


def compared(call: Call[Any], backend: Backend, config: Any = None) -> str:
    """ "ok", or why the backend declines the call, how it fails, or which result is too far from float64's.

    ``config``: one of the backend's configurations.
    """
    if call.vector and not backend.offers(type(call)):
        return "declined: aten serves it"
    if not call.vector and (refusal := backend.declines(type(call), call.case)) is not None:
        return f"declined: {refusal}"
    dtype = next(leaf.dtype for leaf in tree_leaves(call.arguments) if torch.is_tensor(leaf))
    try:
        plain = flat(call.again().on(ATEN))
        truth = flat(type(call)(*double(tuple(call.arguments))).on(ATEN))
        with backend.configured(config) if config is not None else nullcontext():
            got = flat(call.again().on(backend))
        for i, (g, p, t) in enumerate(zip(got, plain, truth, strict=True)):
            if not t.is_floating_point():  # places of maxima, of which equal ones are equally good
                continue
            if dtype == torch.float32:
                assert_close(f"result {i}", g, t, t.numel() * 64)
            else:
                assert_as_good(f"result {i}", [g], [p], [t], dtype)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return "ok"
