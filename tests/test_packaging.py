"""The import rule, setup.py's promises, and what ``import fused_resnet`` costs."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fused_resnet"

# --------------------------------------------------------------------------------------------------------------------
# Who may import whom. A module imports from its own tier or a lower one; the graph of files has no cycle.

TIERS = (
    {"_C", "_version", "reference", "spec"},
    {"backends"},
    {"plan_cache", "planner", "small"},
    {"chain", "chain_backward", "chain_forward", "frozen_forward", "joint"},
    {"checks", "functional", "units"},
    {"modules", "patterns"},
    {"analysis", "convert", "cuda_graphs", "explanation", "freezing", "matching", "models", "plans", "tracing"},
    {"measure", "traffic"},
    {""},  # fused_resnet/__init__.py: the public names
    {"training"},
    {"studies"},
    {"cli"},
    {"__main__"},
)
# Seen by anybody, themselves seeing torch and the standard library only.
TORCH_ONLY = {"_version", "reference"}


def tier(module: str) -> int | None:
    """The tier of "fused_resnet.backends.cpu" is that of its first part, "backends"."""
    part = module.removeprefix(PACKAGE).lstrip(".").split(".")[0]
    return next((level for level, parts in enumerate(TIERS) if part in parts), None)


def module_name(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, without the bodies of ``if TYPE_CHECKING``: what is not run can't make a cycle."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield child
        yield from runtime_nodes(child)


def absolute(name: str, module: str, is_package: bool, level: int) -> str:
    """``from ..name`` inside ``module``, spelled out."""
    if not level:
        return name
    parts = module.split(".")
    base = parts[: len(parts) - level + is_package]
    return ".".join([*base, *([name] if name else [])])


def imported(source: str, path: str, known: set[str]) -> Iterator[str]:
    """Absolute names of the modules that a source imports; functions' late imports and importlib's count too."""
    module, is_package = module_name(path), path.endswith("/__init__.py")
    for node in runtime_nodes(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", module, is_package, node.level)
            for alias in node.names:
                # "from fused_resnet.backends import cpu" imports a module if there is one of that name, else a value.
                below = f"{base}.{alias.name}"
                yield below if below in known or below == f"{PACKAGE}._C" else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    yield absolute(name.lstrip("."), module, is_package, len(name) - len(name.lstrip(".")))


def cycles(graph: Mapping[str, set[str]]) -> Iterator[str]:
    """Each cycle that a depth-first walk closes, as "a -> b -> a"."""
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> Iterator[str]:
        if node in trail:
            yield " -> ".join([*trail[trail.index(node) :], node])
        elif node not in done:
            for successor in sorted(graph.get(node, ())):
                yield from walk(successor, [*trail, node])
            done.add(node)

    for start in sorted(graph):
        yield from walk(start, [])


def violations(sources: Mapping[str, str]) -> list[str]:
    """What breaks the import rule in {path: source}, one sentence each."""
    known = {module_name(path) for path in sources}
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for path, source in sorted(sources.items()):
        module = module_name(path)
        mine = tier(module)
        if mine is None:
            found.append(f"{module} has no tier: give it one in TIERS, and in the design's list")
            continue
        graph[module] = set()
        for name in imported(source, path, known):
            first = name.split(".")[0]
            if first != PACKAGE:
                if module.removeprefix(f"{PACKAGE}.") in TORCH_ONLY and first not in sys.stdlib_module_names | {
                    "torch"
                }:
                    found.append(f"{module} imports {name}, it may import torch only")
                continue
            if module.removeprefix(f"{PACKAGE}.") in TORCH_ONLY:
                found.append(f"{module} imports {name}, it may import torch only")
            theirs = tier(name)
            if theirs is None or theirs > mine:
                found.append(f"{module} imports {name}, which is above it")
            if name != module:
                graph[module].add(name)
    return found + [f"cycle: {cycle}" for cycle in cycles(graph)]


def test_import_rule_holds() -> None:
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / PACKAGE).rglob("*.py")}
    assert len(sources) > 1
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"spec.py": "from fused_resnet.chain import run", "chain.py": ""}, "fused_resnet.spec imports"),
        (
            {"backends/cpu.py": "from ..planner import pick", "planner.py": ""},
            "backends.cpu imports fused_resnet.planner",
        ),
        ({"backends/__init__.py": "from .. import planner", "planner.py": ""}, "backends imports fused_resnet.planner"),
        ({"chain.py": "def f():\n    import fused_resnet.modules", "modules.py": ""}, "which is above it"),
        ({"spec.py": "import importlib\nimportlib.import_module('fused_resnet.convert')"}, "which is above it"),
        ({"models/resnet.py": "import fused_resnet", "__init__.py": ""}, "models.resnet imports fused_resnet,"),
        (
            {"__init__.py": "from fused_resnet import cli", "cli/__init__.py": ""},
            "fused_resnet imports fused_resnet.cli",
        ),
        ({"reference.py": "import numpy"}, "may import torch only"),
        ({"reference.py": "from fused_resnet.spec import Act", "spec.py": ""}, "may import torch only"),
        ({"helpers.py": ""}, "fused_resnet.helpers has no tier"),
        (
            {"convert.py": "from .models import resnet", "models/resnet.py": "from fused_resnet import convert"},
            "cycle: ",
        ),
        ({"cli/__init__.py": "from .env import run", "cli/env.py": "from . import main"}, "cycle: "),
    ],
)
def test_import_rule_checker_finds(sources: dict[str, str], expected: str) -> None:
    assert any(expected in line for line in violations({f"{PACKAGE}/{path}": text for path, text in sources.items()}))


def test_import_rule_checker_allows() -> None:
    sources = {
        "__init__.py": "from fused_resnet import models\nfrom fused_resnet.convert import fuse",
        "_version.py": "",
        "spec.py": "import math",
        "reference.py": "import torch\nif TYPE_CHECKING:\n    from fused_resnet.spec import Act",
        "backends/__init__.py": "from fused_resnet.spec import Act\nimport importlib\nimportlib.import_module(name)",
        "backends/cpu.py": "from fused_resnet import _C\nfrom . import Case\nfrom .aten import conv",
        "backends/aten.py": "from ..spec import Act",
        "convert.py": "from .models import resnet\nfrom fused_resnet.modules import Chain",
        "models/__init__.py": "from .resnet import resnet18",
        "models/resnet.py": "import numpy",
        "modules.py": "from fused_resnet.spec import Act",
        "cli/__init__.py": "import fused_resnet\nfrom fused_resnet.reference import chain",
    }
    assert violations({f"{PACKAGE}/{path}": text for path, text in sources.items()}) == []


# --------------------------------------------------------------------------------------------------------------------
# setup.py. A stub of torch stands in where its answers decide, so that every machine tests every case, in no time.

STUB_TORCH = """
from torch import version
__version__ = "9.9"
"""
STUB_CPP_EXTENSION = """
import json, os
from setuptools import Extension
from setuptools.command.build_ext import build_ext
CUDA_HOME = os.environ.get("STUB_CUDA_HOME")
def get_cxx_compiler():
    return os.environ.get("CXX", "c++")
