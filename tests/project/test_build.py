"""setup.py's promises. A stub of torch stands in where its answers decide, so that every machine tests every case, in
no time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT, add_cuda_source, run

STUB_TORCH = """
from torch import version
__version__ = "9.9"
"""
STUB_CPP_EXTENSION = """
import json, os
from setuptools import Extension
from setuptools.command.build_ext import build_ext
def get_cxx_compiler():
    return os.environ.get("CXX", "c++")
def CppExtension(name, sources, **kwargs):
    kwargs.pop("extra_compile_args")
    return Extension(name, sources, **kwargs)
class BuildExtension(build_ext):
    def build_extensions(self):
        built = {"sources": self.extensions[0].sources, "macros": self.extensions[0].define_macros}
        built["objects"], built["libraries"] = self.extensions[0].extra_objects, self.extensions[0].libraries
        built |= {key: os.environ.get(key) for key in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS")}
        print("BUILT", json.dumps(built))
"""

# Found, runs, and is never asked to compile anything.
A_COMPILER = sys.executable


@pytest.fixture
def stub_torch(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with a torch that says what the test wants it to say."""
    utils = tmp_path / "stub" / "torch" / "utils"
    utils.mkdir(parents=True)
    (utils.parent / "__init__.py").write_text(STUB_TORCH)
    (utils.parent / "version.py").write_text("import os\ncuda = os.environ.get('STUB_TORCH_CUDA')\n")
    (utils / "__init__.py").touch()
    (utils / "cpp_extension.py").write_text(STUB_CPP_EXTENSION)
    return tmp_path / "stub"


@pytest.fixture
def cuda_home(tmp_path: Path) -> Path:
    """A CUDA 13.0 whose nvcc only tells its version, and writes down what it is asked to compile."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n"
        f'case $* in --version) ;; *) echo "$*" >> {tmp_path / "compiled"}; for to; do :; done; touch $to; esac\n'
    )
    nvcc.chmod(0o755)
    header = tmp_path / "cuda" / "include" / "cuda_runtime.h"
    header.parent.mkdir()
    header.touch()
    return tmp_path / "cuda"


def no_cuda_source(tree: Path) -> None:
    shutil.rmtree(tree / "csrc" / "cuda", ignore_errors=True)


def built(result: subprocess.CompletedProcess[str]) -> dict:
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("BUILT "))
    return json.loads(line.removeprefix("BUILT "))


@pytest.mark.parametrize("asked", [{"FUSED_RESNET_CUDA": "1"}, {"TORCH_CUDA_ARCH_LIST": "8.0"}])
def test_cuda_part_beside_a_cpu_build_of_torch(
    tree: Path, stub_torch: Path, cuda_home: Path, asked: dict[str, str]
) -> None:
    """CUDA's own library, linked statically, is all that it needs; but only who asks for it waits for nvcc."""
    stub = {"PYTHONPATH": str(stub_torch), "CUDA_HOME": str(cuda_home)}
    found = built(run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, **stub, **asked))
    assert "csrc/cuda/ops.cpp" in found["sources"] and "cudart_static" in found["libraries"]
    assert {"norm", "pool", "stats", "copy"} <= {Path(path).stem for path in found["objects"]}
    result = run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, **stub)
    assert "building the CPU part only: torch 9.9 is not a CUDA build" in result.stdout
    assert not built(result)["objects"] and "cudart_static" not in built(result)["libraries"]


def test_cuda_1_without_nvcc_or_kernels_says_both(tree: Path, stub_torch: Path, tmp_path: Path) -> None:
    no_cuda_source(tree)
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "CUDA_HOME": str(tmp_path / "nowhere")}
    result = run(["setup.py", "egg_info"], tree, FUSED_RESNET_CUDA="1", **stub)
    assert result.returncode != 0
    assert result.stderr.strip() == (
        "FUSED_RESNET_CUDA=1 can't be met: csrc/cuda has no .cu file, "
        "and nvcc was not found (set CUDA_HOME, or put nvcc on PATH)."
    )


