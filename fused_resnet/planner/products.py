"""Chooses which passes of a chain's convolutions run as products of matrices of patches (``ConvSpec.products``).

A backend may have such a product beside the library's convolution. Which of the two is faster depends on the processor
and on the sizes, so both are timed (``sizes.py``), once per signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import Call, primitives, vector_dtype
from fused_resnet.backends.values import DyCoefficients
from fused_resnet.planner import sizes
from fused_resnet.planner.preference import pick
from fused_resnet.spec import ConvSpec

# The bits of ``ConvSpec.products``.
OUTPUT, INPUT_GRADIENT, WEIGHT_GRADIENT = 1, 2, 4
_PASSES = (OUTPUT, INPUT_GRADIENT, WEIGHT_GRADIENT)
# Seconds that one timed call should take.
_CALL_S = 0.01


def products(x: Tensor, weight: Tensor, conv: ConvSpec, passes: int) -> int:
    """The passes among ``passes`` that are faster as products of patches.

    Args:
        x: an input of the convolution, of which only the shape, the dtype and the layout count. weight: its weight.
    """
    return sum(bit for bit in _PASSES if passes & bit and _pays(x, weight, conv, bit))


def chosen(x: Tensor, weight: Tensor, conv: ConvSpec) -> int:
    """The passes that are known to be faster. Measures nothing."""
    found = {bit: sizes.known(_signature(x, weight, conv, bit)) for bit in _PASSES}
    return sum(bit for bit, answer in found.items() if answer is not None and answer.pays)


def _signature(x: Tensor, weight: Tensor, conv: ConvSpec, bit: int) -> str:
    return f"products {bit} {conv.text} {'x'.join(map(str, weight.shape))} {sizes.size(x.shape, x.dtype)}"


def _pays(x: Tensor, weight: Tensor, conv: ConvSpec, bit: int) -> bool:
    primitive: type[Call[Any]] = primitives.ConvStats if bit == OUTPUT else primitives.ConvBackward
    ways = [replace(conv, products=bit), replace(conv, products=0)]
    backend = pick(primitive, primitives.ConvStats(x, weight, conv, None, False).case)
    names = [backend.algorithm(primitive, x, weight, way, False) for way in ways]
    if names[0] == names[1]:
        return False
    calls = partial(_calls, x, weight, ways, bit)
    found = sizes.faster(_signature(x, weight, conv, bit), x.shape[0], calls, _CALL_S)
    return found is not sizes.CHAINS and found.pays


def _calls(x: Tensor, weight: Tensor, ways: Sequence[ConvSpec], bit: int, images: int) -> tuple[sizes.Call, ...]:
    """The convolution as products of patches, and as it runs otherwise, on random images."""
    a = sizes.images((images, *x.shape[1:]), x.dtype, True)
    own = weight.detach()
    if bit == OUTPUT:
        calls: list[Call[Any]] = [primitives.ConvStats(a, own, way, None, False) for way in ways]
    else:
        y = sizes.images(ways[0].out_shape(a.shape, own.shape), x.dtype, True)
        coef = DyCoefficients(torch.ones(y.shape[1], dtype=vector_dtype(x.dtype)), None, None, y.new_zeros(y.shape[1]))
        needs = bit == INPUT_GRADIENT, bit == WEIGHT_GRADIENT
        calls = [primitives.ConvBackward(y, y, coef, a, None, own, way, *needs, None) for way in ways]
    backend = pick(type(calls[0]), calls[0].case)
    ours, plain = (partial(torch.no_grad()(call.on), backend) for call in calls)
    return ours, plain