def CppExtension(name, sources, **kwargs):
    kwargs.pop("extra_compile_args")
    return Extension(name, sources, **kwargs)
CUDAExtension = CppExtension
class BuildExtension(build_ext):
    def build_extensions(self):
        built = {"sources": self.extensions[0].sources, "macros": self.extensions[0].define_macros}
        built["objects"] = self.extensions[0].extra_objects
        built |= {key: os.environ.get(key) for key in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS")}
        print("BUILT", json.dumps(built))
"""


# Found, runs, and is never asked to compile anything.
A_COMPILER = sys.executable


def run(args: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python subprocess without our own variables; returns when it ends, whatever its status."""
    ours = ("FUSED_RESNET_", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "PYTHONPATH", "CUDA_HOME", "CUDA_PATH")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=environ | variables, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a source distribution holds, with one .cpp file where csrc has none yet."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in (PACKAGE, "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return copy


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


def add_cuda_source(tree: Path) -> None:
    (tree / "csrc" / "cuda").mkdir(exist_ok=True)
    (tree / "csrc" / "cuda" / "probe.cu").touch()


def no_cuda_source(tree: Path) -> None:
    shutil.rmtree(tree / "csrc" / "cuda", ignore_errors=True)


def built(result: subprocess.CompletedProcess[str]) -> dict:
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("BUILT "))
    return json.loads(line.removeprefix("BUILT "))


