"""The package's sources, and Python processes that see nothing of this one's settings: what tests of a build share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
PACKAGE = "fused_resnet"


def run(args: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python subprocess without our own variables; returns when it ends, whatever its status."""
    ours = ("FUSED_RESNET_", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "PYTHONPATH", "CUDA_HOME", "CUDA_PATH")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=environ | variables, capture_output=True, text=True, timeout=120
    )


def copy_to(folder: Path) -> Path:
    """A copy of what a source distribution holds."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    for name in (PACKAGE, "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


def add_cuda_source(tree: Path) -> None:
    (tree / "csrc" / "cuda").mkdir(exist_ok=True)
    (tree / "csrc" / "cuda" / "probe.cu").touch()
