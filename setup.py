"""Builds the extension ``fused_resnet._C``: csrc/cpu always, csrc/cuda where torch and nvcc allow it.

Environment (the table is in CONTRIBUTING.md): FUSED_RESNET_CUDA=auto|0|1, FUSED_RESNET_NO_EXT=0|1, and what torch's
own builds read: TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CUDA_HOME.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import setup

CSRC = Path("csrc")
# Translation units that include ATen's headers take 1 to 2 GiB each; a build that swaps is slower than a serial one.
BYTES_PER_JOB = 2 << 30
# Convolutions that no backend lists before they have run on a GPU: compiled by the tests and `make codegen` alone.
UNLISTED = "cuda/conv_*.cu"


def fail(sentence: str) -> NoReturn:
    """Ends the build with one sentence and no traceback; pip shows it as the last line of the output it quotes."""
    raise SystemExit(sentence)


def choice(name: str, *allowed: str) -> str:
    """The environment variable's value, the first allowed one by default."""
    value = os.environ.get(name) or allowed[0]
    if value not in allowed:
        fail(f"{name}={value!r} is not understood: expected one of {', '.join(allowed)}.")
    return value


def sources(*patterns: str) -> list[str]:
    """Relative paths, as setuptools wants them; sorted, so that every machine links in the same order."""
    return sorted(path.as_posix() for pattern in patterns for path in CSRC.glob(pattern))


def default_jobs() -> int:
    """As many compilers as there are cores and memory for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = []
    meminfo, cgroup = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        limits.append(int(found[1]) << 10)
    if cgroup.exists() and (text := cgroup.read_text().strip()).isdigit():
        limits.append(int(text))
    return max(1, min([cores, *(limit // BYTES_PER_JOB for limit in limits)]))


def nvcc_release(nvcc: str) -> tuple[int, int]:
    """(major, minor) of the CUDA compiler, (0, 0) if it does not say."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0, 0
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def cuda_lacks(torch, cuda_home: str | None) -> tuple[list[str], tuple[int, int]]:
    """What is missing for the CUDA part (empty: nothing), and nvcc's release."""
    lacks, release = [], (0, 0)
    if not sources("cuda/*.cu"):
        lacks.append("csrc/cuda has no .cu file")
    # torch looks for CUDA only when it is a CUDA build itself; where it found one, that is the one it will call.
    nvcc = shutil.which("nvcc", path=str(Path(cuda_home, "bin"))) if cuda_home else shutil.which("nvcc")
    if nvcc is None:
        lacks.append("nvcc was not found (set CUDA_HOME, or put nvcc on PATH)")
    else:
        release = nvcc_release(nvcc)
    if torch.version.cuda is None:
        lacks.append(f"torch {torch.__version__} is not a CUDA build")
    elif nvcc is not None and release[0] != int(torch.version.cuda.split(".")[0]):
        # torch refuses this pair too, but with a traceback and late; a difference in the minor version is fine.
        lacks.append(f"nvcc is of CUDA {release[0]}.{release[1]} but torch was built with CUDA {torch.version.cuda}")
    return lacks, release


def openmp_link_args(compiler: list[str]) -> list[str]:
    """at::parallel_for is a template that runs in parallel only where it is compiled with OpenMP. With GCC nothing is
    linked for it: torch has its OpenMP runtime loaded already, and a second one would bring a second set of threads.
    Clang's calls need clang's own runtime."""
    text = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    return ["-fopenmp"] if "clang" in text else []


def extension_arguments() -> dict:
    """ext_modules and cmdclass for setup()."""
    use_cuda = choice("FUSED_RESNET_CUDA", "auto", "0", "1")
    if choice("FUSED_RESNET_NO_EXT", "0", "1") == "1":
        if use_cuda == "1":
            fail("FUSED_RESNET_NO_EXT=1 and FUSED_RESNET_CUDA=1 contradict each other: unset one of them.")
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        fail(
            "fused_resnet's build needs torch already installed: "
            "pip install torch first, then pip install --no-build-isolation ."
        )

    lacks, nvcc = ([], (0, 0)) if use_cuda == "0" else cuda_lacks(torch, cpp_extension.CUDA_HOME)
    if use_cuda == "1" and lacks:
        fail(f"FUSED_RESNET_CUDA=1 can't be met: {', and '.join(lacks)}.")
    with_cuda = use_cuda != "0" and not lacks
    os.environ.setdefault("MAX_JOBS", str(default_jobs()))
    # Where pip put ninja, when the environment of the build is used without being activated.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    if with_cuda:
        # Set here because torch's own default needs a GPU at build time. sm_100 came with CUDA 12.8.
        newest = "10.0+PTX" if nvcc >= (12, 8) else "9.0+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;8.6;8.9;9.0a;{newest}")

    compiler = shlex.split(cpp_extension.get_cxx_compiler())

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # pip gives every build a new folder; with one of its own, ninja recompiles only what has changed.
            tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
            self.build_temp = os.path.join("build", f"temp-{tag}-cuda" if with_cuda else f"temp-{tag}")

        def build_extensions(self):
            if shutil.which(compiler[0]) is None:
                fail(
                    f"fused_resnet's build needs a C++ compiler, and {compiler[0]!r} was not found: install g++ or "
                    "clang++ (or name yours in CXX), or set FUSED_RESNET_NO_EXT=1 for a pure-Python install, which "
                    "computes the same, slower."
                )
            if use_cuda == "auto" and lacks:
                print(f"fused_resnet: building the CPU part only: {', and '.join(lacks)}.", flush=True)
            if "-fopenmp" in cxx:
                self.extensions[0].extra_link_args += openmp_link_args(compiler)
            super().build_extensions()

    # No -march: which instructions may run is decided on the user's machine, inside the sources. No -std: torch adds
    # the one its own headers need (C++20 from 2.14 on, where they refuse C++17).
    # -ffp-contract=fast because GCC's ISO modes turn fused multiply-adds off; the -fno's let sqrt and selects vectorise
    # without giving up on NaN, Inf or the order of additions, as -ffast-math would.
    cxx = ["-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-ffp-contract=fast", "-fno-math-errno"]
    cxx += ["-fno-trapping-math", "-g0"]
    if sys.platform == "linux":
        cxx.append("-fopenmp")
    nvcc_flags = ["-O3", "-lineinfo", "-Xcompiler", "-fvisibility=hidden"]

    files = sources("bindings.cpp", "cpu/*.cpp")
    make = cpp_extension.CppExtension
    if with_cuda:
        files += sorted({*sources("cuda/*.cu", "cuda/*.cpp")} - {*sources(UNLISTED)})
        make = cpp_extension.CUDAExtension
    extension = make(
        "fused_resnet._C",
        files,
        depends=sources("**/*.h", "**/*.cuh"),
        define_macros=[("FUSED_RESNET_WITH_CUDA", "1")] if with_cuda else [],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc_flags},
    )
    extension.extra_link_args = list(extension.extra_link_args or [])
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**extension_arguments())
