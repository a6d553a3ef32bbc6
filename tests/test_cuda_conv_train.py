"""The index arithmetic of csrc/cuda/conv_train_sm90.cu: whole convolutions on models of the hardware, without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

SOURCE = Path(__file__).with_name("conv_train_host.cpp")
PRE = ("none", "identity", "relu")
BLOCK_M = 128


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("conv_train") / "host.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True, timeout=120)
    return ctypes.CDLL(str(library))


def address(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


# (n, h, w, c), (k, r, s), dilation, tile's channels, prologue, dtype
CASES = [
    ((1, 16, 9, 128), (64, 1, 1), 1, 64, "relu", torch.bfloat16),
    ((2, 9, 13, 64), (128, 1, 1), 1, 128, "none", torch.bfloat16),
    ((1, 14, 14, 64), (200, 1, 1), 1, 128, "identity", torch.bfloat16),
    ((2, 7, 7, 192), (72, 1, 1), 1, 64, "relu", torch.float16),
    ((3, 7, 7, 64), (64, 3, 3), 1, 64, "relu", torch.bfloat16),
    ((2, 8, 11, 64), (80, 3, 3), 1, 128, "identity", torch.bfloat16),
    ((1, 5, 9, 64), (40, 3, 3), 2, 64, "relu", torch.float16),
    ((1, 13, 6, 64), (24, 5, 3), 1, 64, "none", torch.bfloat16),
    ((1, 12, 12, 64), (264, 1, 1), 1, 256, "relu", torch.bfloat16),
]


@pytest.mark.parametrize(("x_size", "w_size", "dilation", "block_n", "pre", "dtype"), CASES)
def test_convolution(
    emulator: ctypes.CDLL,
    x_size: tuple[int, int, int, int],
    w_size: tuple[int, int, int],
    dilation: int,
    block_n: int,
    pre: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """y within one rounding of float64's, statistics of every tile those of y as stored, nothing left unwritten."""
    n, h, w, c = x_size
    k, r, s = w_size
    pad = ((r - 1) * dilation // 2, (s - 1) * dilation // 2)
    x = (torch.randn(n, h, w, c) * 2 + 3).to(dtype)
    weight = (torch.randn(k, r, s, c) / (r * s * c) ** 0.5).to(dtype)
    scale, shift = torch.randn(c), torch.randn(c) + 1  # of both signs; a padded pixel would be act(shift)
    m = n * h * w
    blocks = 2 if r * s == 1 else 1  # one block: the ring of stages goes round several times
    tiles = -(-m // BLOCK_M)
    y = torch.full((m, k), float("nan"), dtype=dtype)
    mean, m2 = torch.full((2, tiles, k), float("nan")).unbind()
    sizes = [n, h, w, c, k, r, s, *pad, dilation, dilation, PRE.index(pre), block_n, blocks]
    sizes += [int(dtype == torch.float16), seed & 0x7FFFFFF]
    status = emulator.conv_train(
        (ctypes.c_int * len(sizes))(*sizes), *map(address, (x, weight, scale, shift, y, mean, m2))
    )
    assert status == 0, "the roles wait for each other" if status == 1 else f"no tile of {block_n} channels"

    a = x.float()
    if pre != "none":
        a = torch.addcmul(shift, a, scale)
        a = (a.relu() if pre == "relu" else a).to(dtype).float()
    want = F.conv2d(
        a.double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2), padding=pad, dilation=dilation
    )
    want = want.permute(0, 2, 3, 1).reshape(m, k)
    eps = torch.finfo(dtype).eps
    # half a unit in the last place of y, a few that the prologue rounds elsewhere, the sum in float32
    torch.testing.assert_close(y.double(), want, rtol=eps, atol=2 * eps)

    stored = y.double()
    for t in range(tiles):
        rows = stored[t * BLOCK_M : (t + 1) * BLOCK_M]
        torch.testing.assert_close(mean[t].double(), rows.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(m2[t].double(), (rows - rows.mean(0)).square().sum(0), rtol=1e-4, atol=1e-4)


def test_statistics_far_from_zero(emulator: ctypes.CDLL) -> None:
    """The mean a thousand times the deviation: sum of squares minus square of the sum would leave nothing of M2."""
    c = k = 64
    x = (torch.randn(1, 16, 16, c) * 0.01 + 1).to(torch.float16)
    weight = torch.eye(k, c).to(torch.float16) * 1000
    y = torch.full((256, k), float("nan"), dtype=torch.float16)
    mean, m2 = torch.full((2, 2, k), float("nan")).unbind()
    sizes = [1, 16, 16, c, k, 1, 1, 0, 0, 1, 1, 0, 64, 1, 1, 7]
    vectors = torch.empty(c)
    status = emulator.conv_train(
        (ctypes.c_int * len(sizes))(*sizes), *map(address, (x, weight, vectors, vectors, y, mean, m2))
    )
    assert status == 0
    rows = y.double().reshape(2, 128, k)
    torch.testing.assert_close(m2.double(), (rows - rows.mean(1, True)).square().sum(1), rtol=1e-5, atol=0)
