"""Whole chains on the cuda backend in float64, its kernels compiled for this CPU (small shapes in other dtypes, beside
the other GPU backends: test_triton_chain.py; on a GPU: test_gpu.py)."""

from __future__ import annotations

import chains
import pytest
import torch
from tolerances import assert_close

import fused_resnet as fr
from fused_resnet import use_backend

SHAPES = list(chains.SHAPES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py does this on a GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_float64(cuda_device: str, empty_is_nan: None, shape: str) -> None:
    """Output, statistics, all gradients are the reference's to twelve digits; channels on both sides of 16 bytes."""
    at = SHAPES.index(shape)
    acts, modes = list(chains.ACTS), list(chains.MODES)
    for width, mode in ((4, "batch"), (3, modes[at % len(modes)])):
        chain = chains.make(shape, acts[at % len(acts)], mode, width=width, batch=2, size=(7, 6))
        t = chains.draw(chain)
        want = chains.truth(chain, t)
        with use_backend("cuda"):
            got = chains.run(chain, chains.cast(chain, t, torch.float64, torch.channels_last))
        for name, value in got.items():
            assert_close(f"{mode} {name}", value, want[name], 1, torch.float64)
            scale = want[name].double().abs().max().clamp_min(1)
            assert ((value - want[name]).abs().max() / scale).item() < 1e-11 * chains.reduction(chain)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py does this on a GPU")
def test_a_network(cuda_device: str) -> None:
    """A training step of ResNet-18 gives aten's gradients."""
    torch.manual_seed(0)
    model = fr.models.resnet18(num_classes=5).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 33, 31, dtype=torch.float64).to(memory_format=torch.channels_last)
    found = {}
    for name in ("aten", "cuda"):
        model.zero_grad()
        with use_backend(name):
            model(x).square().sum().backward()
        found[name] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for got, want in zip(found["cuda"], found["aten"], strict=True):
        assert (got - want).norm() <= 1e-9 * want.norm()