def test_cuda_1_refuses_an_old_nvcc(tree: Path, stub_torch: Path, cuda_home: Path) -> None:
    add_cuda_source(tree)
    nvcc = cuda_home / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("13.0", "12.4"))
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "CUDA_HOME": str(cuda_home)}
    result = run(["setup.py", "egg_info"], tree, FUSED_RESNET_CUDA="1", **stub)
    assert result.returncode != 0
    assert "nvcc is of CUDA 12.4, older than 12.6" in result.stderr


def test_cuda_home_without_headers_is_told_before_anything_compiles(
    tree: Path, stub_torch: Path, cuda_home: Path
) -> None:
    """As where the nvcc on PATH is a script of its own: torch takes the folder above it for CUDA_HOME."""
    add_cuda_source(tree)
    shutil.rmtree(cuda_home / "include")
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "CUDA_HOME": str(cuda_home)}
    result = run(["setup.py", "egg_info"], tree, FUSED_RESNET_CUDA="1", **stub)
    said = f"{cuda_home} has nvcc but not CUDA's headers (set CUDA_HOME to the toolkit's folder)"
    assert result.returncode != 0 and result.stderr.strip() == f"FUSED_RESNET_CUDA=1 can't be met: {said}."
    auto = run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, **stub)
    assert f"building the CPU part only: {said}" in auto.stdout
    assert not [name for name in built(auto)["sources"] if "cuda" in name]


