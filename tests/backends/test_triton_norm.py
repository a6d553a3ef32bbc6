"""The Triton kernels that memory bounds against aten in float64: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import primitives
import pytest
import torch
from primitives import Positional, aten, check, double, flat
from tolerances import assert_as_good, assert_close

from fused_resnet.backends import DyCoefficients, Norm, Sums
from fused_resnet.spec import ACTIVATIONS, Act, PoolSpec

pytest.importorskip("triton", reason="needs Triton")

from fused_resnet.backends.triton import BACKEND, reduce, runtime  # noqa: E402
from fused_resnet.backends.triton import norm as norm_module  # noqa: E402
from fused_resnet.backends.triton import pool as pool_module  # noqa: E402
from fused_resnet.backends.triton.configs import TARGETS  # noqa: E402

if not runtime.INTERPRET and not torch.cuda.is_available():
    pytest.skip("needs a GPU or Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("nan_filled")
DEVICE = "cpu" if runtime.INTERPRET else "cuda"
norm, pool, triton = map(Positional, (norm_module, pool_module, BACKEND))
DTYPES = [torch.float32, torch.bfloat16]
# Batch, channels, height, width: channels on both sides of a tile and of 16 bytes, rows that fill no tile, no row.
SIZES = [(1, 3, 7, 5), (3, 8, 9, 11), (2, 24, 5, 7), (3, 64, 3, 5), (1, 65, 5, 3), (0, 8, 3, 3), (2, 130, 1, 1)]
ACTS = [Act.make(name) for name in ACTIVATIONS]


image = partial(primitives.image, device=DEVICE)
vectors = partial(primitives.vectors, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "act,size",
    [(a, s) for i, a in enumerate(ACTS) for j, s in enumerate(SIZES) if a.name == "relu" or (i + j) % 3 == 0],
    ids=lambda v: v.name if isinstance(v, Act) else str(v),
)
def test_bn_act(act: Act, size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forward and backward, without a residual, with one, and with one that has a norm of its own."""
    y, r, dout = (image(*size, dtype=dtype) for _ in range(3))
    n, m = vectors(size[1]), vectors(size[1])
    count = y.numel() // y.shape[1]
    for residual in ((), (r, None), (r, m)):
        check("bn_act", norm, (y, n, act, *residual), count)
        check("bn_act_backward", norm, (dout, y, n, act, *residual), count)


def test_bn_act_backward_of_another_dtype() -> None:
    """dz comes in dout's dtype, whatever y's."""
    y, dout = image(2, 8, 5, 3, dtype=torch.bfloat16), image(2, 8, 5, 3)
    check("bn_act_backward", norm, (dout, y, vectors(8), Act("silu")), 30)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bn_backward(size: tuple[int, ...], dtype: torch.dtype) -> None:
    dz, y = image(*size, dtype=dtype), image(*size, dtype=dtype)
    v = vectors(size[1])
    check("bn_backward", norm, (dz, y, DyCoefficients(*v)), 1)
    check("bn_backward", norm, (dz, y, DyCoefficients(v.scale, None, None, v.center)), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [s for s in SIZES if s[0]], ids=str)
