"""What tests of single primitives share: inputs that hide no mistake, and the comparison with aten in float64."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

import torch
from tolerances import assert_as_good, assert_close
from torch import Tensor

from fused_resnet.backends import Call, Norm, vector_dtype
from fused_resnet.backends import primitives as calls
from fused_resnet.backends.aten import BACKEND as ATEN
from fused_resnet.backends.cpu import BACKEND as CPU

CALLS = {c.name: c for c in vars(calls).values() if is_dataclass(c) and issubclass(c, Call)}


class Positional:
    """A backend, or a module of primitives, that takes a call's arguments: ``aten.bn_act(y, norm, act)``."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.of, name)
        return function if name not in CALLS else lambda *args: function(CALLS[name](*args))


aten, cpu = Positional(ATEN), Positional(CPU)


def image(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """channels_last, mean 0.7, standard deviation 1.5."""
    return (torch.randn(shape) * 1.5 + 0.7).to(device, dtype).contiguous(memory_format=torch.channels_last)


def vectors(channels: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Norm:
    """For tensors of ``dtype``; scales of both signs."""
    scale, shift, center, rstd = (torch.randn(channels, dtype=vector_dtype(dtype)) for _ in range(4))
    return Norm(*(v.to(device) for v in (scale, shift, center, rstd.exp())))


def double(value: Any) -> Any:
    """The same in float64, tensors inside tuples too."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        found = [double(v) for v in value]
        return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
    return value


def flat(value: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value if v is not None for t in flat(v)] if isinstance(value, tuple) else []


def check(name: str, module: Any, args: tuple[Any, ...], count: int) -> Any:
    """The primitive of ``module`` against aten's in float64, 16-bit results by the error of aten in the same dtype.

    ``count``: terms of the longest sum behind a vector.
    """
    result = getattr(module, name)(*args)
    got, plain, truth = (flat(r) for r in (result, getattr(aten, name)(*args), getattr(aten, name)(*double(args))))
    for i, (g, p, t) in enumerate(zip(got, plain, truth, strict=True)):
        assert g.dtype == p.dtype and g.shape == p.shape, f"{name}[{i}]"
        if g.dim() == 4:
            assert g.is_contiguous(memory_format=torch.channels_last)
        if not g.numel():
            continue
        if g.dtype in (torch.bfloat16, torch.float16):
            assert_as_good(f"{name}[{i}]", [g], [p], [t], g.dtype)
        else:
            # a sum's terms are as large as the sum of their absolute values, not as the sum
            assert_close(f"{name}[{i}]", g, t, 4 if g.dim() == 4 else 4 * max(count, 1), g.dtype)
    return result