@pytest.mark.parametrize("given", [None, "7.5"])
def test_cuda_part_is_built_where_it_can_be(
    tree: Path, stub_torch: Path, cuda_home: Path, given: str | None, tmp_path: Path
) -> None:
    add_cuda_source(tree)
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "CUDA_HOME": str(cuda_home)}
    extra = {"TORCH_CUDA_ARCH_LIST": given} if given else {}
    result = built(run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, **stub, **extra))
    commands = (tmp_path / "compiled").read_text().splitlines()
    codes = [word for word in commands[0].split() if "gencode" in word]
    assert codes[0] == f"-gencode=arch=compute_{'75' if given else '80'},code=sm_{'75' if given else '80'}"
    assert len(codes) == (1 if given else 6) and (given or codes[-1].endswith("code=compute_100"))
    assert "csrc/cuda/ops.cpp" in result["sources"] and "probe" in {Path(path).stem for path in result["objects"]}
    archs = given or "8.0;8.6;8.9;9.0a;10.0+PTX"
    assert ["FUSED_RESNET_WITH_CUDA", "1"] in result["macros"]
    assert ["FUSED_RESNET_CUDA_ARCHS", archs] in result["macros"] and result["TORCH_CUDA_ARCH_LIST"] == archs
    assert 1 <= int(result["MAX_JOBS"]) <= (os.cpu_count() or 1)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_wheel_asks_for_the_cuda_part_where_nvcc_is_there(tree: Path, cuda_home: Path, tmp_path: Path) -> None:
    """Beside a CPU build of torch, too; a value that is given stays."""
    asked, venv = tmp_path / "asked", tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python, auditwheel = venv / "bin" / "python", venv / "bin" / "auditwheel"
    python.write_text(
        f'#!/bin/sh\ntest "$1" != -c || exec {sys.executable} "$@"\necho "$FUSED_RESNET_CUDA" > {asked}\n'
    )
    auditwheel.write_text("#!/bin/sh\n")
    for path in (python, auditwheel):
        path.chmod(0o755)
    for name in (".created", ".requirements"):
        (venv / name).touch()
    shutil.copy(ROOT / "Makefile", tree)
    environ = {key: value for key, value in os.environ.items() if key not in ("FUSED_RESNET_CUDA", "CUDA_PATH")}

    def asks(home: Path, **variables: str) -> str:
        command = ["make", "wheel", f"VENV={venv}", "REQUIREMENTS="]
        given = environ | {"CUDA_HOME": str(home)} | variables
        done = subprocess.run(command, cwd=tree, env=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return asked.read_text().strip()

    assert asks(cuda_home) == "1"
    assert asks(cuda_home, FUSED_RESNET_CUDA="0") == "0"
    assert asks(tmp_path / "nowhere") == "auto"


def cutlass(stub_torch: Path, there: bool) -> Path:
    """A package cutlass_library before that of the environment, with headers or without."""
    package = stub_torch / "cutlass_library"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    if there:
        version = package / "source" / "include" / "cutlass" / "version.h"
        version.parent.mkdir(parents=True)
        version.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 12\n#define CUTLASS_PATCH 1 \n")
    return package / "source" / "include"


def test_cutlass_is_built_for_sm_90a_alone(tree: Path, stub_torch: Path, cuda_home: Path, tmp_path: Path) -> None:
    """Objects of their own flags, linked with the rest; our own training convolution is not among them. Made once."""
    include = cutlass(stub_torch, there=True)
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "CUDA_HOME": str(cuda_home), "CC": "gcc-13"}
    result = run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, **stub)
    found, every = built(result), (tmp_path / "compiled").read_text().splitlines()
    compiled = [line for line in every if "-DNDEBUG" in line]
    assert "building without" not in result.stdout
    assert ["FUSED_RESNET_CUTLASS", "4.12.1"] in found["macros"]
    ours = {name for name in found["sources"] if "cuda/conv_" in name}
    assert ours == {"csrc/cuda/conv_ops.cpp"}
    kernels = {path.stem for path in (tree / "csrc" / "cuda").glob("conv_sm90_*.cu")}
    objects = {Path(path).stem for path in found["objects"]}
    assert len(kernels) > 3 and kernels | {"conv_sm90", "norm"} <= objects and "conv_train_sm90" not in objects
    assert len(compiled) == len(kernels) and all((tree / path).exists() for path in found["objects"])
    for command in compiled:
        words = command.split()
        assert {"-DNDEBUG", "--expt-relaxed-constexpr", f"-isystem={include}"} < set(words)
        assert [w for w in words if "gencode" in w or "arch" in w] == ["-gencode=arch=compute_90a,code=sm_90a"]
        assert words[words.index("-ccbin") + 1] == "gcc-13" and "-Xcompiler=-fPIC,-fvisibility=hidden" in words
        assert words[-4] == "-c" and Path(words[-3]).stem == Path(words[-1]).stem
    built(run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, **stub))
    assert len((tmp_path / "compiled").read_text().splitlines()) == len(every), "compiled again"
    header = include / "cutlass" / "version.h"
    header.write_text(header.read_text().replace("PATCH 1", "PATCH 2"))
    built(run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, MAX_JOBS="0", **stub))
    again = (tmp_path / "compiled").read_text().splitlines()[len(every) :]
    assert len(again) == len(kernels) and all("-DNDEBUG" in line for line in again), "CUTLASS is another one"
    os.utime(tree / "csrc" / "bn_math.h", (2e9, 2e9))
    built(run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, MAX_JOBS="many", **stub))
    assert len((tmp_path / "compiled").read_text().splitlines()) == 2 * len(every) + len(kernels), "a header is newer"


@pytest.mark.parametrize(
    ("there", "archs", "reason"),
    [
        (False, None, "its headers were not found (pip install --no-deps nvidia-cutlass)."),
        (True, "8.0;9.0+PTX", "TORCH_CUDA_ARCH_LIST=8.0;9.0+PTX has no 9.0a, for which alone they are."),
    ],
)
def test_without_cutlass_it_says_why(
    tree: Path, stub_torch: Path, cuda_home: Path, tmp_path: Path, there: bool, archs: str | None, reason: str
) -> None:
    cutlass(stub_torch, there)
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "CUDA_HOME": str(cuda_home)}
    extra = {"TORCH_CUDA_ARCH_LIST": archs} if archs else {}
    result = run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, FUSED_RESNET_CUDA="1", **stub, **extra)
    found = built(result)
    lines = [line for line in result.stdout.splitlines() if "CUTLASS" in line and not line.startswith("BUILT")]
    assert lines == [f"fused_resnet: building without CUTLASS's convolutions: {reason}"]
    assert not any("conv_" in Path(name).name for name in found["sources"] + found["objects"])
    assert "FUSED_RESNET_CUTLASS" not in dict(found["macros"])
    assert "conv_sm90" not in (tmp_path / "compiled").read_text()