def test_bn_stats(size: tuple[int, ...], dtype: torch.dtype) -> None:
    y = image(*size, dtype=dtype)
    check("bn_stats", norm, (y,), y.numel() // y.shape[1])


def test_bn_stats_of_nothing() -> None:
    """As PyTorch's mean of nothing."""
    assert all(v.isnan().all() and v.shape == (8,) for v in norm.bn_stats(image(0, 8, 3, 3)))


@pytest.mark.parametrize("channels", [3, 64])
def test_variance_of_a_large_mean(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean 1e4, standard deviation 1, and a first image that is constant: the variance keeps three digits."""
    few = replace(TARGETS["sm_90"], processors=2)
    monkeypatch.setattr(norm_module, "target_of", lambda device: few)  # several rows per lane, several programs
    y = image(3, channels, 33, 31)
    y = (y - 0.7) / 1.5 + 1e4
    y[0] = 9990
    mean, var = norm.bn_stats(y)
    wide = y.double()
    assert_close("mean", mean, wide.mean((0, 2, 3)), 1)
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), unbiased=False), rtol=1e-3, atol=0)


@pytest.mark.parametrize("partials,rows,last", [(1, 7, 5), (5, 8, 5), (129, 1, 1), (700, 4, 3)])
@pytest.mark.parametrize("channels", [3, 64, 65])
def test_merge_moments(channels: int, partials: int, rows: int, last: int) -> None:
    """Pieces of a mean 1e4 and a standard deviation of 1 merge into the moments of all."""
    total = (partials - 1) * rows + last
    x = torch.randn(total, channels, dtype=torch.float64) + 1e4
    pieces = [x[p * rows : (p + 1) * rows] for p in range(partials)]
    means = [p.mean(0).float() for p in pieces]
    mean = torch.stack(means).to(DEVICE)
    # of the mean as it is rounded, so that nothing but the merge is measured
    m2 = torch.stack([(p - p.mean(0)).square().sum(0) for p in pieces]).float().to(DEVICE)
    rounded = torch.cat([p - p.mean(0) + m.double() for p, m in zip(pieces, means, strict=True)])
    got_mean, got_var = reduce.merge_moments(torch.stack([mean, m2]), rows, total)
    assert_close("mean", got_mean.cpu(), rounded.mean(0), 1)
    torch.testing.assert_close(got_var.cpu().double(), rounded.var(0, unbiased=False), rtol=1e-4, atol=0)


@pytest.mark.parametrize("partials", [0, 1, 129, 1500])
@pytest.mark.parametrize("tensors", [1, 2, 3])
def test_sum_partials(tensors: int, partials: int) -> None:
    parts = torch.randn(tensors, partials, 65, device=DEVICE)
    sums = reduce.sum_partials(parts)
    assert sums.shape == (tensors, 65)
    for got, part in zip(sums, parts, strict=True):
        assert_close("sum", got, part.double().sum(0), partials)


@pytest.mark.parametrize("channels", [3, 64, 300])
def test_bn_fold(channels: int) -> None:
    """With gamma and beta or without, a convolution's bias or none, running statistics in 16 bits too."""
    mean, weight, bias, conv_bias = (torch.randn(channels, device=DEVICE) for _ in range(4))
    var = torch.rand(channels, device=DEVICE) + 0.1
    check("bn_fold", triton, (mean, var, None, None, None, 1e-5), 1)
    check("bn_fold", triton, (mean, var, weight, bias, None, 1e-3), 1)
    check("bn_fold", triton, (mean, var, weight, None, conv_bias, 1e-5), 1)
    check("bn_fold", triton, (mean, var, weight.bfloat16(), bias.half(), conv_bias.bfloat16(), 1e-5), 1)
    check("bn_fold", triton, (mean.half(), var.half(), weight.half(), bias.half(), None, 1e-5), 1)


@pytest.mark.parametrize("channels", [3, 300])
def test_bn_coefficients(channels: int) -> None:
    n, sums = vectors(channels), Sums(torch.randn(channels, device=DEVICE), torch.randn(channels, device=DEVICE))
    for count in (1, 777, None):
        check("bn_coefficients", triton, (n, sums, count), 1)


POOLS = [PoolSpec.make(3, 2, 1), PoolSpec.make(2), PoolSpec.make((3, 2), (1, 3), (1, 0)), PoolSpec.make(5, 1, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 3, 9, 7), (3, 64, 7, 9), (1, 65, 6, 5), (0, 8, 6, 6)], ids=str)
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_max_pool(act: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    """The maxima are aten's; the places hold them; the gradient goes back to those places."""
    for window in POOLS if size[1] == 3 else POOLS[:1]:
        y, n, a = image(*size, dtype=dtype), vectors(size[1]), Act.make(act)
        out, place = pool.bn_act_max_pool(y, n, a, window)
        want, want_place = aten.bn_act_max_pool(y.double(), double(n), a, window)
        plain, _ = aten.bn_act_max_pool(y, n, a, window)
        assert out.dtype == dtype and place.dtype == torch.uint8 and place.shape == out.shape
        if dtype == torch.float32:
            assert_close("out", out, want, 4)
        elif out.numel():
            assert_as_good("out", [out], [plain], [want], dtype)
        assert torch.equal(place, want_place), "ties and near ties are the float64 reference's"
        dout = image(*out.shape, dtype=dtype)
        check("bn_act_max_pool_backward", pool, (dout, place, y, n, a, window), size[0] * size[2] * size[3])


def test_max_pool_is_pytorchs() -> None:
    """The first of equal maxima wins, a NaN over everything, padding never: -inf alone in a window is an image's."""
    n = Norm(*(torch.tensor(v, device=DEVICE) for v in ([1.0], [0.0], [0.0], [1.0])))
    y = torch.zeros(1, 1, 8, 8, device=DEVICE)
    y[0, 0, 3, 3], y[0, 0, 5, 5], y[0, 0, 5, 6] = float("nan"), float("nan"), float("nan")
    y[0, 0, :3, 5:] = -float("inf")
    for window in POOLS:
        got, want = (b.bn_act_max_pool(y, n, Act("identity"), window) for b in (pool, aten))
        assert torch.equal(got[0].nan_to_num(), want[0].nan_to_num()) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("act", ACTS, ids=lambda a: a.name)
def test_nan_and_inf(act: Act) -> None:
    """They go where PyTorch sends them."""
    y = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 100.0, -100.0, 6.0], device=DEVICE)
    y = y.view(8, 1, 1, 1)
    one = torch.ones(1, device=DEVICE)
    n = Norm(one, one * 0, one, one)
    torch.testing.assert_close(norm.bn_act(y, n, act), aten.bn_act(y, n, act), equal_nan=True)
    dout = torch.full_like(y, 3)
    got, want = (b.bn_act_backward(dout, y, n, act)[0] for b in (norm, aten))
    # but for the slope at NaN, in which ATen's own loops differ
    torch.testing.assert_close(got[1:], want[1:], equal_nan=True)


