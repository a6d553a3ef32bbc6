"""The properties of a primitive's arguments on which a choice depends: its case, key and signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import Case, Closing, DyCoefficients, Norm, Prologue, allow_tf32
from fused_resnet.planner.preference import case_of
from fused_resnet.spec import Act, ConvSpec, PoolSpec

# The positions of a primitive's convolution and weight among its arguments.
CONV = {"conv_bias_act": (3, 1), "conv_stats": (2, 1), "conv_backward": (6, 5)}
# The positions of conv_backward's need_input, need_weight, add, closing.
NEEDS, ADD, _CLOSING = (7, 8), 9, 10
WEIGHT_ONLY = {NEEDS[0]: False, ADD: None, _CLOSING: None}


def with_changes(args: tuple[Any, ...], changes: dict[int, Any]) -> tuple[Any, ...]:
    return tuple(changes.get(i, a) for i, a in enumerate(args))


def case_of_call(primitive: str, args: tuple[Any, ...]) -> Case:
    if primitive not in CONV:
        return case_of(args[0])
    conv, weight = CONV[primitive]
    return case_of(args[3] if primitive == "conv_backward" else args[0], args[conv], args[weight])


def key_of(primitive: str, args: tuple[Any, ...]) -> Any:
    """The key of a choice in this process."""
    return (primitive, args[0].device, tf32(primitive, args[0]), *map(_part, args))


def tf32(primitive: str, x: Tensor) -> bool:
    """Whether float32 products run in tf32, with another kernel and other times."""
    return primitive in CONV and x.device.type == "cuda" and allow_tf32(x.dtype)


def _part(a: Any) -> Any:
    """The hashable properties of an argument on which a measurement depends."""
    if isinstance(a, Tensor):
        return a.shape, a.dtype, a.is_contiguous()
    if isinstance(a, Prologue):
        return a.act
    if isinstance(a, Closing):
        return a.act, a.summand is None, a.summand_norm is None
    if isinstance(a, DyCoefficients):
        return a.b is None
    if isinstance(a, Norm):
        return True
    if isinstance(a, tuple) and not isinstance(a, ConvSpec | Act | PoolSpec):
        return len(a)
    return a


def signature(primitive: str, args: tuple[Any, ...]) -> str:
    """The key of a measurement in the cache file. Batches are rounded up to a power of two."""
    return " ".join([primitive, *(text_of(a) for a in args), *(["tf32"] if tf32(primitive, args[0]) else [])])


def text_of(a: Any) -> str:
    """The text of a primitive's argument in a signature."""
    if isinstance(a, Tensor):
        shape = list(a.shape)
        if a.dim() == 4 and shape[0] > 0:
            shape[0] = 1 << (shape[0] - 1).bit_length()
        layout = "nhwc" if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last) else ""
        return f"{str(a.dtype).removeprefix('torch.')}{layout}{'x'.join(map(str, shape))}"
    if isinstance(a, ConvSpec):
        return f"conv(stride={a.stride},padding={a.padding},dilation={a.dilation},groups={a.groups})".replace(" ", "")
    if isinstance(a, Act):
        return f"{a.name}({a.param:g})"
    if isinstance(a, Prologue):
        return f"prologue({text_of(a.act)})"
    if isinstance(a, Closing):
        summand = "" if a.summand is None else ",summand" if a.summand_norm is None else ",norm"
        return f"closing({text_of(a.act)}{summand})"
    if isinstance(a, DyCoefficients):
        return "frozen" if a.b is None else "batch"
    if isinstance(a, Norm):
        return "norm"
    if isinstance(a, PoolSpec):
        return f"pool({a.kernel},{a.stride},{a.padding})".replace(" ", "")
    if isinstance(a, tuple):
        return f"{type(a).__name__.lower()}"
    return "-" if a is None else str(a)