def test_a_convolution_that_does_not_compile(tree: Path, stub_torch: Path, cuda_home: Path) -> None:
    cutlass(stub_torch, there=True)
    nvcc = cuda_home / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("touch $to", "case $* in *NDEBUG*) exit 1; esac; touch $to"))
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "CUDA_HOME": str(cuda_home)}
    result = run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, **stub)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert result.stderr.startswith("nvcc could not compile csrc/cuda/conv_sm90_")


def test_compilers_as_memory_allows(tree: Path) -> None:
    """2 GiB for each; 4 where it compiles CUTLASS."""
    code = (
        "import os, pathlib, runpy; made = runpy.run_path('setup.py');"
        "os.sched_getaffinity = lambda pid: range(64); read = pathlib.Path.read_text;"
        "pathlib.Path.read_text = lambda self: 'MemAvailable: 14680064 kB' if str(self) == '/proc/meminfo' else 'max';"
        "pathlib.Path.exists = lambda self: True;"
        "print(made['default_jobs'](), made['default_jobs'](made['CUTLASS_BYTES_PER_JOB']))"
    )
    result = run(["-c", code], tree)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["7", "3"]


def test_cuda_0_leaves_the_cuda_part_out(tree: Path, stub_torch: Path, cuda_home: Path) -> None:
    add_cuda_source(tree)
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "CUDA_HOME": str(cuda_home)}
    result = run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, FUSED_RESNET_CUDA="0", **stub)
    assert not [name for name in built(result)["sources"] if "cuda" in name]
    assert "CPU part only" not in result.stdout


def test_cuda_auto_falls_back_and_says_why(tree: Path, stub_torch: Path) -> None:
    add_cuda_source(tree)
    result = run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, PYTHONPATH=str(stub_torch))
    assert not [name for name in built(result)["sources"] if "cuda" in name]
    assert "building the CPU part only: " in result.stdout
    assert "torch 9.9 is not a CUDA build" in result.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FUSED_RESNET_CUDA": "yes"}, "FUSED_RESNET_CUDA='yes' is not understood: expected one of auto, 0, 1."),
        ({"FUSED_RESNET_NO_EXT": "true"}, "FUSED_RESNET_NO_EXT='true' is not understood: expected one of 0, 1."),
        ({"FUSED_RESNET_NO_EXT": "1", "FUSED_RESNET_CUDA": "1"}, "contradict each other"),
    ],
)
def test_values_that_are_not_understood(tree: Path, stub_torch: Path, variables: dict[str, str], message: str) -> None:
    result = run(["setup.py", "egg_info"], tree, PYTHONPATH=str(stub_torch), **variables)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_torch_is_one_sentence(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    result = run(["setup.py", "egg_info"], tree, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert result.stderr.strip() == (
        "fused_resnet's build needs torch already installed: "
        "pip install torch first, then pip install --no-build-isolation ."
    )


def test_missing_compiler_names_the_way_out(tree: Path, stub_torch: Path) -> None:
    result = run(["setup.py", "build_ext"], tree, PYTHONPATH=str(stub_torch), CXX="no-such-compiler -O2")
    assert result.returncode != 0
    assert "'no-such-compiler' was not found" in result.stderr
    assert "FUSED_RESNET_NO_EXT=1" in result.stderr
    assert "Traceback" not in result.stderr
