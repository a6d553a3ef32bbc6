"""A sample of csrc/cuda's convolutions, compiled by nvcc without a GPU (all: benchmarks/codegen_cuda_conv.py)."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from source_tree import ROOT


@pytest.fixture(scope="module")
def codegen() -> ModuleType:
    spec = importlib.util.spec_from_file_location("codegen_cuda_conv", ROOT / "benchmarks" / "codegen_cuda_conv.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compiled(codegen: ModuleType, name: str) -> list:
    file = codegen.CUDA / name
    if reason := codegen.unavailable(file):
        pytest.skip(reason)
    return codegen.rows(file)


@pytest.mark.slow
def test_training_convolution(codegen: ModuleType) -> None:
    """Three tiles, three prologues, two types: no spills, A in registers, nothing serialized, TMA, setmaxnreg."""
    table = compiled(codegen, "conv_train_sm90.cu")
    assert {r.kernel for r in table} == {
        f"conv_train 128x{n} {dtype} prologue {prologue}"
        for n in (64, 128, 256)
        for dtype in ("bf16", "f16")
        for prologue in ("none", "identity", "relu")
    }
    for r in table:
        assert not r.failures, (r.kernel, r.failures)
        assert r.wgmma == "RS" and r.registers <= 168 and r.instructions["UTMALDG"] > 0
        # one per slice of 16 channels; scale and shift come by bulk copies, where there is a prologue
        assert r.instructions["HGMMA"] == 4 and bool(r.instructions["UBLKCP"]) == ("none" not in r.kernel)


@pytest.mark.full
@pytest.mark.slow
def test_cutlass_convolution(codegen: ModuleType) -> None:
    table = compiled(codegen, "conv_sm90_fprop_64x64.cu")
    assert {r.kernel for r in table} == {"conv_sm90 fprop 64x64 bf16", "conv_sm90 fprop 64x64 f16"}
    for r in table:
        assert not r.failures, (r.kernel, r.failures)
        assert r.wgmma == "SS"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wait", "why"),
    [("sm90::wgmma_wait<0>();", "serialized"), ("sm90::wgmma_wait<kBlockK / kStepK - 1>();", "touched")],
)
def test_what_a_hasty_kernel_shows(codegen: ModuleType, tmp_path: Path, wait: str, why: str) -> None:
    """The same kernel without one of its waits reads accumulators, or overwrites A, too early: the rows fail."""
    source = codegen.CUDA / "conv_train_sm90.cu"
    text = source.read_text()
    assert text.count(wait) == 1
    file = tmp_path / "csrc" / "cuda" / source.name
    file.parent.mkdir(parents=True)
    # one instance of the kernel will do, without what launches it
    kernels = text[: text.index("// A function of the driver")].replace(wait, "")
    address = "const void* address() { return reinterpret_cast<const void*>(conv_train_kernel<128, Pre::relu, BF16>); }"
    file.write_text(f"{kernels}}}  // namespace\n{address}\n}}\n")
    for header in (*codegen.CUDA.glob("*.h"), *codegen.CUDA.glob("*.cuh")):
        (file.parent / header.name).write_text(header.read_text())
    (tmp_path / "csrc" / "bn_math.h").write_text((codegen.CUDA.parent / "bn_math.h").read_text())
    if reason := codegen.unavailable(file):
        pytest.skip(reason)
    (row,) = codegen.rows(file)
    assert any(why in failure for failure in row.failures), row


def test_what_makes_a_row_fail(codegen: ModuleType) -> None:
    count = {c: 0 for c in codegen.COUNTED} | {"LD": 0, "HGMMA": 4, "UTMALDG": 2, "UTMASTG": 1, "USETMAXREG": 2}
    good = codegen.Row("conv_train 128x64 bf16 prologue relu", "sm_90a", 168, "1", 0, "RS", (), (), count)
    assert not good.failures
    for bad in (
        {"spills": 8},
        {"serialized": ("C7510",)},
        {"hazards": ("R88",)},
        {"wgmma": "SS"},
        {"instructions": count | {"USETMAXREG": 0}},
        {"instructions": count | {"UTMALDG": 0}},
        {"instructions": count | {"LD": 1}},
        {"instructions": count | {"STL": 1}},
    ):
        assert len(replace(good, **bad).failures) == 1, bad
    assert "no wgmma" in replace(good, wgmma="").failures


def test_every_file_is_covered(codegen: ModuleType) -> None:
    """Files with kernels, and the one that chooses among them."""
    assert {p.name for p in codegen.CUDA.glob("conv_*.cu")} - {p.name for p in codegen.sources()} == {"conv_sm90.cu"}


def test_missing_tools_are_named(codegen: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    file = codegen.CUDA / "conv_sm90_dgrad.cu"
    monkeypatch.setattr(codegen, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(codegen, "cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(codegen, "cutlass_includes", list)
    assert "nvidia-cutlass" in codegen.unavailable(file)
    assert codegen.unavailable(codegen.CUDA / "conv_train_sm90.cu") is None
    monkeypatch.setattr(codegen, "nvcc", lambda: None)
    assert "nvcc was not found" in codegen.unavailable(file)
