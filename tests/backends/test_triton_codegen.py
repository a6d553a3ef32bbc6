"""A sample of the Triton kernels, compiled ahead of time for GPUs that are not here (all: benchmarks/codegen.py)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from source_tree import ROOT

pytest.importorskip("triton", reason="needs Triton")


def codegen(*args: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """In a process of its own: Triton decides at its import whether it compiles or interprets."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": str(int(interpret))}
    command = [sys.executable, str(ROOT / "benchmarks" / "codegen.py"), "--workers", "1", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "rows"),
    [
        (
            "sm_90",
            ["fprop .*1x1/1 256->1024", "fprop .*3x3/1 256->256", "dgrad .*3x3/1 256", "wgrad .*3x3/1 256",
             "dgrad .*1024->256.*sum_dzs", "dgrad .*3x3/2 256->256 4 phases"],
        ),
        *(
            pytest.param(target, ["fprop .*3x3/1 256->256", "dgrad .*1024->256.*sum_dzs"], marks=pytest.mark.full)
            for target in ("sm_80", "gfx942")
        ),
    ],
)  # fmt: skip
def test_compiled_kernels(target: str, rows: list[str]) -> None:
    """No spills, shared memory within the chip's, matrix instructions, on sm_90 not serialized."""
    only = "conv_(" + "|".join(rows).replace(" .*", "_kernel .*") + ")"
    done = codegen("--models", "resnet50", "--passes", "train", "--targets", target, "--only", only)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rows)} compiled, 0 fail" in done.stderr


def test_interpreter_compiles_nothing() -> None:
    done = codegen(interpret=True)
    assert done.returncode == 2 and "unset it" in done.stderr


def test_what_makes_a_row_fail() -> None:
    code = """
import sys; sys.path.insert(0, "benchmarks")
from codegen import Call, Report
call = Call("m", "conv", (("x_ptr", "*bf16"),), (("BLOCK_K", 64),), (), 8, 3)
good = dict(registers=128, spills=0, shared=98304, matrix=4, wide_loads=8, serialized=())
assert not Report(call, "sm_90", **good).failures
for bad in ({"spills": 8}, {"shared": 300000}, {"matrix": 0}, {"serialized": ("C7514",)}):
    assert len(Report(call, "sm_90", **good | bad).failures) == 1, bad
assert Report(call, "gfx942", **good).failures  # 64 KB
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
