"""Products of matrices by the CPU's micro-kernel, against float64."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from primitives import aten, cpu, double, flat, image, vectors
from source_tree import ROOT, SUPPORT
from tolerances import assert_as_good
from torch import Tensor

from fused_resnet.backends import DyCoefficients, Prologue, load
from fused_resnet.base import library
from fused_resnet.spec import Act, ConvSpec

pytestmark = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")
# around the sizes of a tile (6 x 8, 6 x 16, 14 x 32), of a block (126) and of a slice of the depth (192, 256, 384)
SIZES = (1, 2, 3, 5, 6, 7, 8, 13, 14, 15, 16, 17, 28, 31, 32, 33, 40, 63, 64, 65, 200)
ISAS = ("default", "avx2", "avx512", "avx512_bf16")


def has_bf16() -> bool:
    return library.build_info()["cpu_isa"] == "avx512_bf16"


# the dtypes of operands; a product of two bfloat16 values is exact in float32, so one bound holds for both
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif("not has_bf16()", reason="no AVX512_BF16")),
]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of intra-op threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b in memory that held NaN before, or ``out`` + a b in the place of a copy of ``out``."""
    to = torch.full((a.shape[0], b.shape[1]), torch.nan) if out is None else out.clone()
    torch.ops.fused_resnet_cpu.matmul(a, b, to, out is not None)
    return to


def share(got: Tensor, a: Tensor, b: Tensor, out: Tensor | None = None) -> float:
    """The largest error, of the bound for float32 sums of so many products of values around 1."""
    want = a.double() @ b.double() + (0 if out is None else out.double())
    bound = 4 * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs() + 1)
    return float(((got - want).abs() / bound).nan_to_num(torch.inf).max()) if got.numel() else 0.0


