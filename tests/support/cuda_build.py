"""csrc/cuda without a GPU: the same sources as a library for this CPU, under cuda_on_cpu/cuda_on_cpu.h."""

from __future__ import annotations

import ctypes
import hashlib
import os
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from source_tree import ROOT, SUPPORT
from torch.utils import cpp_extension

CSRC, SHIM = ROOT / "csrc" / "cuda", SUPPORT / "cuda_on_cpu"
# What runs on a CPU: no kernel that needs a tensor core.
KERNELS = tuple(CSRC / name for name in ("copy.cu", "norm.cu", "pool.cu", "stats.cu"))
# What checks, chooses and launches; CUTLASS's own convolutions are loops for a CPU here.
GLUE = (ROOT / "csrc" / "tensor.cpp", CSRC / "ops.cpp", CSRC / "conv_ops.cpp", SHIM / "register.cpp")
WARNINGS = ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
# What compilations depend on, and where their results are kept (``make clean`` removes them).
SOURCES = (
    ROOT / "csrc", SHIM, Path(__file__), ROOT / "tests" / "backends" / "test_cuda_codegen.py",
    ROOT / "benchmarks" / "codegen_cuda.py",
)  # fmt: skip
KEPT = ROOT / "build" / "tests"
_library: ctypes.CDLL | None = None


def digest() -> str:
    """Of the sources, of torch and of the compilers."""
    found = hashlib.sha256(torch.__version__.encode())
    path = os.pathsep.join([os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"])
    for compiler in filter(None, (shutil.which(name, path=path) for name in ("g++", "nvcc", "nvdisasm"))):
        found.update(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    for source in SOURCES:
        for path in sorted(p for p in (source.rglob("*") if source.is_dir() else [source]) if p.is_file()):
            found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def kept(name: str, make: Callable[[Path], Path]) -> Path:
    """The file that ``make(folder)`` compiles. It is compiled once for each ``digest``, also by several processes."""
    folder = KEPT / f"{name}-{digest()}"
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():  # a compilation that failed, or was stopped, leaves none
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / "done").write_text(str(make(folder)))
    return Path((folder / "done").read_text())


def torch_flags() -> list[str]:
    """For sources that include torch's headers, whose own warnings are not ours."""
    target = f"-DTORCH_TARGET_VERSION={runpy.run_path(str(ROOT / 'setup.py'))['OLDEST_TORCH']}"
    return [
        "-std=c++20",
        target,
        *WARNINGS,
        f"-I{CSRC}",
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
    ]


def compile_all(jobs: dict[Path, list[str]]) -> None:
    """Runs g++ for each {object: arguments}, two at a time."""

    def one(job: tuple[Path, list[str]]) -> None:
        command = ["g++", *job[1], "-c", "-o", str(job[0])]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, jobs.items()))


def build(folder: Path) -> Path:
    """The library with torch.ops.fused_resnet_cuda for CPU tensors; the objects beside it."""
    flags = ["-O1", "-g1", "-fPIC", f"-I{SHIM}"]
    glue = [*torch_flags(), *flags, "-DFUSED_RESNET_CUTLASS=0"]
    together = folder / "glue.cpp"  # torch's headers, which take longest, are read once
    together.write_text("".join(f'#include "{path}"\n' for path in GLUE))
    jobs = {together.with_suffix(".o"): [*glue, str(together)]}
    jobs |= kernels(folder, flags, (CSRC / "conv_sm90.cu", SHIM / "conv_on_cpu.cpp"))
    compile_all(jobs | kernels(folder, flags))
    return link(folder, "plain", [])


def sanitized(folder: Path, plain: Path) -> Path:
    """The same with AddressSanitizer and UndefinedBehaviorSanitizer in the kernels, from ``build``'s other objects in
    the folder ``plain``."""
    sanitized = kernels(folder, ["-O1", "-g1", "-fPIC", f"-I{SHIM}", *SANITIZED])
    compile_all(sanitized)
    for path in plain.glob("*.o"):
        if folder / path.name not in sanitized:
            shutil.copy(path, folder)
    return link(folder, "sanitized", SANITIZED)


def kernels(folder: Path, flags: list[str], paths: Iterable[Path] = KERNELS) -> dict[Path, list[str]]:
    """16-byte accesses through pointers to elements are what the kernels are made of: no strict aliasing."""
    ours = ["-std=c++20", *WARNINGS, "-fno-strict-aliasing", f"-I{CSRC}", *flags, "-x", "c++"]
    return {(folder / path.name).with_suffix(".o"): [*ours, str(path)] for path in paths}


def link(folder: Path, name: str, flags: list[str]) -> Path:
    library = folder / f"libfused_resnet_cuda_{name}.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    objects = [str(path) for path in sorted(folder.glob("*.o"))]
    command = ["g++", "-shared", *flags, "-o", str(library), *objects, f"-L{torch_lib}", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    return library


def use(library: Path | None) -> None:
    """Loads it, and lets the cuda backend serve a CPU; None: no longer."""
    from fused_resnet import planner
    from fused_resnet.backends import load
    from fused_resnet.backends.cuda import passes
    from fused_resnet.base.library import unavailable

    global _library
    unavailable()  # loads ours, which has the schemas
    if library is not None:
        torch.ops.load_library(library)
        _library = ctypes.CDLL(str(library))
    passes.ON_CPU = library is not None
    load.cache_clear()
    planner.preference._pick.cache_clear()


def backwards(on: bool) -> None:
    """Threads and blocks in the opposite order, from now on."""
    assert _library is not None
    _library.fused_resnet_cuda_on_cpu_backwards(on)


def convolutions() -> int:
    """How many of CUTLASS's convolutions were launched."""
    assert _library is not None
    runs: int = _library.fused_resnet_cuda_on_cpu_conv_runs()
    return runs


def idle_convolutions(on: bool) -> None:
    """From now on they write nothing, and say that all is well."""
    assert _library is not None
    _library.fused_resnet_cuda_on_cpu_conv_idle(on)
