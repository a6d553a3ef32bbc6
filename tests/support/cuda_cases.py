"""What the cuda backend's kernels are held to, on any device: called by test_cuda_kernels.py, and run by itself under
sanitizers (``python cuda_cases.py LIBRARY`` or ``... cuda``)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_build
import torch
from primitives import Positional, aten, check, double, flat, image, vectors
from tolerances import assert_as_good, assert_close
from torch import Tensor

from fused_resnet.backends import DyCoefficients, Sums, vector_dtype
from fused_resnet.base import library
from fused_resnet.spec import ACTIVATIONS, Act, PoolSpec

ACTS = [Act.make(name) for name in ACTIVATIONS]
POOLS = [PoolSpec.make(3, 2, 1), PoolSpec.make(2), PoolSpec.make((3, 2), (1, 3), (1, 0)), PoolSpec.make(5, 1, 2)]


def backend() -> Any:
    """Imported late: where it runs is decided by then."""
    from fused_resnet.backends.cuda import BACKEND

    return Positional(BACKEND)


def misaligned(t: Tensor) -> Tensor:
    """The same values one element behind a multiple of 16 bytes."""
    n, c, h, w = t.shape
    memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    to = memory[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    return to.copy_(t)


def passes(size: tuple[int, ...], dtype: torch.dtype, acts: list[Act], device: str, off: bool = False) -> None:
    """bn_stats, bn_act, bn_act_backward and bn_backward; ``off``: operands that are no multiple of 16 bytes."""
    cuda, count = backend(), size[0] * size[2] * size[3]
    y, r, dout = (image(*size, dtype=dtype, device=device) for _ in range(3))
    if off:
        y, r, dout = misaligned(y), misaligned(r), misaligned(dout)
    n, m = vectors(size[1], dtype, device), vectors(size[1], dtype, device)
    check("bn_stats", cuda, (y,), count)
    for i, act in enumerate(acts):
        for residual in ((), (r, None), (r, m)) if i == 0 else ((r, m),):
            check("bn_act", cuda, (y, n, act, *residual), count)
            check("bn_act_backward", cuda, (dout, y, n, act, *residual), count)
    check("bn_backward", cuda, (dout, y, DyCoefficients(*m)), 1)
    check("bn_backward", cuda, (dout, y, DyCoefficients(m.scale, None, None, m.center)), 1)


def large_mean(size: tuple[int, ...], device: str) -> None:
    """Mean 1e4, standard deviation 1, and a first image that is constant: the variance keeps three digits."""
    y = torch.randn(size).add_(1e4).to(device).contiguous(memory_format=torch.channels_last)
    y[0] = 9990
    mean, var = backend().bn_stats(y)
    wide = y.double()
    assert_close("mean", mean, wide.mean((0, 2, 3)), 1)
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), unbiased=False), rtol=1e-3, atol=0)


def max_pool(size: tuple[int, ...], dtype: torch.dtype, act: Act, window: PoolSpec, device: str) -> None:
    """The maxima are aten's; the places hold them; the gradient goes back to those places."""
    cuda = backend()
    y, n = image(*size, dtype=dtype, device=device), vectors(size[1], dtype, device)
    out, place = cuda.bn_act_max_pool(y, n, act, window)
    plain, want_place = aten.bn_act_max_pool(y, n, act, window)
    want, true_place = aten.bn_act_max_pool(y.double(), double(n), act, window)
    assert out.dtype == dtype and place.dtype == torch.uint8 and place.shape == out.shape
    if dtype in (torch.float32, torch.float64):
        assert_close("out", out, want, 4)
        assert torch.equal(place, true_place), "ties and near ties are the float64 reference's"
    elif out.numel():
        assert_as_good("out", [out], [plain], [want], dtype)
        assert torch.equal(place, true_place)
    assert place.shape == want_place.shape
    dout = image(*out.shape, dtype=dtype, device=device)
    check("bn_act_max_pool_backward", cuda, (dout, place, y, n, act, window), size[0] * size[2] * size[3])


def channel_vectors(channels: int, dtype: torch.dtype, device: str) -> None:
    """bn_fold and bn_coefficients, with weights of any dtype, and without."""
    cuda, wide = backend(), vector_dtype(dtype)

    def draw(of: torch.dtype = wide) -> Tensor:
        return torch.randn(channels, dtype=wide).to(device, of)

    mean, var, weight, bias, conv_bias = draw(), draw().exp(), draw(), draw(), draw()
    half = torch.bfloat16 if wide == torch.float32 else wide
    for given in (
        (None, None, None, 1e-5),
        (weight, bias, None, 1e-3),
        (weight, None, conv_bias, 1e-5),
        (weight.to(half), bias.to(half), conv_bias.to(half), 1e-5),
    ):
        check("bn_fold", cuda, (mean, var, *given), 1)
    for count in (None, 5, 100_000):
        check("bn_coefficients", cuda, (vectors(channels, dtype, device), Sums(draw(), draw()), count), 1)


def copies(size: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """NCHW to channels_last and back, bit for bit."""
    ops = torch.ops.fused_resnet_cuda
    x = (torch.randn(size) * 50).to(device, dtype)
    last = ops.channels_last(x)
    assert last.permute(0, 2, 3, 1).is_contiguous() and torch.equal(last, x)
    again = ops.channels_last(last)
    assert torch.equal(again, x) and (again.data_ptr() != last.data_ptr() or not x.numel())
    back = ops.contiguous(last)
    assert back.is_contiguous() and torch.equal(back, x)


def everything(device: str) -> Iterator[Any]:
    """Results of all kernels on one awkward shape each, for comparisons bit by bit."""
    cuda = backend()
    for channels in (3, 64):
        for dtype in (torch.float32, torch.bfloat16):
            y, r, dout = (image(3, channels, 21, 19, dtype=dtype, device=device) for _ in range(3))
            n, m = vectors(channels, dtype, device), vectors(channels, dtype, device)
            yield from flat(cuda.bn_stats(y))
            yield from flat(cuda.bn_act_backward(dout, y, n, Act("silu"), r, m))
            yield from flat(cuda.bn_act(y, n, Act(), r, m))
            out, place = cuda.bn_act_max_pool(y, n, Act(), POOLS[0])
            yield from (out, place)
            yield from flat(cuda.bn_act_max_pool_backward(out, place, y, n, Act(), POOLS[0]))
            yield torch.ops.fused_resnet_cuda.channels_last(y.contiguous())


def main(where: str) -> None:
    """A small set of everything, under whatever sanitizer runs it: on a device, or of a library for this CPU."""
    device = "cpu"
    if where.endswith(".so"):
        cuda_build.use(Path(where))
        torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    else:
        library.unavailable()  # loads it

        device = where
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for i, size in enumerate([(1, 1, 1, 1), (2, 3, 9, 5), (2, 64, 9, 7), (1, 65, 6, 5), (1, 136, 3, 3), (0, 8, 3, 3)]):
        for dtype in dtypes:
            if size[0]:
                passes(size, dtype, ACTS[i : i + 2], device, off=dtype == dtypes[i % 4])
                channel_vectors(size[1], dtype, device)
            copies(size, dtype, device)
            if size[2] > 2:
                max_pool(size, dtype, ACTS[i], POOLS[i % 2], device)
    large_mean((3, 64, 9, 9), device)
    print("all cases hold")


if __name__ == "__main__":
    main(sys.argv[1])
