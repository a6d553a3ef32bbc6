"""Converts callers' hyper-parameters to Python's own numbers, the only ones that the package works with.

These functions accept what PyTorch accepts for an int, a float or an int per dimension. They refuse what PyTorch
refuses, with a message that names the argument.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _numpy_scalar(value: object, kinds: str) -> bool:
    """Whether the value is a NumPy number of one of the ``kinds`` (NumPy's letters). Does not import NumPy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in kinds


def number(value: Any, name: str) -> float:
    """``value`` as a float. It may be a number of Python or NumPy (or a bool), or a 0-d tensor without a gradient.

    Raises:
        TypeError: another type. ValueError: no float64 holds the value.
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
    """``value`` as an int. It may be what Python takes as an index (a NumPy integer, a tensor of one integer), but no
    bool.

    Raises:
        TypeError: another type.
    """
    if type(value) is int:
        return value
    if not (isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected {expected}, got {value!r}")


_EXPECTED = {1: "an int", 2: "an int or two ints", 3: "an int or three ints"}


def integers(value: int | Sequence[int], name: str, minimum: int, count: int = 2) -> tuple[int, ...]:
    """``value`` as ``count`` integers, one per dimension of an image, all at least ``minimum``.

    One integer, alone or in a list or tuple, stands for all.

    Raises:
        TypeError: it is not an int or ``count`` ints. ValueError: one is below ``minimum``, or there are others than
            one or ``count``.
    """
    if type(value) is tuple and len(value) == count:  # the most frequent case, decided quickly
        for v in value:
            if type(v) is not int or v < minimum:
                break
        else:
            return value
    expected = _EXPECTED[count]
    if isinstance(value, list | tuple):
        values = [integer(v, name, expected) for v in value]
    elif isinstance(value, int | Tensor) or _numpy_scalar(value, "iu"):
        values = [integer(value, name, expected)]
    else:
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if len(values) not in (1, count):
        raise ValueError(f"{name}: expected {expected}, got {len(values)} values: {value!r}")
    if min(values) < minimum:
        raise ValueError(f"{name}: expected values >= {minimum}, got {value!r}")
    return tuple(values * count if len(values) == 1 else values)


def flag(value: Any, name: str) -> bool:
    """``value``, which must be a Python bool.

    Raises:
        TypeError: another type.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return value


def keep(spec: Any, name: str, value: Any) -> None:
    """Sets a frozen spec's field to its normalised value, only if it differs: torch.compile can't trace the setting."""
    if getattr(spec, name) is not value:
        object.__setattr__(spec, name, value)