def test_cuda_1_with_a_cpu_torch_says_what_is_missing(tree: Path, stub_torch: Path, cuda_home: Path) -> None:
    add_cuda_source(tree)
    path = os.pathsep.join([str(cuda_home / "bin"), os.environ["PATH"]])
    result = run(["setup.py", "egg_info"], tree, PYTHONPATH=str(stub_torch), FUSED_RESNET_CUDA="1", PATH=path)
    assert result.returncode != 0
    assert result.stderr.strip() == "FUSED_RESNET_CUDA=1 can't be met: torch 9.9 is not a CUDA build."


def test_cuda_1_without_nvcc_or_kernels_says_both(tree: Path, stub_torch: Path, tmp_path: Path) -> None:
    no_cuda_source(tree)
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "STUB_CUDA_HOME": str(tmp_path / "nowhere")}
    result = run(["setup.py", "egg_info"], tree, FUSED_RESNET_CUDA="1", **stub)
    assert result.returncode != 0
    assert result.stderr.strip() == (
        "FUSED_RESNET_CUDA=1 can't be met: csrc/cuda has no .cu file, "
        "and nvcc was not found (set CUDA_HOME, or put nvcc on PATH)."
    )


def test_cuda_1_refuses_an_nvcc_of_another_major_version(tree: Path, stub_torch: Path, cuda_home: Path) -> None:
    add_cuda_source(tree)
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "12.8", "STUB_CUDA_HOME": str(cuda_home)}
    result = run(["setup.py", "egg_info"], tree, FUSED_RESNET_CUDA="1", **stub)
    assert result.returncode != 0
    assert "nvcc is of CUDA 13.0 but torch was built with CUDA 12.8" in result.stderr


def test_cuda_home_without_headers_is_told_before_anything_compiles(
    tree: Path, stub_torch: Path, cuda_home: Path
) -> None:
    """As where the nvcc on PATH is a script of its own: torch takes the folder above it for CUDA_HOME."""
    add_cuda_source(tree)
    shutil.rmtree(cuda_home / "include")
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "STUB_CUDA_HOME": str(cuda_home)}
    result = run(["setup.py", "egg_info"], tree, FUSED_RESNET_CUDA="1", **stub)
    said = f"{cuda_home} has nvcc but not CUDA's headers (set CUDA_HOME to the toolkit's folder)"
    assert result.returncode != 0 and result.stderr.strip() == f"FUSED_RESNET_CUDA=1 can't be met: {said}."
    auto = run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, **stub)
    assert f"building the CPU part only: {said}" in auto.stdout
    assert not [name for name in built(auto)["sources"] if "cuda" in name]


