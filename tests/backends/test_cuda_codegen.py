"""A sample of csrc/cuda compiled for GPUs that are not here (all: benchmarks/codegen_cuda.py), and its host side."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_build
import pytest
from source_tree import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import codegen_cuda  # noqa: E402

needs_nvcc = pytest.mark.skipif(codegen_cuda.nvcc() is None, reason="nvcc was not found: no CUDA toolkit here")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "kernels"),
    [("norm.cu", "sm_90a", 64), ("stats.cu", "sm_80", 16), ("pool.cu", "sm_100", 16), ("copy.cu", "sm_80", 4)],
)
def test_compiled_kernels(name: str, target: str, kernels: int) -> None:
    """No warning, no spill, 128-bit loads wherever a thread has several channels."""

    def compiled(folder: Path) -> Path:
        file = folder / "reports.pickle"
        file.write_bytes(pickle.dumps(codegen_cuda.compile_file(ROOT / "csrc" / "cuda" / name, target)))
        return file

    reports = pickle.loads(cuda_build.kept(f"{name}-{target}", compiled).read_bytes())
    assert len(reports) == kernels
    assert {f"{r.kernel} {r.case}": r.failures for r in reports if r.failures} == {}
    if codegen_cuda.nvdisasm() is not None:
        assert all(r.wide_loads for r in reports if r.lanes > 1)


def test_what_makes_a_row_fail() -> None:
    good = {"kernel": "k", "case": "", "lanes": 8, "target": "sm_80", "registers": 64, "spills": 0, "shared": 0}
    assert not codegen_cuda.Report(**good, wide_loads=2).failures
    assert not codegen_cuda.Report(**good, wide_loads=None).failures, "where nobody could read them"
    assert not codegen_cuda.Report(**good | {"lanes": 1}, wide_loads=0).failures
    for bad in ({"spills": 8}, {"shared": 200_000}, {"wide_loads": 0}):
        assert len(codegen_cuda.Report(**good | {"wide_loads": 2} | bad).failures) == 1, bad


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt on this machine")
def test_rows_are_named() -> None:
    scope = "_ZN12fused_resnet4cuda39_GLOBAL__N__62392244_7_norm_cu_28850d20"
    name = scope + "13bn_act_kernelI13__nv_bfloat16Li8ELNS1_3AddE2EEEvNS0_4PassEl"
    kernel, case, lanes = codegen_cuda.describe(name)
    assert (kernel, lanes) == ("bn_act_kernel", 8) and case == "bf16 8 channels per thread + projection"


def test_without_nvcc_it_says_so(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "CUDA_HOME"} | {"PATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "benchmarks" / "codegen_cuda.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "nvcc was not found" in done.stderr


@needs_nvcc
@pytest.mark.parametrize("source", ["cuda/stream.cpp", "cuda/conv_ops.cpp", "bindings.cpp"])
def test_host_side_compiles(source: str) -> None:
    """With the CUDA part switched on. (ops.cpp is part of what test_cuda_kernels.py runs.)"""
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path(codegen_cuda.nvcc() or "").resolve().parents[1]]
    include = next((home / "include" for home in homes if (home / "include" / "cuda_runtime_api.h").exists()), None)
    if include is None:
        pytest.skip("no cuda_runtime_api.h beside nvcc")
    flags = [*cuda_build.torch_flags(), f"-isystem{include}"]
    flags += [
        "-DFUSED_RESNET_WITH_CUDA",
        "-DFUSED_RESNET_CUDA_ARCHS=8.0;9.0a;10.0+PTX",
        "-DFUSED_RESNET_CUTLASS=4.2.0",
        "-Wno-psabi",
    ]

    def compiled(folder: Path) -> Path:
        cuda_build.compile_all({folder / "host.o": [*flags, str(ROOT / "csrc" / source)]})
        return folder / "host.o"

    told = b"8.0;9.0a;10.0+PTX" in cuda_build.kept(Path(source).stem, compiled).read_bytes()
    assert told is (source == "bindings.cpp"), "what build_info says of the GPUs"


REASONS = """
import json
import torch
from fused_resnet.backends.cuda import passes as cuda
found = {}
real = cuda._built
cuda._built = lambda: True
found["no GPU"] = cuda.Passes().unavailable()
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda: (7, 5)
from fused_resnet.base import library
library.cuda_status = lambda: "no kernel image is available for execution on the device"
library.build_info = lambda: {"cuda_archs": "8.0;9.0a"}
found["other GPU"] = cuda.Passes().unavailable()
library.cuda_status = lambda: ""
found["fine"] = cuda.Passes().unavailable()
cuda._built = real
found["not built"] = cuda.Passes().unavailable()
library._load.cache_clear()
library.PATH = library.Path(library.__file__)  # a file of another kind
found["broken"] = cuda.Passes().unavailable()
print(json.dumps(found))
"""


def test_reasons_are_one_line() -> None:
    """Not built, no GPU, a GPU that the build is not for, a broken file: one clear line each, and no exception."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", REASONS], env=env, capture_output=True, text=True, timeout=100)
    if "compiled extension is not built" in done.stdout and "no GPU" not in done.stdout:
        pytest.skip("the compiled extension is not built here")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fine"] is None
    assert found["no GPU"].startswith("no GPU: ")
    assert found["not built"].startswith("not built: ")
    assert found["other GPU"] == (
        "built for 8.0;9.0a, can't run on this GPU (compute capability 7.5): "
        "no kernel image is available for execution on the device"
    )
    assert found["broken"].startswith("the compiled extension can't be loaded: ")
    assert all("\n" not in text for text in found.values() if text)
