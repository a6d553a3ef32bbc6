"""The compiled kernels by themselves: every instruction set against aten, bn_math.h as C++ on the host, the schemas."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_inference_cases import compare_inference, worst
from primitives import aten, cpu, double, flat, image
from source_tree import ROOT, SUPPORT
from tolerances import FLOOR, assert_as_good, error
from torch import Tensor, nn

import fused_resnet
from fused_resnet import reference
from fused_resnet.backends import ConvBiasAct, DyCoefficients, Norm, Packed, Prologue, Sums, load
from fused_resnet.backends.cpu import compute_dtype, ints_and_reals
from fused_resnet.backends.cpu_steps import Writer
from fused_resnet.backends.steps import Recorded, Step
from fused_resnet.spec import ACTIVATIONS, Act, ChainSpec, ConvSpec, PoolSpec, ShortcutSpec, UnitSpec

needs_extension = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")
ISAS = ("default", "avx2", "avx512", "avx512_bf16")
# kinks, both signs, overflow of exp on either side, and what is no number
POINTS = [-200.0, -104.5, -87.4, -20.0, -3.0, -1.5, -1e-8, -0.0, 0.0, 1e-8, 0.5, 3.0, 6.0, 7.0, 88.5, 200.0]
SPECIAL = [float("inf"), -float("inf"), float("nan")]


def random_norm(c: int, wide: torch.dtype) -> Norm:
    """scale of both signs."""
    return Norm(*(torch.randn(c, dtype=wide) for _ in range(4)))


# Of float32 and float64 results, against aten's.
BOUNDS = {torch.float32: 2e-5, torch.float64: 1e-11}


def used(dtype: torch.dtype, primitive: Callable[..., Any], *args: Any) -> float:
    """The share of its bound that the cpu backend's error takes; in 16 bits the bound is by aten's error."""
    got, want = primitive(cpu, *args), primitive(aten, *args)
    if dtype in BOUNDS:
        return worst((got,), (want,)) / BOUNDS[dtype]
    shares = [
        error([g], [t]) / (2 * error([p], [t]) + FLOOR * torch.finfo(dtype).eps)
        for g, p, t in zip(flat(got), flat(want), flat(primitive(aten, *double(args))), strict=True)
    ]
    return max(shares)


def conv_bn_act(backend: Any, x: Tensor, w: Tensor, norm: Norm, conv: ConvSpec, act: Act, residual: Any) -> Tensor:
    if backend is cpu:
        return cpu.conv_bn_act(x, w, norm, conv, act, residual)
    return aten.bn_act(aten.conv_stats(x, w, conv, None, False)[0], norm, act, residual)


def compare_all() -> dict[str, float]:
    """Every primitive of the cpu backend against aten, on small awkward shapes: {case: share of the bound}."""
    shares: dict[str, float] = {}
    for channels, last in ((3, True), (17, True), (17, False), (64, True)):
        fmt = torch.channels_last if last else torch.contiguous_format
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            y = (torch.randn(2, channels, 9, 7) * 2 + 1).to(dtype).contiguous(memory_format=fmt)
            r = torch.randn(2, channels, 9, 7).to(dtype).contiguous(memory_format=fmt)
            n, m = random_norm(channels, wide), random_norm(channels, wide)
            key = f"{channels}-{'nhwc' if last else 'nchw'}-{str(dtype).removeprefix('torch.')}"

            def case(name: str, primitive: Callable[..., Any], *args: Any, of: torch.dtype = dtype) -> None:
                shares[f"{name} {key}"] = used(of, primitive, *args)  # noqa: B023

            case("bn_stats", lambda b, *a: b.bn_stats(*a), y)
            for act in ACTIVATIONS:
                a = Act.make(act)
                case(f"bn_act {act}", lambda b, *a: b.bn_act(*a), y, n, a, r, m)
                case(f"bn_act_backward {act}", lambda b, *a: b.bn_act_backward(*a), r, y, n, a, r, m)
            mean, var, *given = (torch.randn(channels, dtype=wide).exp() for _ in range(5))
            for vectors in ((None, None, None), tuple(v.to(dtype) for v in given)):
                case(f"bn_fold {vectors[0] is None}", lambda b, *a: b.bn_fold(*a), mean, var, *vectors, 1e-3, of=wide)
            for count in (None, 126):
                sums = Sums(mean, var)
                case(f"bn_coefficients {count}", lambda b, *a: b.bn_coefficients(*a), n, sums, count, of=wide)
            coef = DyCoefficients(*random_norm(channels, wide))
            case("bn_backward", lambda b, *a: b.bn_backward(*a), r, y, coef)
            pool = PoolSpec.make(3, 2, 1)
            out, place = cpu.bn_act_max_pool(y, n, Act(), pool)
            case("max_pool", lambda b, *a: b.bn_act_max_pool(*a)[0], y, n, Act(), pool)
            case("max_pool_backward", lambda b, *a: b.bn_act_max_pool_backward(*a), out, place, y, n, Act(), pool)
            for kernel, stride in ((1, 1), (1, 2), (3, 1), (3, 2)):
                w = torch.randn(70, channels, kernel, kernel, dtype=wide) / channels**0.5
                conv = ConvSpec((stride, stride), (kernel // 2, kernel // 2))
                pre = Prologue(n, Act()) if stride == 1 or kernel == 3 else None
                size = f"{kernel}x{kernel}/{stride}"
                case(f"conv_stats {size}", lambda b, *a: b.conv_stats(*a), y, w, conv, pre, True)
                z = aten.conv_stats(y, w, conv, pre, False)[0]
                args = (
                    torch.randn_like(z),
                    z,
                    DyCoefficients(*random_norm(70, wide)),
                    y,
                    pre,
                    w,
                    conv,
                    True,
                    True,
                    None,
                )
                case(f"conv_backward {size}", lambda b, *a: b.conv_backward(*a), *args)
            # the second is wide and large enough for Winograd's algorithm in float32
            for wide_in, size in ((channels, (9, 7)), (64, (18, 17))):
                h = (torch.randn(2, wide_in, *size) + 0.5).to(dtype).contiguous(memory_format=fmt)
                w, m = torch.randn(70, wide_in, 3, 3, dtype=wide) / wide_in**0.5 / 3, random_norm(70, wide)
                for residual in (None, torch.randn(2, 70, *size).to(dtype).contiguous(memory_format=fmt)):
                    args = (h, w, m, ConvSpec(padding=(1, 1)), Act.make("silu"), residual)
                    case(f"conv_bn_act {wide_in} {residual is None}", conv_bn_act, *args)
    return shares | compare_inference()


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees_with_aten(isa: str) -> None:
    """In a process of its own, since the choice is made once; a machine without the set takes the next lower one."""
    code = (
        "import json, torch; torch.manual_seed(5); from fused_resnet.base import library; import test_cpu_kernels as t;"
        "print(json.dumps([library.build_info()['cpu_isa'], t.compare_all()]))"
    )
    path = os.pathsep.join(map(str, (ROOT, SUPPORT, Path(__file__).parent)))
    env = os.environ | {"FUSED_RESNET_CPU_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    used_isa, shares = json.loads(done.stdout)
    assert used_isa in ISAS[: ISAS.index(isa) + 1]
    wrong = {case: share for case, share in shares.items() if not share <= 1}
    assert not wrong
    assert len(shares) > 300


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_native_where_the_cpu_has_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """FUSED_RESNET_CPU_COMPUTE=native: float32 all the same where oneDNN has no convolution of the dtype here."""
    monkeypatch.setenv("FUSED_RESNET_CPU_COMPUTE", "native")
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    for there in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda t=there: t)
        assert compute_dtype.__wrapped__(dtype) == (dtype if there else torch.float32)
    monkeypatch.undo()
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).eval()
    x = torch.randn(2, 8, 9, 9).to(dtype)
    monkeypatch.setenv("FUSED_RESNET_CPU_COMPUTE", "native")
    compute_dtype.cache_clear()
    try:
        with torch.no_grad():
            exact, plain = copy.deepcopy(model).double()(x.double()), copy.deepcopy(model).to(dtype)(x)
        assert_as_good("frozen", [fused_resnet.freeze(model, x, dtype=dtype)(x)], [plain], [exact], dtype)
    finally:
        compute_dtype.cache_clear()


@needs_extension
def test_unknown_instruction_set_is_an_error() -> None:
    code = "from fused_resnet.base import library; library.build_info()"
    env = os.environ | {"FUSED_RESNET_CPU_ISA": "mmx", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and "expected default, avx2, avx512 or avx512_bf16, got 'mmx'" in done.stderr


@needs_extension
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("last", [True, False])
def test_activations_at_kinks_and_extremes(act: str, last: bool) -> None:
    """act and act' where they bend, where exp overflows, at NaN and infinities: ATen's in float64."""
    a = Act.make(act)
    for dtype in (torch.float32, torch.float64):
        z = torch.tensor(POINTS + SPECIAL, dtype=dtype).repeat(20)[None, :, None, None].expand(1, -1, 1, 3)
        z = z.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        one = torch.ones(z.shape[1], dtype=dtype)
        norm = Norm(one, torch.zeros_like(one), torch.zeros_like(one), one)
        wide, g = z.double(), torch.full_like(z, 1.5)
        got, want = cpu.bn_act(z, norm, a), reference.act(wide, a).to(dtype)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, equal_nan=True)
        got = cpu.bn_act_backward(g, z, norm, a)[0]
        want = aten.bn_act_backward(g.double(), wide, double(norm), a)[0].to(dtype)
        # inf*0 may be NaN or 0 where exp overflows; at NaN ATen's own vector and scalar loops disagree
        finite = want.isfinite() & ~z.isnan()
        torch.testing.assert_close(got[finite], want[finite], rtol=2e-6, atol=1e-7)


PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include "bn_math.h"
using namespace fused_resnet;
template <Act A> void table(const char* name, double p, int n, char** z) {
    for (int i = 0; i < n; i++) {
        const double x = atof(z[i]);
        printf("%s %.17g %.17g\n", name, act<A>(x, p), act_backward<A>(1.5, x, p));
    }
}
int main(int n, char** z) {
    n--, z++;
    const double p = atof(z[0]);
    n--, z++;
#define FR_TABLE(name) table<Act::name>(#name, p, n, z);
    FR_ACTS(FR_TABLE)
    // float moments of 1e4 +- 1, merged unevenly
    Moments<float, float> all{0, 0, 0}, part{0, 0, 0};
    for (int i = 0; i < 1000; i++) {
        part.merge({1, 1e4f + (i % 2 ? 1.f : -1.f), 0});
        if (i % 7 == 0) all.merge(part), part = {0, 0, 0};
    }
    all.merge(part);
    printf("moments %.9g %.9g\n", all.mean, all.m2 / all.count);
    printf("affine %.17g\ndy %.17g\n", affine(2.0, 3.0, -1.0), bn_backward(2.0, 5.0, 1.0, 0.5, -0.25, 0.125));
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_bn_math_as_plain_cpp(tmp_path: Path) -> None:
    """Every formula of the header, compiled on its own, against PyTorch."""
    (tmp_path / "main.cpp").write_text(PROGRAM)
    subprocess.run(
        ["c++", "-std=c++17", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}", "main.cpp", "-o", "main"],
        cwd=tmp_path,
        check=True,
    )
    points = [p for p in POINTS if abs(p) < 150]
    done = subprocess.run([tmp_path / "main", "0.7", *map(repr, points)], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    z = torch.tensor(points, dtype=torch.float64)
    for name in ACTIVATIONS:
        rows = torch.tensor([[float(v) for v in row[1:]] for row in lines if row[0] == name], dtype=torch.float64)
        a = Act(name, 0.7)
        torch.testing.assert_close(rows[:, 0], reference.act(z, a), rtol=1e-12, atol=1e-12)
        flat = z[None, :, None, None]
        one = torch.ones(len(points), dtype=torch.float64)
        norm = Norm(one, torch.zeros_like(one), torch.zeros_like(one), one)
        want = aten.bn_act_backward(torch.full_like(flat, 1.5), flat, norm, a)[0].flatten()
        torch.testing.assert_close(rows[:, 1], want, rtol=1e-12, atol=1e-12)
    rest = {row[0]: [float(v) for v in row[1:]] for row in lines}
    assert abs(rest["moments"][0] - 1e4) < 2e-3 and abs(rest["moments"][1] - 1) < 1e-3
    assert rest["affine"] == [5.0] and rest["dy"] == [0.5 * 2 - 0.25 * 4 + 0.125]


def one_unit(batch_stats: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A chain of one unit as operators take it."""
    unit = UnitSpec(ConvSpec(padding=(1, 1)), Act("relu"), batch_stats=batch_stats)
    return ints_and_reals(ChainSpec((unit,), ShortcutSpec("identity")).encode())