@pytest.mark.parametrize("given", [None, "7.5"])
def test_cuda_part_is_built_where_it_can_be(tree: Path, stub_torch: Path, cuda_home: Path, given: str | None) -> None:
    add_cuda_source(tree)
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "STUB_CUDA_HOME": str(cuda_home)}
    extra = {"TORCH_CUDA_ARCH_LIST": given} if given else {}
    result = built(run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, **stub, **extra))
    assert "csrc/cuda/probe.cu" in result["sources"]
    assert ["FUSED_RESNET_WITH_CUDA", "1"] in result["macros"]
    assert result["TORCH_CUDA_ARCH_LIST"] == (given or "8.0;8.6;8.9;9.0a;10.0+PTX")
    assert 1 <= int(result["MAX_JOBS"]) <= (os.cpu_count() or 1)


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
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "STUB_CUDA_HOME": str(cuda_home), "CC": "gcc-13"}
    result = run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, **stub)
    found, compiled = built(result), (tmp_path / "compiled").read_text().splitlines()
    assert "building without" not in result.stdout
    assert ["FUSED_RESNET_CUTLASS", "4.12.1"] in found["macros"]
    ours = {name for name in found["sources"] if "cuda/conv_" in name}
    assert ours == {"csrc/cuda/conv_sm90.cu", "csrc/cuda/conv_ops.cpp"}
    assert "csrc/cuda/norm.cu" in found["sources"]
    kernels = {path.stem for path in (tree / "csrc" / "cuda").glob("conv_sm90_*.cu")}
    assert len(kernels) > 3 and {Path(path).stem for path in found["objects"]} == kernels
    assert len(compiled) == len(kernels) and all((tree / path).exists() for path in found["objects"])
    for command in compiled:
        words = command.split()
        assert {"-DNDEBUG", "--expt-relaxed-constexpr", f"-isystem={include}"} < set(words)
        assert [w for w in words if "gencode" in w or "arch" in w] == ["-gencode=arch=compute_90a,code=sm_90a"]
        assert words[words.index("-ccbin") + 1] == "gcc-13" and "-Xcompiler=-fPIC,-fvisibility=hidden" in words
        assert words[-4] == "-c" and Path(words[-3]).stem == Path(words[-1]).stem
    built(run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, **stub))
    assert len((tmp_path / "compiled").read_text().splitlines()) == len(kernels), "compiled again"
    header = include / "cutlass" / "version.h"
    header.write_text(header.read_text().replace("PATCH 1", "PATCH 2"))
    built(run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, MAX_JOBS="0", **stub))
    assert len((tmp_path / "compiled").read_text().splitlines()) == 2 * len(kernels), "CUTLASS is another one"
    os.utime(tree / "csrc" / "bn_math.h", (2e9, 2e9))
    built(run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, MAX_JOBS="many", **stub))
    assert len((tmp_path / "compiled").read_text().splitlines()) == 3 * len(kernels), "a header is newer"


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
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "STUB_CUDA_HOME": str(cuda_home)}
    extra = {"TORCH_CUDA_ARCH_LIST": archs} if archs else {}
    result = run(["setup.py", "build_ext"], tree, CXX=A_COMPILER, FUSED_RESNET_CUDA="1", **stub, **extra)
    found = built(result)
    lines = [line for line in result.stdout.splitlines() if "CUTLASS" in line and not line.startswith("BUILT")]
    assert lines == [f"fused_resnet: building without CUTLASS's convolutions: {reason}"]
    assert not any("cuda/conv_" in name for name in found["sources"]) and not found["objects"]
    assert "FUSED_RESNET_CUTLASS" not in dict(found["macros"]) and not (tmp_path / "compiled").exists()


def test_a_convolution_that_does_not_compile(tree: Path, stub_torch: Path, cuda_home: Path) -> None:
    cutlass(stub_torch, there=True)
    nvcc = cuda_home / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("touch $to", "exit 1"))
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "STUB_CUDA_HOME": str(cuda_home)}
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
    stub = {"PYTHONPATH": str(stub_torch), "STUB_TORCH_CUDA": "13.0", "STUB_CUDA_HOME": str(cuda_home)}
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