def test_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' other offsets compute the same."""
    y, r, n, m = image(2, 24, 9, 7), image(2, 24, 9, 7), vectors(24), vectors(24)
    calls = [
        lambda: norm.bn_stats(y),
        lambda: norm.bn_act(y, n, Act(), r, m),
        lambda: norm.bn_act_backward(r, y, n, Act(), r, m),
        lambda: norm.bn_backward(r, y, DyCoefficients(*n)),
        lambda: pool.bn_act_max_pool(y, n, Act(), POOLS[0]),
        lambda: pool.bn_act_max_pool_backward(*pool.bn_act_max_pool(y, n, Act(), POOLS[0]), y, n, Act(), POOLS[0]),
    ]
    want = [call() for call in calls]
    monkeypatch.setattr(runtime, "_WIDE", 1)
    for call, expected in zip(calls, want, strict=True):
        for g, w in zip(flat(call()), flat(expected), strict=True):
            assert torch.equal(g, w)


def test_bits_are_reproducible() -> None:
    """No atomics: twice the same input, twice the same bits, in several programs."""
    y, dout, n = image(3, 24, 31, 33), image(3, 24, 31, 33), vectors(24)
    first, again = (norm.bn_act_backward(dout, y, n, Act()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(again), strict=True))


def test_meta_tensors_and_traffic() -> None:
    """On meta tensors nothing runs, shapes and dtypes are right, and every byte is counted once."""
    y = torch.empty(8, 64, 56, 56, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    n = Norm(*(torch.empty(64, device="meta") for _ in range(4)))
    with runtime.traffic() as account:
        out = norm.bn_act(y, n, Act(), y, n)
        dz, sums, more = norm.bn_act_backward(y, y, n, Act(), y)
        pooled, place = pool.bn_act_max_pool(y, n, Act(), POOLS[0])
        dy, _ = pool.bn_act_max_pool_backward(pooled, place, y, n, Act(), POOLS[0])
    assert out.shape == dz.shape == dy.shape == y.shape and place.dtype == torch.uint8
    assert more is None and isinstance(sums, Sums) and sums.dz.shape == (64,)
    tensor = y.numel() * 2
    kernels = [launch.kernel for launch in account.launches]
    assert kernels[:2] == ["_bn_act_kernel", "_bn_act_backward_kernel"]
    forward, backward = account.launches[:2]
    assert forward.read == 2 * tensor + 4 * 64 * 4 and forward.written == tensor
    assert backward.read == 3 * tensor + 3 * 64 * 4 and tensor < backward.written < 1.1 * tensor
