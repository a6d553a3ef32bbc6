"""What a user gets: distributions, a build without the extension, documented variables, figures that were measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from source_tree import PACKAGE, ROOT, add_cuda_source, run

from fused_resnet.base import library


def test_source_distribution_holds_the_sources(tree: Path, tmp_path: Path) -> None:
    add_cuda_source(tree)
    result = run(["setup.py", "sdist", "--format=zip", "--dist-dir", str(tmp_path)], tree, FUSED_RESNET_NO_EXT="1")
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.zip")
    names = {name.split("/", 1)[1] for name in zipfile.ZipFile(archive).namelist()}
    sources = {path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*") if path.is_file()}
    assert {"csrc/cuda/norm.cu", "csrc/cuda/tile.cuh", "csrc/cuda/ops.cpp", "csrc/dtype.h"} <= sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", f"{PACKAGE}/_version.py"} <= names


USE_WITHOUT_EXTENSION = """
import json, sys, warnings
import torch
# An editable install's finder would serve the source tree's own modules to this other copy of the package.
sys.meta_path = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
import fused_resnet
from fused_resnet.planner import sizes
sizes.faster = lambda *args: sizes.CHAINS  # though the images are small
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
        assert "fused_resnet/cli/report.html" in archive.namelist()
        archive.extractall(site)

    result = run(["-c", USE_WITHOUT_EXTENSION], tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert Path(seen["file"]).is_relative_to(site)
    assert seen["version"] == wheel.name.split("-")[1]
    assert seen["finite"]
    assert len(seen["warnings"]) == 1, seen["warnings"]


needs_library = pytest.mark.skipif(library.unavailable() is not None, reason=f"{library.unavailable()}")


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on this machine")
def test_the_library_needs_no_symbol_of_one_torch_or_python() -> None:
    """What it takes from PyTorch are C functions that every later torch has, and it takes nothing from Python."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library.PATH], capture_output=True, text=True, check=True)
    needed = {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}
    plain = subprocess.run(["c++filt"], input="\n".join(needed), capture_output=True, text=True, check=True).stdout
    assert not [name for name in plain.splitlines() if re.search(r"\b(c10|at|torch|caffe2)::|^_?Py", name)]
    assert {"torch_call_dispatcher", "torch_parallel_for", "aoti_torch_empty_strided"} <= needed
    read = subprocess.run(["readelf", "-d", library.PATH], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"NEEDED.*\[(.+?)\.so", read))
    assert found <= {
        "libtorch_cpu",
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "libdl",
        "libpthread",
        "librt",
        "ld-linux-x86-64",
    }


# Compiling takes minutes: the library that is built already takes the place of one.
BUILT_ALREADY = """
import shutil
from torch.utils import cpp_extension
def build_extensions(self):
    to = self.get_ext_fullpath(self.extensions[0].name)
    self.mkpath(to.rpartition("/")[0])
    shutil.copy({library!r}, to)
cpp_extension.BuildExtension.build_extensions = build_extensions
"""


@needs_library
@pytest.mark.slow
def test_one_wheel_for_every_python_and_torch(tree: Path, tmp_path: Path) -> None:
    """Its name promises it; where it is installed no compiler is needed."""
    patch = tmp_path / "patch" / "sitecustomize.py"
    patch.parent.mkdir()
    patch.write_text(BUILT_ALREADY.format(library=str(library.PATH)))
    result = run(
        ["setup.py", "bdist_wheel", "--dist-dir", str(tmp_path)],
        tree,
        PYTHONPATH=str(patch.parent),
        FUSED_RESNET_CUDA="0",
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"{PACKAGE}-[^-]+-py3-none-linux_\w+\.whl", wheel.name)
    assert f"{PACKAGE}/lib/libfused_resnet.so" in zipfile.ZipFile(wheel).namelist()

    home = tmp_path / "venv"
    venv.create(home)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    pip = ["-m", "pip", "--python", str(home), "install", "--no-index", "--no-deps", str(wheel)]
    installed = run(pip, tmp_path, PATH="")
    assert installed.returncode == 0, installed.stderr

    def finds(*args: str) -> dict[str, Any]:
        to = tmp_path / "found.json"
        done = subprocess.run(
            [home / "bin" / "fused-resnet", *args, "--json", to], cwd=tmp_path, capture_output=True, text=True,
            env={"PATH": "", "HOME": str(tmp_path)}, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(to.read_text())

    assert finds("env")["backends"]["cpu"] == "ok"
    assert finds("check", "--models", "resnet18", "--dtypes", "fp32", "--device", "cpu")["ok"]
    asked = [home / "bin" / "python", "-c", "import fused_resnet; print(fused_resnet.__file__)"]
    used = subprocess.run(asked, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=True).stdout
    assert Path(used.strip()).is_relative_to(site)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_a_bundle_for_a_gpu_has_at_most_40_mb(tmp_path: Path) -> None:
    """``make gpu-bundle`` checks it before it packs."""
    (tmp_path / "site").mkdir()
    large, small = tmp_path / "site" / "lib.so", tmp_path / "run.sh"
    small.write_text("exec python3")
    command = ["make", "--no-print-directory", f"BUNDLE={tmp_path}"]

    def size(bytes_of_large: int) -> subprocess.CompletedProcess[str]:
        large.touch()
        os.truncate(large, bytes_of_large)  # takes no space on the disk
        return subprocess.run([*command, "bundle-size"], cwd=ROOT, capture_output=True, text=True)

    fits = size(39_900_000)
    assert fits.returncode == 0 and fits.stdout == f"{tmp_path} takes 39.9 MB of at most 40 MB\n", fits.stderr
    too_large = size(40_100_000)
    assert too_large.returncode != 0
    problem, *largest = too_large.stderr.splitlines()[:3]
    assert problem == f"error: {tmp_path} takes 40.1 MB of at most 40 MB. Its largest files, in bytes:"
    assert largest == ["40100000 site/lib.so", "12 run.sh"]
    shutil.rmtree(tmp_path / "site")
    small.unlink()
    assert subprocess.run([*command, "bundle-size"], cwd=ROOT, capture_output=True).returncode != 0, "an empty bundle"

    steps = subprocess.run([*command, "--dry-run", "gpu-bundle"], cwd=ROOT, capture_output=True, text=True).stdout
    assert steps.index("of at most 40 MB") < steps.index("tar -czf"), steps


def test_every_variable_is_documented() -> None:
    """No environment knob beyond the table in CONTRIBUTING."""
    files = [ROOT / "setup.py"]
    files += [path for path in (ROOT / PACKAGE).rglob("*.py")]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".inc", ".cu", ".cuh")]
    read = re.compile(r'(?:environ\.get\(|environ\[|getenv\(|choice\()\s*"(FUSED_RESNET_\w+)"')
    used = {name for path in files for name in read.findall(path.read_text())}
    assert "FUSED_RESNET_CUDA" in used
    assert used <= set(re.findall(r"^\| `(FUSED_RESNET_\w+)`", (ROOT / "CONTRIBUTING.md").read_text(), re.M))


def test_object_files_do_not_collide() -> None:
    """foo.cpp and foo.cu of one folder would compile to the same foo.o."""
    stems = [path.with_suffix("") for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")]
    assert len(stems) == len(set(stems))


def test_readme_figures_come_from_the_committed_results() -> None:
    """The README's table is what benchmarks/readme_table.py makes of the newest results file."""
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "readme_table.py", "--check"], check=False)
    assert done.returncode == 0, "run python benchmarks/readme_table.py"
