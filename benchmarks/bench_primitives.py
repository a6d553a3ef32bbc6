"""Micro-benchmarks of the primitives on ResNet-50's shapes, backend beside backend.

    python -m pytest benchmarks/bench_primitives.py --benchmark-group-by=param:shape --benchmark-json=out.json

Each reports GB/s of compulsory traffic (every operand once) or GFLOP/s in extra_info.
"""

from __future__ import annotations

import pytest
import torch

from fused_resnet.backends import (
    BnAct,
    BnActBackward,
    ConvBackward,
    ConvStats,
    DyCoefficients,
    Norm,
    Prologue,
    load,
)
from fused_resnet.spec import Act, ConvSpec

BATCH = 8
# (in, out, kernel, image side) of each stage's convolutions
CONVS = {
    f"{c}->{k} {r}x{r} @{h}": (c, k, r, h)
    for width, h in ((64, 56), (128, 28), (256, 14), (512, 7))
    for c, k, r in ((4 * width, width, 1), (width, width, 3), (width, 4 * width, 1))
}
OUTPUTS = {f"{c} @{h}": (c, h) for c, h in ((256, 56), (512, 28), (1024, 14), (2048, 7))}


@pytest.fixture(params=["aten", "cpu"])
def backend(request):
    found, reason = load(request.param)
    if found is None:
        pytest.skip(reason)
    return found


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)


def image(channels: int, side: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(BATCH, channels, side, side) * 2 + 1
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def norm(channels: int) -> Norm:
    return Norm(*(torch.randn(channels) for _ in range(4)))


@pytest.mark.parametrize("shape", CONVS)
def test_conv_stats(benchmark, backend, dtype, shape):
    """y = conv(relu(s*x + t), W), with statistics."""
    c, k, r, h = CONVS[shape]
    x, w, conv = image(c, h, dtype), torch.randn(k, c, r, r), ConvSpec(padding=(r // 2, r // 2))
    prologue = Prologue(norm(c), Act())
    benchmark(backend.conv_stats, ConvStats(x, w, conv, prologue, True))
    benchmark.extra_info["GFLOP/s"] = 2e-9 * BATCH * h * h * c * k * r * r / benchmark.stats["median"]


@pytest.mark.parametrize("shape", CONVS)
def test_conv_backward(benchmark, backend, dtype, shape):
    """Both gradients, dy formed from (dz, y), the previous unit's dz and sums."""
    c, k, r, h = CONVS[shape]
    x, y, dz, w = image(c, h, dtype), image(k, h, dtype), image(k, h, dtype), torch.randn(k, c, r, r)
    coef, prologue = DyCoefficients(*norm(k)), Prologue(norm(c), Act())
    conv = ConvSpec(padding=(r // 2, r // 2))
    benchmark(backend.conv_backward, ConvBackward(dz, y, coef, x, prologue, w, conv, True, True, None))
    benchmark.extra_info["GFLOP/s"] = 4e-9 * BATCH * h * h * c * k * r * r / benchmark.stats["median"]


@pytest.mark.parametrize("shape", OUTPUTS)
def test_bn_act_residual(benchmark, backend, dtype, shape):
    """The closing pass of a block: two reads, one write."""
    c, h = OUTPUTS[shape]
    y, r = image(c, h, dtype), image(c, h, dtype)
    benchmark(backend.bn_act, BnAct(y, norm(c), Act(), r))
    benchmark.extra_info["GB/s"] = 3e-9 * y.nbytes / benchmark.stats["median"]


@pytest.mark.parametrize("shape", OUTPUTS)
def test_bn_act_backward_residual(benchmark, backend, dtype, shape):
    """The first pass of a block's backward: three reads, one write, two sums."""
    c, h = OUTPUTS[shape]
    y, r, g = (image(c, h, dtype) for _ in range(3))
    benchmark(backend.bn_act_backward, BnActBackward(g, y, norm(c), Act(), r))
    benchmark.extra_info["GB/s"] = 4e-9 * y.nbytes / benchmark.stats["median"]
