"""The kernel of csrc/cuda/conv_train_sm90.cu, its very source, on a model of sm_90's instructions: no GPU, no nvcc."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conv_train_cases import CASES, check, run
from source_tree import ROOT, SUPPORT

CUDA = ROOT / "csrc" / "cuda"


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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution(emulator: ctypes.CDLL, case: tuple, seed: int) -> None:
    check(emulator, *case, seed=seed)


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
            check(library, *case, seed=number)
        except AssertionError:
            return
    pytest.fail(f"no case shows that {mistake}")
