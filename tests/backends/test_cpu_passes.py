"""The compiled passes over images: pools of every geometry against PyTorch's, and their time beside PyTorch's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from primitives import cpu
from torch import Tensor

from fused_resnet.backends import Norm, load
from fused_resnet.spec import Act, PoolSpec

pytestmark = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def images(*shape: int, special: bool = False) -> Tensor:
    """Values that come several times in every window; ``special``: infinities and NaN among them."""
    x = torch.randint(-3, 4, shape).float()
    if special:
        x[torch.rand(shape) < 0.1] = float("nan")
        x[torch.rand(shape) < 0.3] = -float("inf")
        x[torch.rand(shape) < 0.05] = float("inf")
    return x


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("special", [False, True], ids=["ties", "nan and inf"])
@pytest.mark.parametrize(
    ("pool", "size"),
    [
        (PoolSpec.make(3, 2, 1), (11, 10)),
        (PoolSpec.make((2, 5), (3, 1), (1, 2)), (7, 23)),
        (PoolSpec.make((1, 3), (1, 7)), (3, 1601)),  # rows longer than what is worked on at a time
        (PoolSpec.make((1, 256), (1, 300), (0, 128)), (2, 1100)),
        (PoolSpec.make(16, 16, 8), (40, 33)),
    ],
    ids=str,
)
def test_pools_are_pytorchs(pool: PoolSpec, size: tuple[int, int], special: bool, layout: torch.memory_format) -> None:
    """Values, which of equals and of NaNs is taken, and where the gradient goes."""
    y = images(2, 5, *size, special=special).contiguous(memory_format=layout)
    one = torch.ones(5)
    norm = Norm(one, 0 * one, 0 * one, one)
    out, place = cpu.bn_act_max_pool(y, norm, Act("identity"), pool)
    x = y.clone().requires_grad_()
    want, index = F.max_pool2d(x, pool.kernel, pool.stride, pool.padding, return_indices=True)
    torch.testing.assert_close(out, want.detach(), rtol=0, atol=0, equal_nan=True)
    rows = torch.arange(want.shape[2])[:, None] * pool.stride[0] - pool.padding[0] + place.long() // pool.kernel[1]
    columns = torch.arange(want.shape[3]) * pool.stride[1] - pool.padding[1] + place.long() % pool.kernel[1]
    assert torch.equal(rows * size[1] + columns, index)
    dout = torch.randn(want.shape).contiguous(memory_format=layout)
    want.backward(dout)
    dz, sums = cpu.bn_act_max_pool_backward(dout, place, y, norm, Act("identity"), pool)
    assert x.grad is not None
    torch.testing.assert_close(dz, x.grad)
    torch.testing.assert_close(sums.dz, x.grad.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
    if not special:
        torch.testing.assert_close(sums.dz_y, (x.grad * y).sum((0, 2, 3)), rtol=1e-4, atol=1e-3)


def seconds(*calls: Callable[[], object]) -> list[float]:
    """The best of twenty of each, in turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(21):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return [min(found[1:]) for found in times]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif("FUSED_RESNET_CPU_ISA" in os.environ, reason="PyTorch's own instruction set may be a later one")
def test_a_pass_takes_no_longer_than_pytorchs(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """With vectors that the instruction set does not have, a pass took 3 to 17 times as long as it should."""
    y = torch.randn(4, 64, 28, 28).to(dtype).contiguous(memory_format=layout)
    mean, var, weight, bias = (torch.rand(64) for _ in range(4))
    norm, pool = Norm(weight, bias, mean, var), PoolSpec.make(3, 2, 1)

    def plain() -> Tensor:
        return F.relu(F.batch_norm(y, mean, var, weight, bias))

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "bn_act": (lambda: cpu.bn_act(y, norm, Act("relu")), plain),
        "pool": (lambda: cpu.bn_act_max_pool(y, norm, Act("relu"), pool), lambda: F.max_pool2d(plain(), 3, 2, 1)),
    }
    for name, pair in pairs.items():
        ours, theirs = seconds(*pair)
        assert ours < 1.5 * theirs, name
