"""How near is near enough, stated once.

float32 and float64: torch.testing's defaults, scaled by the square root of the longest sum behind an element (rounding
errors of a sum of n terms grow like sqrt(n)); the absolute one, meant for values of order 1, also by the tensor's
largest element (one near zero is a difference of terms as large as its neighbours). 16 bits: the error against the
float64 reference is at most twice that of plain PyTorch in the same dtype on the same input.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

# torch.testing.assert_close's own (rtol, atol)
DEFAULT = {torch.float32: (1.3e-6, 1e-5), torch.float64: (1e-7, 1e-7)}
# Where plain PyTorch happens to be exact: this share of one rounding is allowed all the same.
FLOOR = 0.25


def tolerance(dtype: torch.dtype, reduction: int) -> dict[str, float]:
    """rtol and atol for ``torch.testing.assert_close``; ``reduction``: terms of the longest sum behind an element."""
    rtol, atol = DEFAULT[dtype]
    scale = math.sqrt(max(reduction, 1))
    return {"rtol": rtol * scale, "atol": atol * scale}


def assert_close(name: str, got: Tensor, want: Tensor, reduction: int, dtype: torch.dtype | None = None) -> None:
    """``got`` against a ``want`` of any precision; ``dtype``: in which ``got`` was computed when it is not its own."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    limits = tolerance(dtype or got.dtype, reduction)
    finite = want.detach().double()[want.isfinite()].abs()
    limits["atol"] *= max(1.0, finite.max().item() if finite.numel() else 1.0)
    torch.testing.assert_close(
        got.detach().double(),
        want.detach().double(),
        **limits,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


def error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The median over draws of the relative Euclidean error: one wrong element stands out of 16-bit rounding noise."""
    pairs = [(g.detach().double(), t.detach().double()) for g, t in zip(got, truth, strict=True)]
    errors = (((g - t).norm() / t.norm()).item() for g, t in pairs)
    return statistics.median(math.inf if math.isnan(e) else e for e in errors)


def assert_as_good(
    name: str, got: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """The 16-bit rule: error(got) <= 2 error(plain), each a sequence of draws of the same quantity."""
    for g, t in zip(got, truth, strict=True):
        assert g.shape == t.shape, f"{name}: shape {tuple(g.shape)}, expected {tuple(t.shape)}"
    ours, theirs, floor = error(got, truth), error(plain, truth), FLOOR * torch.finfo(dtype).eps
    assert ours <= 2 * theirs + floor, f"{name}: error {ours:.3g}, plain PyTorch's {theirs:.3g} (floor {floor:.1g})"