def operand(rows: int, columns: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    """Between NaNs, which no product may read."""
    size = rows * columns
    memory = torch.full((size + 64,), torch.nan, dtype=dtype)
    values = memory[32 : size + 32].copy_(torch.randn(size))
    return values.view(columns, rows).t() if transposed else values.view(rows, columns)


def worst_of_all(dtype: torch.dtype) -> float:
    """Over pairs of sizes with a third that goes round, every layout of the operands, into NaN and onto a sum."""
    shares = [0.0]
    for i, (m, n) in enumerate(itertools.product(SIZES, SIZES)):
        k = (*SIZES, 257, 385, 800)[i % (len(SIZES) + 3)]
        a, b = operand(m, k, bool(i & 1), dtype), operand(k, n, bool(i & 2), dtype)
        for out in (None, torch.randn(m, n)):
            shares.append(share(product(a, b, out), a, b, out))
    return max(shares)


@pytest.mark.parametrize("isa", ISAS)
def test_ragged_sizes(isa: str) -> None:
    """In a process of its own, since the choice is made once; a machine without the set takes the next lower one."""
    code = """
import torch, test_gemm as t
torch.manual_seed(0); torch.set_num_threads(1)
print(t.worst_of_all(torch.float32), t.worst_of_all(torch.bfloat16) if t.has_bf16() else 0.0)
"""
    path = os.pathsep.join(map(str, (ROOT, SUPPORT, Path(__file__).parent)))
    env = os.environ | {"FUSED_RESNET_CPU_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert max(map(float, done.stdout.split())) < 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 300, 2048), (49, 513, 130), (900, 71, 65), (64, 3001, 40), (7, 2000, 9)])
def test_threads(m: int, k: int, n: int, count: int, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """Few rows, few columns, few of both: every element, and the same bits with any number of threads."""
    a, b, transposed = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).t(), torch.randn(k, m).to(dtype).t()
    threads(1)
    alone = product(a, b), product(transposed, b)
    threads(count)
    assert share(alone[0], a, b) < 1 and share(alone[1], transposed, b) < 1
    for _ in range(3):
        torch.testing.assert_close((product(a, b), product(transposed, b)), alone, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(6, 31, 33), (1, 7, 7)], ids=["rows for all threads", "few rows"])
@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("add", ["none", "another", "dz"])
def test_1x1_convolutions(
    size: tuple[int, int, int], prologue: bool, add: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """Forward with statistics and both gradients: aten's values, or in 16 bits errors as small as aten's.

    The same bits with any number of threads.
    """
    n, h, w = size
    c, k = (40, 40) if add == "dz" else (23, 40)
    x, y, dz, summand = (image(n, channels, h, w, dtype=dtype) for channels in (c, k, k, c))
    weight, conv = torch.randn(k, c, 1, 1) / c**0.5, ConvSpec()
    pre = Prologue(vectors(c), Act()) if prologue else None
    coef = DyCoefficients(*vectors(k))

    def run(backend: Any, of: Callable[[Any], Any] = lambda value: value) -> list[Tensor]:
        given = {"none": None, "another": summand.clone(memory_format=torch.preserve_format), "dz": dz}[add]
        onto = None if prologue else given
        forward = backend.conv_stats(*of((x, weight, conv, pre)), True)
        backward = backend.conv_backward(*of((dz, y, coef, x, pre, weight, conv, True, True, onto)))
        return [*flat(forward), *flat(backward)]

    want, before = run(aten), dz.clone()
    threads(1)
    alone = run(cpu)
    assert torch.equal(dz, before)
    for count in (2, 4):
        threads(count)
        assert all(map(torch.equal, run(cpu), alone))
    for g, p, t in zip(alone, want, run(aten, double), strict=True):
        if dtype == torch.float32:
            assert float((g - t).norm() / t.norm()) < 2e-5
        else:
            assert_as_good("1x1", [g], [p], [t], dtype)


@pytest.mark.parametrize("stats", [True, False])
def test_16_bit_products_are_rounded_once(stats: bool) -> None:
    """The output is float64's of the same operands, rounded once, up to ties and float32's own error."""
    x, weight = image(3, 700, 9, 10, dtype=torch.bfloat16), (torch.randn(50, 700, 1, 1) / 26).bfloat16()
    got = cpu.conv_stats(x, weight, ConvSpec(), None, stats)
    exact = torch.conv2d(x.double(), weight.double())
    assert float((got[0] != exact.bfloat16()).double().mean()) < 0.01
    if stats:
        mean, var = got[1:]
        torch.testing.assert_close(mean.double(), got[0].double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var.double(), got[0].double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_rows_that_are_apart() -> None:
    """Operands and results that are some columns of larger matrices; what lies between is not written."""
    a, b, out = torch.randn(30, 90)[:, 5:75], torch.randn(70, 50)[:, 3:40], torch.full((30, 60), torch.nan)
    torch.ops.fused_resnet_cpu.matmul(a, b, out[:, 8:45], False)
    assert share(out[:, 8:45], a, b) < 1
    assert out[:, :8].isnan().all() and out[:, 45:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(0, 5, 6), (5, 6, 0), (0, 0, 0), (5, 0, 20)])
def test_nothing_to_add(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    """No rows, no columns, or no products, whose sum is 0."""
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    torch.testing.assert_close(product(a, b), torch.zeros(m, n))
    torch.testing.assert_close(product(a, b, torch.ones(m, n)), torch.ones(m, n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number(value: float, dtype: torch.dtype) -> None:
    """Goes to its row or column, as in PyTorch, and nowhere else: padding of ragged panels included."""
    for m, k, n in ((7, 9, 5), (15, 300, 33), (6, 16, 16)):
        for i in range(2):
            a, b = (torch.rand(m, k) + 0.5).to(dtype), (torch.rand(k, n) + 0.5).to(dtype)
            (a, b)[i][-1, -1] = value
            torch.testing.assert_close(
                product(a, b), (a.double() @ b.double()).float(), equal_nan=True, rtol=1e-4, atol=0
            )
    a, b = torch.full((3, 4), torch.inf, dtype=dtype), torch.zeros(4, 20, dtype=dtype)
    assert product(a, b).isnan().all()


@pytest.mark.parametrize(
    ("a", "b", "out", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(2, 5), "^b: expected a matrix of 3 rows in Float"),
        (torch.zeros(2, 3), torch.zeros(3, 5).bfloat16(), torch.zeros(2, 5), "^b: .* in Float, got BFloat16"),
        (torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(2, 4), r"^out: expected \[2, 5\]"),
        (torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(5, 2).t(), "^out: expected .* rows of adjacent values"),
        (torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(2, 5).bfloat16(), "^out: .* in float32 .*, got BFloat16"),
        (torch.zeros(2, 3).double(), torch.zeros(3, 5), torch.zeros(2, 5), "^a: expected a float32 .*, got Double"),
        (torch.zeros(2, 3, 1), torch.zeros(3, 5), torch.zeros(2, 5), "^a: expected a float32 matrix"),
    ],
)
def test_bad_operands(a: Tensor, b: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_resnet_cpu.matmul(a, b, out, False)
