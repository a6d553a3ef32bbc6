"""The kernel of csrc/cuda/conv_train_sm90.cu, its very source, on a model of sm_90's instructions: no GPU, no nvcc."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from source_tree import ROOT, SUPPORT
from torch import Tensor
from torch.nn import functional as F

CUDA = ROOT / "csrc" / "cuda"
PRE = ("none", "identity", "relu")
BLOCK_M = 128


def build(kernel: str, folder: Path) -> ctypes.CDLL:
    """``kernel``: the text of the kernel's file, up to what launches it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    (folder / "kernel.cu").write_text(kernel + "}  // namespace\n}  // namespace fused_resnet::cuda\n")
    includes = [f"-I{p}" for p in (SUPPORT / "sm90_model", folder, CUDA)]
    # -fno-strict-aliasing as nvcc has it
    flags = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command = [compiler, *flags, *includes, "-shared", "-fPIC", str(SUPPORT / "conv_train_host.cpp")]
    done = subprocess.run([*command, "-o", str(folder / "host.so")], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "host.so"))


@pytest.fixture(scope="module")
def kernel() -> str:
    text = (CUDA / "conv_train_sm90.cu").read_text()
    return text[: text.index("// A function of the driver")]


@pytest.fixture(scope="module")
def emulator(kernel: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(kernel, tmp_path_factory.mktemp("conv_train"))


def address(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def run(
    emulator: ctypes.CDLL, x: Tensor, weight: Tensor, conv: dict, pre: str, norm: Tensor, block_n: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y [pixels, K], mean and M2 [tiles, K]; x NHWC, weight KRSC, conv as conv2d takes it, norm [2, C]."""
    n, h, w, c = x.shape
    k, r, s, _ = weight.shape
    stride, pad, dilation = conv["stride"], conv["padding"], conv["dilation"]
    p, q = ((a + 2 * b - dilation * (e - 1) - 1) // stride + 1 for a, b, e in ((h, pad[0], r), (w, pad[1], s)))
    y = torch.full((n * p * q, k), float("nan"), dtype=x.dtype)
    mean, m2 = torch.full((2, -(-n * p * q // BLOCK_M), k), float("nan")).unbind()
    blocks = 2 if r * s == 1 else 1  # one block: the ring of stages goes round several times
    sizes = [n, c, k, h, w, p, q, r, s, stride, stride, *pad, dilation, dilation]
    sizes += [PRE.index(pre), block_n, blocks, int(x.dtype == torch.float16), seed & 0x7FFFFFF]
    tensors = (x, weight, norm[0], norm[1], y, mean, m2)
    status = emulator.conv_train((ctypes.c_int * len(sizes))(*sizes), *map(address, tensors))
    assert status == 0, "the roles wait for each other" if status == 1 else f"no tile of {block_n} channels"
    return y, mean, m2


SAME = None
# (n, h, w, c), (k, r, s), stride, padding (SAME: y as large as x at stride 1), dilation, channels of a tile, prologue,
# dtype
CASES = [
    ((1, 16, 9, 128), (64, 1, 1), 1, SAME, 1, 64, "relu", torch.bfloat16),
    ((2, 9, 13, 64), (128, 1, 1), 1, SAME, 1, 128, "none", torch.bfloat16),
    ((1, 14, 14, 64), (200, 1, 1), 1, SAME, 1, 128, "identity", torch.bfloat16),
    ((2, 7, 7, 192), (72, 1, 1), 1, SAME, 1, 64, "relu", torch.float16),
    ((3, 7, 7, 64), (64, 3, 3), 1, SAME, 1, 64, "relu", torch.bfloat16),
    ((2, 8, 11, 64), (80, 3, 3), 1, SAME, 1, 128, "identity", torch.bfloat16),
    ((1, 5, 9, 64), (40, 3, 3), 1, SAME, 2, 64, "relu", torch.float16),
    ((1, 13, 6, 64), (24, 5, 3), 1, SAME, 1, 64, "none", torch.bfloat16),
    ((1, 12, 12, 64), (264, 1, 1), 1, SAME, 1, 256, "relu", torch.bfloat16),
    ((3, 15, 14, 64), (64, 3, 3), 2, SAME, 1, 64, "relu", torch.bfloat16),
    ((2, 14, 18, 128), (96, 1, 1), 2, SAME, 1, 128, "identity", torch.bfloat16),
    ((2, 13, 12, 64), (64, 3, 3), 1, (0, 0), 1, 64, "relu", torch.float16),
    ((3, 17, 20, 64), (16, 3, 5), 3, (2, 1), 2, 64, "identity", torch.bfloat16),
]


@pytest.mark.parametrize(("x_size", "w_size", "stride", "padding", "dilation", "block_n", "pre", "dtype"), CASES)
def test_convolution(
    emulator: ctypes.CDLL,
    x_size: tuple[int, int, int, int],
    w_size: tuple[int, int, int],
    stride: int,
    padding: tuple[int, int] | None,
    dilation: int,
    block_n: int,
    pre: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """y within one rounding of float64's, statistics of every tile those of y as stored, nothing left unwritten."""
    c = x_size[-1]
    k, r, s = w_size
    if padding is SAME:
        padding = ((r - 1) * dilation // 2, (s - 1) * dilation // 2)
    conv = {"stride": stride, "padding": padding, "dilation": dilation}
    x = (torch.randn(x_size) * 2 + 3).to(dtype)
    weight = (torch.randn(k, r, s, c) / (r * s * c) ** 0.5).to(dtype)
    scale, shift = norm = torch.randn(2, c) + torch.tensor([[0.0], [1.0]])  # a padded pixel would be act(shift)
    y, mean, m2 = run(emulator, x, weight, conv, pre, norm, block_n, seed)

    a = x.float()
    if pre != "none":
        a = torch.addcmul(shift, a, scale)
        a = (a.relu() if pre == "relu" else a).to(dtype).float()
    want = F.conv2d(a.double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2), **conv)
    want = want.permute(0, 2, 3, 1).reshape(y.shape)
    eps = torch.finfo(dtype).eps
    # half a unit in the last place of y, a few that the prologue rounds elsewhere, the sum in float32
    torch.testing.assert_close(y.double(), want, rtol=eps, atol=2 * eps)
    for t, rows in enumerate(y.double().split(BLOCK_M)):
        torch.testing.assert_close(mean[t].double(), rows.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(m2[t].double(), (rows - rows.mean(0)).square().sum(0), rtol=1e-4, atol=1e-4)


def test_statistics_far_from_zero(emulator: ctypes.CDLL) -> None:
    """The mean a thousand times the deviation: sum of squares minus square of the sum would leave nothing of M2."""
    c = k = 64
    x = (torch.randn(1, 16, 16, c) * 0.01 + 1).to(torch.float16)
    weight = torch.eye(k, c).to(torch.float16).reshape(k, 1, 1, c) * 1000
    conv = {"stride": 1, "padding": (0, 0), "dilation": 1}
    y, _, m2 = run(emulator, x, weight, conv, "none", torch.zeros(2, c), 64, 7)
    rows = y.double().reshape(2, 128, k)
    torch.testing.assert_close(m2.double(), (rows - rows.mean(1, True)).square().sum(1), rtol=1e-5, atol=0)


BARRIER = "sm90::named_barrier(kBarrierId, kConsumers);"
MISTAKES = {
    "A is overwritten while wgmma reads it": ("sm90::wgmma_wait<kBlockK / kStepK - 1>();", ""),
    "a stage is given back while wgmma reads it": (
        "barrier_arrive(empty + previous)",
        "barrier_arrive(empty + at.stage)",
    ),
    "y is staged while TMA stores the tile before": ("if (thread == 0) sm90::tma_store_wait_read();", ""),
    "statistics are read before they are written": (f"{BARRIER}\n        if (thread < BlockN", "if (thread < BlockN"),
    "the masks of two rows are exchanged": ("(r & 1 ? inside1 : inside0)", "(r & 1 ? inside0 : inside1)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_model_shows_mistakes(kernel: str, tmp_path: Path, mistake: str) -> None:
    """What these tests are worth: a kernel with one mistake passes no more."""
    right, wrong = MISTAKES[mistake]
    assert right in kernel
    library = build(kernel.replace(right, wrong, 1), tmp_path)
    for number, case in enumerate(CASES):
        try:
            test_convolution(library, *case, seed=number)
        except AssertionError:
            return
    pytest.fail(f"no case shows that {mistake}")
