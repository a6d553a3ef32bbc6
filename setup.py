"""Builds the library ``fused_resnet/lib/libfused_resnet.so``: csrc/cpu always, csrc/cuda where nvcc allows it.

It uses torch's stable ABI: built with one torch, it runs under every torch from OLDEST_TORCH on, with any Python.

Environment (the table is in CONTRIBUTING.md): FUSED_RESNET_CUDA=auto|0|1, FUSED_RESNET_NO_EXT=0|1, and what torch's
own builds read: TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CUDA_HOME.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.modified import newer_group

PACKAGE, CSRC = "fused_resnet", Path("csrc")
OLDEST_TORCH = "0x020b000000000000"  # 2.11
# Translation units that include ATen's headers take 1 to 2 GiB each; a build that swaps is slower than a serial one.
BYTES_PER_JOB = 2 << 30
# CUTLASS's convolutions and what chooses among them and calls them; conv_train_sm90.cu, our own, is not among them:
# it has never run on a GPU, and no comparison with other numbers saves a user from a kernel that waits for ever.
CONVOLUTIONS, CUTLASS = ("cuda/conv_sm90.cu", "cuda/conv_ops.cpp"), "cuda/conv_sm90_*.cu"
NVCC_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden")
# -DNDEBUG: with CUTLASS's assertions ptxas serializes every wgmma.
CUTLASS_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a")
CUTLASS_FLAGS += ("-Xcompiler=-fPIC,-fvisibility=hidden",)
CUTLASS_BYTES_PER_JOB = 4 << 30
Command = Callable[[str, str | Path, str | Path], list[str]]


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


def default_jobs(bytes_per_job: int = BYTES_PER_JOB) -> int:
    """As many compilers as there are cores and memory for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = []
    meminfo, cgroup = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        limits.append(int(found[1]) << 10)
    if cgroup.exists() and (text := cgroup.read_text().strip()).isdigit():
        limits.append(int(text))
    return max(1, min([cores, *(limit // bytes_per_job for limit in limits)]))


def nvcc_release(nvcc: str) -> tuple[int, int]:
    """(major, minor) of the CUDA compiler, (0, 0) if it does not say."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0, 0
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def find_nvcc() -> str | None:
    """The CUDA compiler, for which torch need not be a CUDA build."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")


def cuda_folders(nvcc: str, *names: str) -> list[Path]:
    """Folders of that name in the toolkit of the compiler."""
    home = Path(nvcc).parents[1]
    return [path for name in names for path in (home / name, *home.glob(f"targets/*/{name}")) if path.is_dir()]


def cuda_lacks() -> tuple[list[str], tuple[int, int]]:
    """What is missing for the CUDA part (empty: nothing), and nvcc's release."""
    lacks, release = [], (0, 0)
    if not sources("cuda/*.cu"):
        lacks.append("csrc/cuda has no .cu file")
    nvcc = find_nvcc()
    if nvcc is None:
        return [*lacks, "nvcc was not found (set CUDA_HOME, or put nvcc on PATH)"], release
    release, oldest = nvcc_release(nvcc), (12, 6)
    if release < oldest:
        lacks.append(f"nvcc is of CUDA {release[0]}.{release[1]}, older than {oldest[0]}.{oldest[1]}")
    # an nvcc on PATH that is a link or a script leads to a folder that holds nothing else
    elsewhere = any(os.environ.get(name) for name in ("CPATH", "CPLUS_INCLUDE_PATH"))
    if not elsewhere and not any((folder / "cuda_runtime.h").exists() for folder in cuda_folders(nvcc, "include")):
        home = Path(nvcc).parents[1]
        lacks.append(f"{home} has nvcc but not CUDA's headers (set CUDA_HOME to the toolkit's folder)")
    return lacks, release


def cutlass_includes() -> list[Path]:
    """The include folders of the package nvidia-cutlass, which is not imported; none where it is not installed."""
    found = importlib.util.find_spec("cutlass_library")
    folders = [Path(p) for p in found.submodule_search_locations or ()] if found else []
    parts = ("source/include", "source/tools/util/include")
    return [folder / part for folder in folders for part in parts if (folder / part).is_dir()]


def cutlass_version(includes: list[Path]) -> str:
    """As CUTLASS's own header has it: 4.2.0."""
    headers = [path for folder in includes if (path := folder / "cutlass" / "version.h").exists()]
    said = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH)\s+(\d+)", headers[0].read_text())) if headers else {}
    return ".".join(said.get(part, "0") for part in ("MAJOR", "MINOR", "PATCH"))


def cutlass_lacks(archs: str) -> list[str]:
    """What is missing for CUTLASS's convolutions where the CUDA part is built; ``archs``: TORCH_CUDA_ARCH_LIST."""
    lacks = []
    if not cutlass_includes():
        lacks.append("its headers were not found (pip install --no-deps nvidia-cutlass)")
    if "9.0a" not in {arch.removesuffix("+PTX") for arch in re.split(r"[;\s]+", archs)}:
        lacks.append(f"TORCH_CUDA_ARCH_LIST={archs} has no 9.0a, for which alone they are")
    return lacks


def cuda_sources(suffix: str, with_cutlass: bool) -> list[str]:
    """All but the convolutions, of which only those that call CUTLASS's have a place, beside them."""
    convolutions = {*sources("cuda/conv_*")} - {*(sources(*CONVOLUTIONS) if with_cutlass else ())}
    return sorted({*sources(f"cuda/*{suffix}")} - convolutions)


def host_compiler() -> list[str]:
    """nvcc's flag for the compiler of what runs on the CPU."""
    return ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []  # as torch's own builds do


def cutlass_command(nvcc: str, source: str | Path, to: str | Path) -> list[str]:
    """How a file with CUTLASS's convolutions is compiled: for sm_90a alone."""
    includes = [f"-isystem={folder}" for folder in cutlass_includes()]
    return [nvcc, *CUTLASS_FLAGS, *host_compiler(), *includes, "-c", str(source), "-o", str(to)]


def gencode(archs: str) -> list[str]:
    """nvcc's flags for the architectures of TORCH_CUDA_ARCH_LIST."""
    flags: list[str] = []
    for arch in re.split(r"[;\s]+", archs.strip("; ")):
        found = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if found is None:
            fail(f"TORCH_CUDA_ARCH_LIST={archs!r} is not understood: expected numbers, as in 8.0;9.0a;10.0+PTX.")
        number, kinds = found[1] + found[2], ["sm", "compute"] if found[3] else ["sm"]
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return flags


def cuda_command(nvcc: str, source: str | Path, to: str | Path) -> list[str]:
    """How the other files are compiled, for all architectures."""
    archs = gencode(os.environ["TORCH_CUDA_ARCH_LIST"])
    return [nvcc, *NVCC_FLAGS, *host_compiler(), *archs, "-c", str(source), "-o", str(to)]


def compile_cuda(nvcc: str, files: list[str], command: Command, folder: Path, bytes_per_job: int) -> list[str]:
    """The objects of these .cu files, those compiled again that are older than what they are made of: MAX_JOBS at once,
    or as many as memory allows. ``folder``: another one for other flags."""
    given, jobs = os.environ["MAX_JOBS"], default_jobs(bytes_per_job)
    if given.isdigit():  # as torch reads it
        jobs = max(1, min(jobs, int(given)))
    headers = sources("*.h", "cuda/*.h", "cuda/*.cuh")
    objects = {source: folder / f"{Path(source).stem}.o" for source in files}
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: str) -> None:
        if newer_group([source, *headers, "setup.py"], str(objects[source])):
            line = command(nvcc, source, objects[source])
            print(shlex.join(line), flush=True)
            if subprocess.run(line).returncode:
                objects[source].unlink(missing_ok=True)
                hint = "a TORCH_CUDA_ARCH_LIST without 9.0a builds without CUTLASS"
                fail(f"nvcc could not compile {source}{f': {hint}' if command is cutlass_command else ''}.")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compiled, objects))
    return [str(path) for path in objects.values()]


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

    asked = use_cuda == "1" or torch.version.cuda is not None or "TORCH_CUDA_ARCH_LIST" in os.environ
    lacks, release = cuda_lacks() if use_cuda != "0" and asked else ([], (0, 0))
    if use_cuda == "1" and lacks:
        fail(f"FUSED_RESNET_CUDA=1 can't be met: {', and '.join(lacks)}.")
    if use_cuda == "auto" and not asked:
        lacks = [f"torch {torch.__version__} is not a CUDA build (FUSED_RESNET_CUDA=1 builds the CUDA part, too)"]
    with_cuda = use_cuda != "0" and not lacks
    os.environ.setdefault("MAX_JOBS", str(default_jobs()))
    # Where pip put ninja, when the environment of the build is used without being activated.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    if with_cuda:
        # sm_100 came with CUDA 12.8
        newest = "10.0+PTX" if release >= (12, 8) else "9.0+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;8.6;8.9;9.0a;{newest}")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    no_cutlass = ", and ".join(cutlass_lacks(archs)) if with_cuda else ""
    with_cutlass, version = with_cuda and not no_cutlass, cutlass_version(cutlass_includes())
    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    nvcc = find_nvcc() or ""

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # pip gives every build a new folder; with one of its own, ninja recompiles only what has changed.
            self.build_temp = os.path.join("build", f"temp-torch{torch.__version__}{'-cuda' if with_cuda else ''}")

        def get_ext_filename(self, fullname):
            """No Python's name: no Python API is used, and torch loads the file."""
            return os.path.join(*fullname.split(".")) + ".so"

        def build_extensions(self):
            if shutil.which(compiler[0]) is None:
                fail(
                    f"fused_resnet's build needs a C++ compiler, and {compiler[0]!r} was not found: install g++ or "
                    "clang++ (or name yours in CXX), or set FUSED_RESNET_NO_EXT=1 for a pure-Python install, which "
                    "computes the same, slower."
                )
            if use_cuda == "auto" and lacks:
                print(f"fused_resnet: building the CPU part only: {', and '.join(lacks)}.", flush=True)
            if no_cutlass:
                print(f"fused_resnet: building without CUTLASS's convolutions: {no_cutlass}.", flush=True)
            objects, folder = self.extensions[0].extra_objects, Path(self.build_temp)
            if with_cuda:
                digest = hashlib.sha256(archs.encode()).hexdigest()[:8]
                objects += compile_cuda(nvcc, kernels, cuda_command, folder / f"nvcc-{digest}", BYTES_PER_JOB)
            if with_cutlass:
                objects += compile_cuda(
                    nvcc, sources(CUTLASS), cutlass_command, folder / f"cutlass-{version}", CUTLASS_BYTES_PER_JOB
                )
            super().build_extensions()

        def copy_extensions_to_source(self):
            """Of an editable install."""
            Path(PACKAGE, "lib").mkdir(exist_ok=True)
            super().copy_extensions_to_source()

    class Wheel(bdist_wheel):
        def get_tag(self):
            """Any Python 3, this platform."""
            return "py3", "none", super().get_tag()[2]

    # No -march: which instructions may run is decided on the user's machine, inside the sources. No -std: torch adds
    # the one that its headers need.
    # -ffp-contract=fast because GCC's ISO modes turn fused multiply-adds off; the -fno's let sqrt and selects vectorise
    # without giving up on NaN, Inf or the order of additions, as -ffast-math would.
    cxx = ["-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-ffp-contract=fast", "-fno-math-errno"]
    cxx += ["-fno-trapping-math", "-g0"]

    files = sources("*.cpp", "cpu/**/*.cpp")
    kernels: list[str] = []
    macros: list[tuple[str, str | None]] = [("TORCH_TARGET_VERSION", OLDEST_TORCH)]
    if with_cuda:
        files += cuda_sources(".cpp", with_cutlass)
        kernels += cuda_sources(".cu", with_cutlass)
        # nvcc's own list says 900 for 9.0a
        macros += [("FUSED_RESNET_WITH_CUDA", "1"), ("FUSED_RESNET_CUDA_ARCHS", archs)]
    if with_cutlass:
        macros.append(("FUSED_RESNET_CUTLASS", version))
    extension = cpp_extension.CppExtension(
        f"{PACKAGE}.lib.libfused_resnet",
        files,
        depends=sources("**/*.h", "**/*.inc", "**/*.cuh", "cuda/*.cu"),
        define_macros=macros,
        extra_compile_args=cxx,
        # -lgcc: its functions for 16-bit floats from the archive, for the shared library of older systems has none
        extra_link_args=["-Wl,--no-undefined", "-Wl,--exclude-libs,ALL", "-lgcc"],
        py_limited_api=True,
    )
    # PyTorch's C functions are in this library alone, which is loaded by the time that ours is
    extension.libraries = ["torch_cpu", "dl", "pthread"]
    if with_cuda:
        # CUDA's runtime goes into ours, so that no version of it need be there
        extension.include_dirs += map(str, cuda_folders(nvcc, "include"))
        extension.library_dirs += map(str, cuda_folders(nvcc, "lib64", "lib"))
        extension.libraries += ["cudart_static", "rt"]
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel}}


if __name__ == "__main__":  # benchmarks and tests read what is above
    setup(**extension_arguments())
