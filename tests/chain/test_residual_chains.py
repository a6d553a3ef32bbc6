"""residual_chains, the function: several chains in one row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stages import images
from torch import Tensor

from fused_resnet import functional


def blocks(x: Tensor) -> list[functional.Chain]:
    """A projection block and an identity one, training, on x's channels."""

    def unit(cin: int, cout: int, kernel: int = 3, **options: Any) -> functional.Unit:
        return functional.Unit(
            torch.randn(cout, cin, kernel, kernel, dtype=x.dtype) / cin**0.5, torch.randn(cout, dtype=x.dtype),
            torch.randn(cout, dtype=x.dtype), padding=kernel // 2, training=True, **options,
        )  # fmt: skip

    c = x.shape[1]
    first = functional.Chain([unit(c, 6, stride=2), unit(6, 6)], unit(c, 6, 1, stride=2, act=None))
    return [first, functional.Chain([unit(6, 6, act="silu"), unit(6, 6, act=("elu", 0.5))])]


def test_residual_chains(backend: str) -> None:
    """As ``residual_chain`` one after the other."""
    x = images().requires_grad_()
    chains = blocks(x)
    weights = [u.weight.requires_grad_() for c in chains for u in c.everyone]  # type: ignore[union-attr]
    want = x
    for c in chains:
        want = functional.residual_chain(want, c.units, shortcut=c.shortcut)
    got = functional.residual_chains(x, chains)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.sin().sum(), [x, *weights]) for out in (got, want)]
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w)
    assert functional.residual_chains(x[:0], chains).shape == (0, *want.shape[1:])


def test_bad_input() -> None:
    x = images()
    for chains, error, text in (
        ([], ValueError, r"^chains: expected at least one Chain, got \[\]"),
        ([x], TypeError, r"^chains\[0\]: expected a Chain, got Tensor"),
        ([*blocks(x), blocks(x)[0]], ValueError, r"^weight: expected 6 input channels \(chain 2, unit 0's input\)"),
        ([blocks(x)[0], functional.Chain(blocks(x)[1].units[:1], blocks(x)[0].shortcut)], ValueError,
         r"^weight: expected 6 input channels \(chain 1, shortcut's input\)"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            functional.residual_chains(x, chains)
    with pytest.raises(ValueError, match="^units: expected at least one Unit"):
        functional.Chain([])
    with pytest.raises(ValueError, match="^shortcut: expected 'identity', 'pad'"):
        functional.Chain(blocks(x)[0].units, "projection")
