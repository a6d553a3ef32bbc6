"""Checks a chain's arguments before any kernel starts. Messages name the argument, what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_resnet.backends import vector_dtype
from fused_resnet.base.arguments import flag, number
from fused_resnet.chain import sync
from fused_resnet.chain.units import Unit
from fused_resnet.spec import ChainSpec, UnitSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KERNELS = {1: "kL", 2: "kH, kW", 3: "kD, kH, kW"}
BN_NAMES = ("bn_weight", "bn_bias", "running_mean", "running_var")


def check_arguments(unit: Unit, index: int, dims: int) -> None:
    """Checks the arguments of a unit that do not depend on its input, which has images of ``dims`` dimensions."""
    for name in ("weight", "bias", *BN_NAMES):
        value = getattr(unit, name)
        if value is not None:
            check_tensor(name, value)
    if (unit.running_mean is None) != (unit.running_var is None):
        came, missing = ("running_mean", "running_var") if unit.running_var is None else ("running_var", "running_mean")
        raise ValueError(f"{missing}: expected a tensor beside {came}, got None (unit {index})")
    if not unit.training and unit.running_mean is None:
        raise ValueError(f"running_mean: expected a tensor when training=False, got None (unit {index})")
    if unit.bias is not None and unit.weight is None:
        raise ValueError(f"bias: expected None for a unit without a convolution, got a tensor (unit {index})")
    if unit.process_group is not None and not sync.is_group(unit.process_group):
        raise TypeError(
            "process_group: expected a torch.distributed.ProcessGroup that this process is in, or None, "
            f"got {unit.process_group!r} (unit {index})"
        )
    check_dims(unit, dims)
    flag(unit.training, "training")
    number(unit.momentum, "momentum")


def check_dims(unit: Unit, dims: int) -> None:
    """Checks that a unit's weight is for images of ``dims`` dimensions."""
    if unit.weight is not None and unit.weight.dim() != dims + 2:
        raise ValueError(
            f"weight: expected {dims + 2} dimensions [out_channels, in_channels/groups, {_KERNELS[dims]}], as x has, "
            f"got shape {tuple(unit.weight.shape)}"
        )


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device. Some devices have no autocast."""
    kind = x.device.type
    # torch.compile of 2.11 can't trace the question, and compiles only for devices with autocast
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return kind != "meta" and available and torch.is_autocast_enabled(kind)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected dtype float32, bfloat16, float16 or float64, "
            f"got {str(value.dtype).removeprefix('torch.')}"
        )


def check_chain(
    x: Tensor, start: tuple[int, ...], residual: Tensor | None, units: Sequence[Unit], spec: ChainSpec, where: str = ""
) -> tuple[int, ...]:
    """Checks the shapes, dtypes and devices of a chain unit by unit. Returns the shape of its output.

    The chain's input has the shape ``start`` and is otherwise like x. ``where``: the chain's place, for messages.
    """
    autocast = autocasts(x)
    shape = start
    for i, (unit, s) in enumerate(zip(units[: len(spec.units)], spec.units, strict=True)):
        shape = _check_unit(f"{where}unit {i}", x, shape, unit, s, autocast)
    kind = spec.shortcut.kind
    if kind == "projection":
        pool = spec.shortcut.pool
        if pool is not None:
            pooled = pool.out_size(start[2:])
            if min(pooled) < 1:
                raise ValueError(f"shortcut_pool: the window {pool.kernel} is larger than its padded input {start[2:]}")
            start = (*start[:2], *pooled)
        assert spec.shortcut.unit is not None
        got = _check_unit(f"{where}shortcut", x, start, units[-1], spec.shortcut.unit, autocast)
        _check_sum(f"{where}shortcut", got, shape)
    elif kind == "identity":
        _check_sum(f"{where}shortcut 'identity'", start, shape)
    elif kind == "pad":
        strided = tuple(-(-n // s) for n, s in zip(start[2:], spec.shortcut.stride, strict=True))
        if start[1] > shape[1]:
            raise ValueError(f"{where}shortcut 'pad': expected at most {shape[1]} channels in x, got {start[1]}")
        _check_sum(f"{where}shortcut 'pad'", (start[0], shape[1], *strided), shape)
    elif kind == "tensor":
        check_tensor("residual", residual)
        assert residual is not None
        _check_sum("residual", tuple(residual.shape), shape)
        if residual.device != x.device:
            raise ValueError(f"residual: expected device {x.device} (x's), got {residual.device}")
        if residual.dtype != x.dtype and not autocast:
            raise TypeError(f"residual: expected dtype {x.dtype} (x's), got {residual.dtype}")
    if spec.pool is None:
        return shape
    pooled = spec.pool.out_size(shape[2:])
    if min(pooled) < 1:
        raise ValueError(f"max_pool: the window {spec.pool.kernel} is larger than its padded input {shape[2:]}")
    return (*shape[:2], *pooled)


def _check_sum(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
    if got != want:
        raise ValueError(f"{name}: expected shape {want} (the last unit's output), got {got}")


def _check_unit(
    where: str, x: Tensor, shape: tuple[int, ...], unit: Unit, s: UnitSpec, autocast: bool
) -> tuple[int, ...]:
    """Checks a unit's tensors. Returns the shape of its output."""
    if unit.weight is not None and s.conv is not None:
        w = unit.weight
        if shape[1] != w.shape[1] * s.conv.groups:
            raise ValueError(
                f"weight: expected {shape[1]} input channels ({where}'s input), got shape {tuple(w.shape)} with groups "
                f"{s.conv.groups}, that is {w.shape[1] * s.conv.groups}"
            )
        if w.dtype != x.dtype and not autocast:
            raise TypeError(f"weight: expected dtype {x.dtype} (x's), got {w.dtype} ({where})")
        size = s.conv.out_size(shape[2:], w.shape[2:])
        if min(size) < 1:
            raise ValueError(
                f"weight: the kernel {tuple(w.shape[2:])} with dilation {s.conv.dilation} is larger than its padded "
                f"input {shape[2:]} with padding {s.conv.padding} ({where})"
            )
        shape = (shape[0], w.shape[0], *size)
    for name in ("weight", "bias", *BN_NAMES):
        value = getattr(unit, name)
        if value is None:
            continue
        if value.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (x's), got {value.device} ({where})")
        if name != "weight" and tuple(value.shape) != (shape[1],):
            raise ValueError(f"{name}: expected shape ({shape[1]},), got {tuple(value.shape)} ({where})")
        if name in BN_NAMES and value.dtype not in (x.dtype, vector_dtype(x.dtype)) and not autocast:
            raise TypeError(f"{name}: expected dtype {x.dtype} or {vector_dtype(x.dtype)}, got {value.dtype} ({where})")
        if name == "bias" and unit.weight is not None and value.dtype != unit.weight.dtype:
            raise TypeError(f"bias: expected dtype {unit.weight.dtype} (weight's), got {value.dtype} ({where})")
    if shape[1] < 1:
        raise ValueError(f"x: expected at least one channel, got shape {tuple(x.shape)} ({where})")
    if s.batch_stats and s.group is None and shape[0] * math.prod(shape[2:]) == 1:
        raise ValueError(
            f"x: expected more than 1 value per channel when training, got input size {shape} "
            f"at the BatchNorm of {where}"
        )
    return shape
