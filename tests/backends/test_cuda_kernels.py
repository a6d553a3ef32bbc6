"""The cuda backend's kernels against aten in float64: on a GPU, or compiled for this CPU from the same sources."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_build
import cuda_cases
import pytest
import torch
from cuda_cases import ACTS, POOLS
from primitives import aten, image, vectors
from source_tree import ROOT, SUPPORT

from fused_resnet import functional, use_backend
from fused_resnet.backends import BackendUnavailable, Norm
from fused_resnet.backends.cuda import cutlass
from fused_resnet.spec import Act, ConvSpec

pytestmark = pytest.mark.usefixtures("empty_is_nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Batch, channels, height, width: one value, 1 to 100,000 rows, channels on both sides of a tile and of 16 bytes.
SIZES = [(1, 1, 1, 1), (10, 1, 100, 100), (1, 3, 7, 5), (4, 3, 60, 50), (3, 8, 9, 11), (3, 64, 31, 29), (2, 65, 17, 13),
         (1, 136, 5, 5), (2, 2048, 7, 7), (1, 2048, 1, 1)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_passes(cuda_device: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    acts = ACTS if size[1] in (3, 8) and size[0] < 4 else [Act(), ACTS[sum(size) % len(ACTS)]]
    cuda_cases.passes(size, dtype, acts, cuda_device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 8, 9, 11), (2, 64, 9, 7)], ids=str)
def test_misaligned(cuda_device: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Rows of whole 16 bytes that start between two of them."""
    cuda_cases.passes(size, dtype, [Act("silu")], cuda_device, off=True)


@pytest.mark.parametrize("size", [(10, 64, 100, 100), (3, 3, 33, 31), (3, 65, 33, 31), (2, 2048, 7, 7)], ids=str)
def test_variance_of_a_large_mean(cuda_device: str, size: tuple[int, ...]) -> None:
    cuda_cases.large_mean(size, cuda_device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 3, 9, 7), (3, 64, 7, 9), (1, 65, 6, 5), (2, 8, 40, 37), (0, 8, 6, 6)], ids=str)
def test_max_pool(cuda_device: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    for i, window in enumerate(POOLS if size[1] == 3 else POOLS[:1]):
        cuda_cases.max_pool(size, dtype, ACTS[(size[1] + i) % len(ACTS)], window, cuda_device)
        cuda_cases.max_pool(size, dtype, Act(), window, cuda_device)


def test_max_pool_is_pytorchs(cuda_device: str) -> None:
    """The first of equal maxima wins, a NaN over everything, padding never: -inf alone in a window is an image's."""
    n = Norm(*(torch.tensor(v, device=cuda_device) for v in ([1.0], [0.0], [0.0], [1.0])))
    y = torch.zeros(1, 1, 8, 8, device=cuda_device)
    y[0, 0, 3, 3], y[0, 0, 5, 5], y[0, 0, 5, 6] = float("nan"), float("nan"), float("nan")
    y[0, 0, :3, 5:] = -float("inf")
    for window in POOLS:
        got, want = (b.bn_act_max_pool(y, n, Act("identity"), window) for b in (cuda_cases.backend(), aten))
        assert torch.equal(got[0].nan_to_num(), want[0].nan_to_num()) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("act", ACTS, ids=lambda a: a.name)
def test_nan_and_inf(cuda_device: str, act: Act) -> None:
    """They go where PyTorch sends them, and so do the kinks."""
    y = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 100.0, -100.0, 6.0, -3.0, 3.0])
    y = y.to(cuda_device).view(-1, 1, 1, 1)
    one = torch.ones(1, device=cuda_device)
    n = Norm(one, one * 0, one, one)
    cuda = cuda_cases.backend()
    torch.testing.assert_close(cuda.bn_act(y, n, act), aten.bn_act(y, n, act), equal_nan=True)
    dout = torch.full_like(y, 3)
    got, want = (b.bn_act_backward(dout, y, n, act)[0] for b in (cuda, aten))
    # but for the slope at NaN, in which ATen's own loops differ
    torch.testing.assert_close(got[1:], want[1:], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 65, 2048])
