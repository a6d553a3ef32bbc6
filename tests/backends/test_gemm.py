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
from primitives import aten, cpu, flat
from source_tree import ROOT, SUPPORT
from torch import Tensor

from fused_resnet.backends import DyCoefficients, Norm, Prologue, load
from fused_resnet.spec import Act, ConvSpec

pytestmark = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")
# around the sizes of a tile (6 x 8, 6 x 16, 14 x 32), of a block (126) and of a slice of the depth (192, 256)
SIZES = (1, 2, 3, 5, 6, 7, 8, 13, 14, 15, 16, 17, 28, 31, 32, 33, 40, 63, 64, 65, 200)


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


def operand(rows: int, columns: int, transposed: bool) -> Tensor:
    return torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)


def worst_of_all() -> float:
    """Over pairs of sizes with a third that goes round, every layout of the operands, into NaN and onto a sum."""
    shares = [0.0]
    for i, (m, n) in enumerate(itertools.product(SIZES, SIZES)):
        k = (*SIZES, 257, 400)[i % (len(SIZES) + 2)]
        a, b = operand(m, k, bool(i & 1)), operand(k, n, bool(i & 2))
        for out in (None, torch.randn(m, n)):
            shares.append(share(product(a, b, out), a, b, out))
    return max(shares)


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_ragged_sizes(isa: str) -> None:
    """In a process of its own, since the choice is made once; a machine without the set takes the next lower one."""
    code = (
        "import torch; torch.manual_seed(0); torch.set_num_threads(1); import test_gemm as t; print(t.worst_of_all())"
    )
    path = os.pathsep.join(map(str, (ROOT, SUPPORT, Path(__file__).parent)))
    env = os.environ | {"FUSED_RESNET_CPU_ISA": isa, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 300, 2048), (49, 512, 130), (900, 70, 65), (64, 3000, 40), (7, 2000, 9)])
def test_threads(m: int, k: int, n: int, count: int, threads: Callable[[int], None]) -> None:
    """Few rows, few columns, few of both: every element, and the same bits with any number of threads."""
    a, b, transposed = torch.randn(m, k), torch.randn(n, k).t(), torch.randn(k, m).t()
    threads(1)
    alone = product(a, b), product(transposed, b)
    threads(count)
    assert share(alone[0], a, b) < 1 and share(alone[1], transposed, b) < 1
    for _ in range(3):
        torch.testing.assert_close((product(a, b), product(transposed, b)), alone, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("size", [(6, 31, 33), (1, 7, 7)], ids=["rows for all threads", "few rows"])
@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("add", ["none", "another", "dz"])
def test_1x1_convolutions(
    count: int, size: tuple[int, int, int], prologue: bool, add: str, threads: Callable[[int], None]
) -> None:
    """Forward with statistics and both gradients on several threads: aten's values, the bits of one thread."""
    n, h, w = size
    c, k = (40, 40) if add == "dz" else (24, 40)

    def image(channels: int) -> Tensor:
        return torch.randn(n, channels, h, w).contiguous(memory_format=torch.channels_last)

    x, y, dz, summand = image(c), image(k), image(k), image(c)
    weight, conv = torch.randn(k, c, 1, 1) / c**0.5, ConvSpec()
    pre = Prologue(Norm(*(torch.randn(c) for _ in range(4))), Act()) if prologue else None
    coef = DyCoefficients(*(torch.randn(k) for _ in range(4)))

    def run(backend: Any) -> tuple[Any, ...]:
        given = {"none": None, "another": summand.clone(memory_format=torch.preserve_format), "dz": dz}[add]
        onto = None if prologue else given
        forward = backend.conv_stats(x, weight, conv, pre, True)
        backward = backend.conv_backward(dz, y, coef, x, pre, weight, conv, True, True, onto)
        return tuple(flat((forward, backward)))

    want, before = run(aten), dz.clone()
    threads(1)
    alone = run(cpu)
    threads(count)
    got = run(cpu)
    assert torch.equal(dz, before)
    for g, a, t in zip(got, alone, want, strict=True):
        assert torch.equal(g, a)
        assert float((g - t).norm() / t.norm()) < 2e-5


def test_rows_that_are_apart() -> None:
    """Operands and results that are some columns of larger matrices; what lies between is not written."""
    a, b, out = torch.randn(30, 90)[:, 5:75], torch.randn(70, 50)[:, 3:40], torch.full((30, 60), torch.nan)
    torch.ops.fused_resnet_cpu.matmul(a, b, out[:, 8:45], False)
    assert share(out[:, 8:45], a, b) < 1
    assert out[:, :8].isnan().all() and out[:, 45:].isnan().all()


@pytest.mark.parametrize(("m", "k", "n"), [(0, 5, 6), (5, 6, 0), (0, 0, 0), (5, 0, 20)])
def test_nothing_to_add(m: int, k: int, n: int) -> None:
    """No rows, no columns, or no products, whose sum is 0."""
    a, b = torch.randn(m, k), torch.randn(k, n)
    torch.testing.assert_close(product(a, b), torch.zeros(m, n))
    torch.testing.assert_close(product(a, b, torch.ones(m, n)), torch.ones(m, n))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number(value: float) -> None:
    """Goes to its row or column, as in PyTorch, and nowhere else: padding of ragged panels included."""
    for m, k, n in ((7, 9, 5), (15, 300, 33), (6, 16, 16)):
        for i in range(2):
            a, b = torch.rand(m, k) + 0.5, torch.rand(k, n) + 0.5
            (a, b)[i][-1, -1] = value
            torch.testing.assert_close(
                product(a, b), (a.double() @ b.double()).float(), equal_nan=True, rtol=1e-4, atol=0
            )
    a, b = torch.full((3, 4), torch.inf), torch.zeros(4, 20)
    assert product(a, b).isnan().all()


@pytest.mark.parametrize(
    ("a", "b", "out", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(2, 5), "^b: expected 3 rows"),
        (torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(2, 4), r"^out: expected \[2, 5\]"),
        (torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(5, 2).t(), "^out: expected .* rows of adjacent values"),
        (torch.zeros(2, 3).double(), torch.zeros(3, 5), torch.zeros(2, 5), "^expected float32 matrices, got Double"),
        (torch.zeros(2, 3, 1), torch.zeros(3, 5), torch.zeros(2, 5), "^expected float32 matrices"),
    ],
)
def test_bad_operands(a: Tensor, b: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_resnet_cpu.matmul(a, b, out, False)
