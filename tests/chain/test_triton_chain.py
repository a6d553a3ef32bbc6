"""Whole chains on the GPU backends against the reference: Triton's interpreted, CUDA's sources compiled for a CPU."""

from __future__ import annotations

import chains
import pytest
import torch
from tolerances import assert_as_good, assert_close

from fused_resnet.backends import use_backend

pytest.importorskip("triton", reason="needs Triton")

# Every composition of primitives: units, shortcuts, the stem's tail, a convolution that others bring.
SHAPES = [
    "conv",
    "conv_asymmetric",
    "no_conv",
    "no_conv_residual",
    "no_conv_then_conv",
    "conv_residual",
    "basic",
    "basic_projection",
    "bottleneck",
    "bottleneck_projection",
    "dilated",
    "option_a",
    "resnet_d",
    "stem",
    "stem_recompute",
]
MODES = list(chains.MODES)
ACTS = list(chains.ACTS)


@pytest.mark.parametrize("shape", SHAPES)
def test_same_numbers(interpreted: str, shape: str, nan_filled: None) -> None:
    """Output, statistics and every gradient are the reference's, in BatchNorm's modes and with other activations."""
    at = SHAPES.index(shape)
    for i, mode in enumerate(("batch", "mixed", MODES[at % len(MODES)])):
        act = "relu" if i == 0 else ACTS[(at + i) % len(ACTS)]
        chain = chains.make(shape, act, mode, width=3 + 5 * (at % 2), batch=2, size=(7, 6))
        t = chains.draw(chain)
        want = chains.truth(chain, t)
        got = chains.run(chain, chains.cast(chain, t, torch.float32, torch.channels_last))
        for name, value in got.items():
            assert_close(f"{mode} {act} {name}", value, want[name], chains.reduction(chain), torch.float32)


@pytest.mark.parametrize("shape", ["basic", "bottleneck_projection", "stem", "no_conv_residual"])
def test_16_bit(interpreted: str, shape: str) -> None:
    """bfloat16: the error of every result is at most twice that of plain PyTorch. A smooth activation: at a kink one
    rounding decides about a whole gradient, in any implementation."""
    chain = chains.make(shape, "silu", width=8, batch=2, size=(8, 6))
    draws = []
    for _ in range(3):
        t = chains.cast(chain, chains.draw(chain), torch.bfloat16, torch.channels_last)
        with use_backend("aten"):
            plain = chains.run(chain, t, chains.plain)
        draws.append((chains.run(chain, t), plain, chains.truth(chain, t)))
    for name in draws[0][0]:
        got, plain, truth = ([d[i][name] for d in draws] for i in range(3))
        assert_as_good(name, got, plain, truth, torch.bfloat16)


@pytest.mark.parametrize("shape", ["basic", "bottleneck_projection", "stem"])
def test_inference(interpreted: str, shape: str) -> None:
    """Folded BatchNorm gives the output of the reference with running statistics."""
    chain = chains.make(shape, "relu", "frozen", width=8, batch=1, size=(7, 6))
    t = chains.draw(chain)
    f = chains.cast(chain, t, torch.float32, torch.channels_last)
    out = torch.ops.fused_resnet.chain_inference(f.x, f.residual, f.params, chain.text)
    assert_close("out", out, chains.truth(chain, t)["out"], chains.reduction(chain))