def test_vectors(cuda_device: str, channels: int, dtype: torch.dtype) -> None:
    cuda_cases.channel_vectors(channels, dtype, cuda_device)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 3, 33, 31), (3, 65, 8, 4), (0, 8, 3, 3), (2, 1, 5, 5)], ids=str)
def test_copies(cuda_device: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    cuda_cases.copies(size, dtype, cuda_device)


def test_empty_batch(cuda_device: str) -> None:
    """Statistics of nothing are PyTorch's mean of nothing; sums are zero."""
    cuda = cuda_cases.backend()
    y, n = image(0, 8, 3, 3, device=cuda_device), vectors(8, device=cuda_device)
    assert all(v.isnan().all() and v.shape == (8,) for v in cuda.bn_stats(y))
    dz, sums, other = cuda.bn_act_backward(y, y, n, Act(), y, n)
    assert dz.shape == y.shape and all((v == 0).all() for v in (*sums, *other))


def test_nchw_operands_are_copied(cuda_device: str) -> None:
    """y is refused by the backend in NCHW; a residual or a gradient that arrives so is put right."""
    y, r, n = (
        image(2, 24, 5, 7, device=cuda_device),
        image(2, 24, 5, 7, device=cuda_device),
        vectors(24, device=cuda_device),
    )
    cuda = cuda_cases.backend()
    got, want = cuda.bn_act(y, n, Act(), r.contiguous()), cuda.bn_act(y, n, Act(), r)
    assert torch.equal(got, want) and got.is_contiguous(memory_format=torch.channels_last)
    expanded = torch.ones(1, 1, 1, 1, device=cuda_device).expand_as(y)
    assert torch.equal(
        cuda.bn_act_backward(expanded, y, n, Act())[0], cuda.bn_act_backward(torch.ones_like(y), y, n, Act())[0]
    )


def test_same_bits_in_any_order(cuda_device: str) -> None:
    """Twice the same input, twice the same bits; on a CPU the second time with threads and blocks in opposite order,
    which would show a missing barrier or an order that is left to chance."""
    torch.manual_seed(1)
    first = list(cuda_cases.everything(cuda_device))
    torch.manual_seed(1)
    if cuda_device == "cpu":
        cuda_build.backwards(True)
    try:
        again = list(cuda_cases.everything(cuda_device))
    finally:
        if cuda_device == "cpu":
            cuda_build.backwards(False)
    assert len(first) == len(again) > 30
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_wrong_arguments(cuda_device: str) -> None:
    """Named, with what came and what was expected, before anything is launched."""
    ops = torch.ops.fused_resnet_cuda
    y, n = image(2, 8, 5, 3, device=cuda_device), vectors(8, device=cuda_device)
    pair = [n.scale, n.shift]
    calls = {
        r"y: expected \[N, C, H, W\], got \[2, 8\]": lambda: ops.bn_stats(y[:, :, 0, 0]),
        "y: expected float32, .*, got Int": lambda: ops.bn_stats(y.int()),
        "norm: expected contiguous vectors of 8 values in Float.*, got .7.": lambda: ops.bn_act(
            y, [n.scale[:7], n.shift], 1, 0.0, None, []
        ),
        r"norm: expected \[scale, shift, center\], got 2 tensors": lambda: ops.bn_act_backward(
            y, y, pair, 1, 0.0, None, []
        ),
        "residual: expected y's shape, dtype and device": lambda: ops.bn_act(y, pair, 1, 0.0, y[:1], []),
        "dout: expected y's shape, dtype": lambda: ops.bn_act_backward(
            y.half(), y, [*pair, n.center], 1, 0.0, None, []
        ),
        f"act: no activation {len(ACTS)}": lambda: ops.bn_act(y, pair, len(ACTS), 0.0, None, []),
        "coef: expected .*, got 3 tensors": lambda: ops.bn_backward(y, y, list(n[:3])),
        "kernel: expected a window inside": lambda: ops.bn_act_max_pool(y, pair, 1, 0.0, [7, 7], [1, 1], [0, 0]),
        "kernel: expected a window of at most 256": lambda: ops.bn_act_max_pool(
            image(1, 8, 20, 20, device=cuda_device), pair, 1, 0.0, [17, 17], [1, 1], [0, 0]
        ),
        "argmax: expected uint8 of dout's shape": lambda: ops.bn_act_max_pool_backward(
            y, y, y, [*pair, n.center], 1, 0.0, [1, 1], [1, 1], [0, 0]
        ),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()


def test_schemas(cuda_device: str) -> None:
    """opcheck's schema test (no undeclared mutation or aliasing) on each operator."""
    ops = torch.ops.fused_resnet_cuda
    y, n = image(2, 8, 6, 6, device=cuda_device), vectors(8, device=cuda_device)
    small = image(2, 8, 3, 3, device=cuda_device)
    place = torch.zeros_like(small, dtype=torch.uint8)
    pair, triple, window = [n.scale, n.shift], [n.scale, n.shift, n.center], ([3, 3], [2, 2], [1, 1])
    calls = {
        "bn_stats": (y,),
        "bn_act": (y, pair, 1, 0.0, y, []),
        "bn_act_backward": (y, y, triple, 1, 0.0, y, triple),
        "bn_backward": (y, y, list(n)),
        "bn_act_max_pool": (y, pair, 1, 0.0, *window),
        "bn_act_max_pool_backward": (small, place, y, triple, 1, 0.0, *window),
        "bn_fold": (n.center, n.rstd, None, None, None, 1e-5),
        "bn_coefficients": (n.scale, n.rstd, n.center, n.shift, None),
        "channels_last": (y.contiguous(),),
        "contiguous": (y,),
    }
    x, w, tile = y.bfloat16(), torch.randn(8, 8, 3, 3, device=cuda_device).bfloat16(), [64, 64]
    conv = ([1, 1], [1, 1], [1, 1], 1)
    convolutions = {
        "conv_why_not": ("fprop", x, w, *conv),
        "conv_tiles": ("fprop", x),
        "conv_bias_act": (x, w, None, *conv, 1, 0.0, x, tile),
        "conv_backward_input": (x, w, [6, 6], *conv, x, [128, 64]),
        "conv_backward_weight": (x, x, [3, 3], *conv, tile),
    }
    names = torch._C._dispatch_get_all_op_names()
    assert {n.split("::")[1] for n in names if n.startswith("fused_resnet_cuda::")} == {*calls, *convolutions}
    if cutlass.refuse("fprop", x, w, ConvSpec()) is None:
        calls |= convolutions
    for name, args in calls.items():
        torch.library.opcheck(getattr(ops, name).default, args, test_utils="test_schema")


def test_refusals(cuda_device: str) -> None:
    """In words that a user can act on."""
    x, w = image(2, 8, 5, 5, device=cuda_device), torch.randn(8, 8, 3, 3, device=cuda_device)
    v = [torch.ones(8, device=cuda_device) for _ in range(4)]
    with use_backend("cuda"):
        functional.conv_bn_act(x, w, *v, training=True)
        with pytest.raises(BackendUnavailable, match="channels_last"):
            functional.conv_bn_act(x.contiguous(), w, *v, training=True)


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="compute-sanitizer does this on a GPU (first_light.py)")
def test_sanitizers(cuda_library: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing: no access beyond a tensor, a shared array or a
    fiber's stack, no misaligned 16 bytes, no overflow."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(path).is_absolute() for path in runtimes):
        pytest.skip("g++ has no sanitizer libraries here")
    library = cuda_build.kept("sanitized", lambda folder: cuda_build.sanitized(folder, cuda_library.parent))
    env = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:use_sigaltstack=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(SUPPORT / "cuda_cases.py"), str(library)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "all cases hold" in done.stdout, done.stderr[-6000:]