def test_source_distribution_holds_the_sources(tree: Path, tmp_path: Path) -> None:
    add_cuda_source(tree)
    result = run(["setup.py", "sdist", "--format=zip", "--dist-dir", str(tmp_path)], tree, FUSED_RESNET_NO_EXT="1")
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.zip")
    names = {name.split("/", 1)[1] for name in zipfile.ZipFile(archive).namelist()}
    sources = {path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*") if path.is_file()}
    assert {"csrc/cuda/norm.cu", "csrc/cuda/tile.cuh", "csrc/cuda/ops.cpp", "csrc/dtype.h"} <= sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", f"{PACKAGE}/_version.py"} <= names


def test_every_variable_is_documented() -> None:
    """No environment knob beyond the table in CONTRIBUTING."""
    files = [ROOT / "setup.py"]
    files += [path for path in (ROOT / PACKAGE).rglob("*.py")]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    read = re.compile(r'(?:environ\.get\(|environ\[|getenv\(|choice\()\s*"(FUSED_RESNET_\w+)"')
    used = {name for path in files for name in read.findall(path.read_text())}
    assert "FUSED_RESNET_CUDA" in used
    assert used <= set(re.findall(r"^\| `(FUSED_RESNET_\w+)`", (ROOT / "CONTRIBUTING.md").read_text(), re.M))


def test_object_files_do_not_collide() -> None:
    """foo.cpp and foo.cu of one folder would compile to the same foo.o."""
    stems = [path.with_suffix("") for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")]
    assert len(stems) == len(set(stems))


# --------------------------------------------------------------------------------------------------------------------
# What a user gets: without the extension, and at import.

USE_WITHOUT_EXTENSION = """
import json, sys, warnings
import torch
# An editable install's finder would serve the source tree's own fused_resnet._C to this other copy of the package.
sys.meta_path = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
import fused_resnet
model = fused_resnet.models.resnet18(num_classes=10)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        out = model(torch.randn(2, 3, 64, 64))
        out.sum().backward()
print(json.dumps({
    "file": fused_resnet.__file__,
    "version": fused_resnet.__version__,
    "finite": bool(out.isfinite().all()),
    "warnings": [str(w.message) for w in caught if "extension" in str(w.message)],
}))
"""


def test_pure_python_wheel_works_and_warns_once(tree: Path, tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    pip = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(wheels), "."]
    result = run(pip, tree, FUSED_RESNET_NO_EXT="1")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = wheels.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so") or name.startswith("csrc")]
        archive.extractall(site)

    result = run(["-c", USE_WITHOUT_EXTENSION], tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert Path(seen["file"]).is_relative_to(site)
    assert seen["version"] == wheel.name.split("-")[1]
    assert seen["finite"]
    assert len(seen["warnings"]) == 1, seen["warnings"]


IMPORT_COST = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import fused_resnet
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted({name.split(".")[0] for name in set(sys.modules) - before})}))
"""


def test_import_is_cheap_and_light(tmp_path: Path) -> None:
    seconds = []
    for _ in range(5):
        # bytecode is kept, as where users install
        result = run(["-c", IMPORT_COST], ROOT, PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(tmp_path))
        assert result.returncode == 0, result.stderr
        seen = json.loads(result.stdout)
        heavy = {"triton", "torchvision", "timm", "transformers", "rich", "matplotlib", "sklearn"}
        assert not heavy & set(seen["modules"])
        seconds.append(seen["seconds"])
        if seconds[-1] < 0.05:  # the best of five decides: a first run compiles bytecode, a busy machine delays any
            return
    raise AssertionError(f"import fused_resnet took {min(seconds):.3f} s beyond import torch, expected < 0.050 s")


def test_import_works_with_the_extension_blocked() -> None:
    code = (
        "import sys; sys.modules['fused_resnet._C'] = None; import fused_resnet; "
        "print(fused_resnet.backends()['aten'], '|', fused_resnet.backends()['cpu'])"
    )
    result = run(["-c", code], ROOT)
    assert result.returncode == 0, result.stderr
    aten, cpu = result.stdout.strip().split(" | ")
    assert aten == "ok"
    assert cpu != "ok"


def test_readme_figures_come_from_the_committed_results() -> None:
    """The README's table is what benchmarks/readme_table.py makes of the newest results file."""
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "readme_table.py", "--check"], check=False)
    assert done.returncode == 0, "run python benchmarks/readme_table.py"