@needs_extension
def test_schemas_of_the_compiled_operators() -> None:
    """opcheck's schema test (no undeclared mutation or aliasing) on each operator of the extension."""
    ops = torch.ops.fused_resnet_cpu
    y = torch.randn(2, 64, 6, 6).contiguous(memory_format=torch.channels_last)
    v = [torch.randn(64) for _ in range(3)]
    w1, w3 = torch.randn(64, 64, 1, 1), torch.randn(64, 64, 3, 3)
    f32, one, none = torch.float32, [1, 1], [0, 0]
    place = torch.zeros(2, 64, 3, 3, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    small = torch.randn(2, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    coef = [torch.randn(64) for _ in range(4)]
    packed = ops.winograd_prepack(w3, 4)
    stem, w7 = image(2, 3, 20, 20), torch.randn(64, 3, 7, 7)
    row, saved = [w3, v[0], v[1]], [y, *v, v[0], v[1].abs()]

    call = ConvBiasAct(y, w3, v[0], ConvSpec(padding=(1, 1)), Act("relu"), y)
    recorded = Writer().row([Recorded(Step(call, None, Packed(packed, "winograd")), 0, 1)])

    calls = {
        "bn_stats": (y,),
        "bn_act": (y, v[:2], 1, 0.0, y, [], f32),
        "bn_act_backward": (y, y, v, 1, 0.0, y, v),
        "bn_backward": (y, y, coef, f32),
        "bn_act_max_pool": (y, v[:2], 1, 0.0, [3, 3], [2, 2], one),
        "bn_act_max_pool_backward": (small, place, y, v, 1, 0.0, [3, 3], [2, 2], one, f32),
        "bn_fold": (v[0], v[1].abs(), v[2], v[0], v[1], 1e-5),
        "bn_coefficients": (*coef, 72),
        "conv_bn_act": (y, w3, one, one, one, 1, v[:2], 1, 0.0, y, f32, True, 0),
        "conv_stats": (y, w3, one, one, one, 1, v[:2], 1, 0.0, True, f32, True, 7),
        "conv_backward": (y, y, coef, y, v, 1, 0.0, w1, one, none, one, 1, True, True, None, f32, True, 7),
        "conv_algorithm": ("fprop", y, w3, one, one, one, 1, False, f32, True, 7),
        "row_forward": (y, None, row, *one_unit(True), f32, True),
        "row_backward": (y, y, None, [w3], saved, *one_unit(True), torch.tensor([True, False, *[True] * 3]), f32, True),
        "row_inference": (y, None, [*row, v[0], v[1].abs()], *one_unit(False), f32, True),
        "frozen_row": (y, y, *recorded.args),
        "winograd_suits": (y, w3, one, one, one, 1),
        "winograd_tile": (y, w3, one, one, one, 1),
        "winograd_prepack": (w3, 4),
        "winograd_bias_act": (y, packed, v[0], 1, 1, 0.0, y),
        "matmul": (torch.randn(5, 7), torch.randn(7, 3), torch.randn(5, 3), True),
        "gemm_suits": (y, w1, 1),
        "gemm_prepack": (w1,),
        "gemm_bias_act": (y, ops.gemm_prepack(w1), v[0], one, none, one, 1, 0.0, y, y.clone()),
        "depthwise_suits": (y, w1, 1),
        "depthwise_prepack": (w3[:, :1],),
        "depthwise_bias_act": (y, ops.depthwise_prepack(w3[:, :1]), v[0], one, one, one, 1, 0.0, y),
        "grouped_suits": (y, w3[:, :2], one, 32),
        "grouped_prepack": (w3[:, :2], 32),
        "grouped_bias_act": (y, ops.grouped_prepack(w3[:, :2], 32), v[0], one, one, 1, 0.0, y),
        "excite": (y.clone(), w1.flatten(1), v[0], 1, 0.0, w1.flatten(1), v[1], 4, 0.0),
        "channel_means": (y,),
        "bands_suit": (y, 96),
        "stem_suits": (stem, w7, one, 1, [3, 3]),
        "stem_prepack": (w7,),
        "stem_bias_act_max_pool": (stem, ops.stem_prepack(w7), v[0], [2, 2], [3, 3], 1, 0.0, [3, 3], [2, 2], one),
    }
    registered = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fused_resnet_cpu::")}
    assert registered == set(calls)
    for name, args in calls.items():
        torch.library.opcheck(getattr(ops, name).default, args, test_utils="test_schema")
