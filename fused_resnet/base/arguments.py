"""Hyper-parameters as callers give them, made Python's own numbers, with which alone the package works: what PyTorch
takes for an int, a float or a pair of ints is taken here, and what it refuses is refused, by the argument's name."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _numpy_scalar(value: object, kinds: str) -> bool:
    """Whether it is a number of numpy's, of one of the ``kinds`` (numpy's letters). Numpy is not imported for it."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in kinds


def number(value: Any, name: str) -> float:
    """``value`` as a float: a number of Python's or numpy's (a bool too), or a tensor without dimensions or gradient.

    Raises:
        TypeError: something else. ValueError: no float64 holds it.
    """
    if type(value) is float or isinstance(value, torch.SymFloat):  # a tracer's: 1 / num_batches_tracked
        return value  # type: ignore[return-value]
    scalar = isinstance(value, Tensor) and value.dim() == 0 and not (value.requires_grad or value.is_complex())
    if not (scalar or isinstance(value, int | float) or _numpy_scalar(value, "biuf")):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number in float64's range, got {value!r}") from None


def integer(value: Any, name: str, expected: str = "an int") -> int:
    """``value`` as an int: what Python takes as an index (numpy's integers, tensors of one integer), but no bool.

    Raises:
        TypeError: something else.
    """
    if type(value) is int:
        return value
    if not (isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected {expected}, got {value!r}")


def pair(value: int | Sequence[int], name: str, minimum: int) -> tuple[int, int]:
    """``value`` as (height, width), both at least ``minimum``; one integer, alone or in a list or tuple, is both.

    Raises:
        TypeError: not an int or two ints. ValueError: below ``minimum`` or not two values.
    """
    if type(value) is tuple and len(value) == 2:  # soon told, most often
        h, w = value
        if type(h) is int and type(w) is int and h >= minimum and w >= minimum:
            return value
    expected = "an int or two ints"
    if isinstance(value, list | tuple):
        values = [integer(v, name, expected) for v in value]
    elif isinstance(value, int | Tensor) or _numpy_scalar(value, "iu"):
        values = [integer(value, name, expected)]
    else:
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if len(values) not in (1, 2):
        raise ValueError(f"{name}: expected {expected}, got {len(values)} values: {value!r}")
    if min(values) < minimum:
        raise ValueError(f"{name}: expected values >= {minimum}, got {value!r}")
    return values[0], values[-1]


def flag(value: Any, name: str) -> bool:
    """``value``, a bool of Python's.

    Raises:
        TypeError: something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return value
