"""Builds the extension ``fused_resnet._C``: csrc/cpu always, csrc/cuda where torch and nvcc allow it.

Environment (the table is in CONTRIBUTING.md): FUSED_RESNET_CUDA=auto|0|1, FUSED_RESNET_NO_EXT=0|1, and what torch's
own builds read: TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CUDA_HOME.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from setuptools import setup
from setuptools.modified import newer_group

CSRC = Path("csrc")
# Translation units that include ATen's headers take 1 to 2 GiB each; a build that swaps is slower than a serial one.
BYTES_PER_JOB = 2 << 30
# CUTLASS's convolutions and what chooses among them and calls them; conv_train_sm90.cu, our own, is not among them:
# it has never run on a GPU, and no comparison with other numbers saves a user from a kernel that waits for ever.
CONVOLUTIONS, CUTLASS = ("cuda/conv_sm90.cu", "cuda/conv_ops.cpp"), "cuda/conv_sm90_*.cu"
# -DNDEBUG: with CUTLASS's assertions ptxas serializes every wgmma.
CUTLASS_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a")
CUTLASS_FLAGS += ("-Xcompiler=-fPIC,-fvisibility=hidden",)
CUTLASS_BYTES_PER_JOB = 4 << 30


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


def find_nvcc(cuda_home: str | None) -> str | None:
    """The CUDA compiler. torch looks for CUDA only when it is a CUDA build itself; where it found one, that is the one
    it will call."""
    return shutil.which("nvcc", path=str(Path(cuda_home, "bin"))) if cuda_home else shutil.which("nvcc")


def cuda_lacks(torch, cuda_home: str | None) -> tuple[list[str], tuple[int, int]]:
    """What is missing for the CUDA part (empty: nothing), and nvcc's release."""
    lacks, release = [], (0, 0)
    if not sources("cuda/*.cu"):
        lacks.append("csrc/cuda has no .cu file")
    nvcc = find_nvcc(cuda_home)
    if nvcc is None:
        lacks.append("nvcc was not found (set CUDA_HOME, or put nvcc on PATH)")
    else:
        release = nvcc_release(nvcc)
        # an nvcc on PATH that is a link or a script leads torch to a CUDA_HOME that holds nothing else
        places = ("include", "targets/*/include")
        elsewhere = any(os.environ.get(name) for name in ("CPATH", "CPLUS_INCLUDE_PATH"))
        if cuda_home and not elsewhere and not any(any(Path(cuda_home).glob(f"{p}/cuda_runtime.h")) for p in places):
            lacks.append(f"{cuda_home} has nvcc but not CUDA's headers (set CUDA_HOME to the toolkit's folder)")
    if torch.version.cuda is None:
        lacks.append(f"torch {torch.__version__} is not a CUDA build")
    elif nvcc is not None and release[0] != int(torch.version.cuda.split(".")[0]):
        # torch refuses this pair too, but with a traceback and late; a difference in the minor version is fine.
        lacks.append(f"nvcc is of CUDA {release[0]}.{release[1]} but torch was built with CUDA {torch.version.cuda}")
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


def cutlass_command(nvcc: str, source: str | Path, to: str | Path) -> list[str]:
    """How a file with CUTLASS's convolutions is compiled: for sm_90a alone, which one flag list for all files of an
    extension, torch's, does not allow."""
    host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []  # as torch does
    includes = [f"-isystem={folder}" for folder in cutlass_includes()]
    return [nvcc, *CUTLASS_FLAGS, *host, *includes, "-c", str(source), "-o", str(to)]


def compile_cutlass(nvcc: str, folder: Path) -> list[str]:
    """The objects of CUTLASS's convolutions, those compiled again that are older than what they are made of. Each takes
    a minute and 4 GiB: MAX_JOBS at once, or as many as memory allows. ``folder``: another one for another CUTLASS."""
    given, jobs = os.environ["MAX_JOBS"], default_jobs(CUTLASS_BYTES_PER_JOB)
    if given.isdigit():  # as torch reads it
        jobs = max(1, min(jobs, int(given)))
    headers = sources("*.h", "cuda/*.h", "cuda/*.cuh")
    objects = {source: folder / f"{Path(source).stem}.o" for source in sources(CUTLASS)}
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: str) -> None:
        if newer_group([source, *headers, "setup.py"], str(objects[source])):
            command = cutlass_command(nvcc, source, objects[source])
            print(shlex.join(command), flush=True)
            if subprocess.run(command).returncode:
                objects[source].unlink(missing_ok=True)
                fail(f"nvcc could not compile {source}: a TORCH_CUDA_ARCH_LIST without 9.0a builds without CUTLASS.")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compiled, objects))
    return [str(path) for path in objects.values()]


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
    no_cutlass = ", and ".join(cutlass_lacks(os.environ["TORCH_CUDA_ARCH_LIST"])) if with_cuda else ""
    with_cutlass, version = with_cuda and not no_cutlass, cutlass_version(cutlass_includes())

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
            if no_cutlass:
                print(f"fused_resnet: building without CUTLASS's convolutions: {no_cutlass}.", flush=True)
            if with_cutlass:
                objects = Path(self.build_temp, f"cutlass-{version}")
                self.extensions[0].extra_objects += compile_cutlass(find_nvcc(cpp_extension.CUDA_HOME), objects)
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

    files = sources("bindings.cpp", "cpu/**/*.cpp")
    macros: list[tuple[str, str | None]] = []
    make = cpp_extension.CppExtension
    if with_cuda:
        files += sorted({*sources("cuda/*.cu", "cuda/*.cpp")} - {*sources("cuda/conv_*")})
        # nvcc's own list says 900 for 9.0a
        macros += [("FUSED_RESNET_WITH_CUDA", "1"), ("FUSED_RESNET_CUDA_ARCHS", os.environ["TORCH_CUDA_ARCH_LIST"])]
        make = cpp_extension.CUDAExtension
    if with_cutlass:
        files += sources(*CONVOLUTIONS)
        macros.append(("FUSED_RESNET_CUTLASS", version))
    extension = make(
        "fused_resnet._C",
        files,
        depends=sources("**/*.h", "**/*.inc", "**/*.cuh", CUTLASS),
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc_flags},
    )
    extension.extra_link_args = list(extension.extra_link_args or [])
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":  # benchmarks and tests read what is above
    setup(**extension_arguments())
