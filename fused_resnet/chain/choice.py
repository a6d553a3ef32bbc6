"""Chooses the algorithms of a row's convolutions for a kind of input, where a backend has several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fused_resnet.base.layouts import channels_last, is_channels_last
from fused_resnet.chain.encoding import Row
from fused_resnet.chain.forward import memory_format
from fused_resnet.chain.operators import unit_shapes
from fused_resnet.planner import sizes
from fused_resnet.planner.products import INPUT_GRADIENT, OUTPUT, WEIGHT_GRADIENT, products
from fused_resnet.spec import ChainSpec

# Kinds of inputs that a row keeps.
_KEPT = 64
_OWN_TENSORS = (Tensor, nn.Parameter)


def text(x: Tensor, params: Sequence[Tensor], row: Row, begin: int, end: int) -> str:
    """The text of the chains from ``begin`` to before ``end``, for the operators.

    Args:
        x: the input of the first of them. params: their tensors, as the operators take them.
    """
    if torch.compiler.is_compiling() or type(x) not in _OWN_TENSORS or not x.is_cpu or not sizes.has_choice():
        return row.text(begin, end)
    grad = torch.is_grad_enabled()
    kind = begin, end, x.shape, x.dtype, is_channels_last(x), x.requires_grad, grad, torch.get_num_threads()
    found = row.choices.get(kind)
    if found is None:
        if len(row.choices) >= _KEPT:
            row.choices.clear()
        chosen = list(_products(x, params, row.specs[begin:end], grad))
        found = row.text_with(begin, end, chosen) if any(chosen) else row.text(begin, end)
        row.choices[kind] = found
    return found


def _products(x: Tensor, params: Sequence[Tensor], specs: Sequence[ChainSpec], grad: bool) -> Iterator[int]:
    """``ConvSpec.products`` of every unit with a convolution."""
    if memory_format(x, params) == torch.contiguous_format:
        return
    it, shape = iter(params), tuple(x.shape)
    for number, spec in enumerate(specs):
        tensors = [next(it) for _ in range(spec.n_params)]
        outputs = unit_shapes(torch.empty(shape, device="meta"), tensors, spec)
        starts = [shape, *outputs[: len(spec.units) - 1]]
        if spec.shortcut.unit is not None:
            pool = spec.shortcut.pool
            starts.append(shape if pool is None else (*shape[:2], *pool.out_size(shape[2:])))
        for place, (unit, own, start) in enumerate(zip(spec.all_units, spec.split(tensors), starts, strict=True)):
            if unit.conv is None:
                continue
            first = number == 0 and place in (0, len(spec.units))
            passes = OUTPUT
            if grad and (x.requires_grad or not first):
                passes |= INPUT_GRADIENT
            if grad and own["weight"].requires_grad:
                passes |= WEIGHT_GRADIENT
            like = torch.empty(start, dtype=x.dtype)
            like = torch.empty(start, dtype=x.dtype, memory_format=channels_last(like))
            yield products(like, own["weight"], unit.conv, passes)
        shape = outputs[len(spec.units) - 1]
