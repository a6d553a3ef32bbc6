"""Convolutions in training as products of patches (``ConvSpec.products``), against float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from primitives import aten, cpu, double, vectors
from stages import step
from tolerances import assert_close
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.backends import ConvBackward, ConvStats, DyCoefficients, Prologue, load
from fused_resnet.base.layouts import channels_last
from fused_resnet.chain import choice
from fused_resnet.planner import products
from fused_resnet.spec import Act, ConvSpec

pytestmark = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")
ALL = products.OUTPUT | products.INPUT_GRADIENT | products.WEIGHT_GRADIENT


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    t = (torch.randn(shape) * 1.3 + 0.4).to(dtype)
    return t.contiguous(memory_format=channels_last(t))


NEEDS = [(True, True), (True, False), (False, True)]


@st.composite
def cases(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...], ConvSpec]:
    """The shapes of x and of the weight, and the convolution."""
    dims = draw(st.sampled_from([2, 2, 2, 3]))

    def each(numbers: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(st.lists(numbers, min_size=dims, max_size=dims)))

    kernel = each(st.sampled_from([1, 2, 3, 5, 7][: 7 - dims]))
    stride, dilation = each(st.integers(1, 3)), each(st.sampled_from([1, 1, 2]))
    padding = tuple(draw(st.integers(0, d * (k - 1))) for d, k in zip(dilation, kernel, strict=True))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = tuple(draw(st.integers(max(1, r - 2 * p), r + 28 // dims)) for r, p in zip(reach, padding, strict=True))
    c, k = draw(st.sampled_from([1, 2, 3, 12, 33, 64])), draw(st.sampled_from([1, 2, 5, 16, 40, 70]))
    return (draw(st.integers(1, 3)), c, *size), (k, c, *kernel), ConvSpec(stride, padding, dilation, products=ALL)


@given(cases(), st.sampled_from([torch.float32, torch.float32, torch.bfloat16]), st.booleans(), st.integers(1, 3))
def test_as_good_as_pytorch(
    case: tuple[tuple[int, ...], tuple[int, ...], ConvSpec], dtype: torch.dtype, raw: bool, threads: int
) -> None:
    shape, of, conv = case
    x, weight = random(*shape, dtype=dtype), torch.randn(of) / of[1] ** 0.5
    pre = None if raw else Prologue(vectors(shape[1]), Act("leaky_relu"))
    coef = DyCoefficients(*vectors(of[0]))
    y = random(*conv.out_shape(shape, of), dtype=dtype)
    calls = [ConvStats(x, weight, conv, pre, True)]
    calls += [ConvBackward(random(*y.shape, dtype=dtype), y, coef, x, pre, weight, conv, *n, None) for n in NEEDS]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for call in calls:
            exact = call.replace(**{name: double(value) for name, value in vars(call).items()}).on(aten.of)
            library = call.replace(conv=replace(conv, products=0)).on(cpu.of)
            for got, plain, want in zip(*(parts(result) for result in (call.on(cpu.of), library, exact)), strict=True):
                if dtype == torch.float32:
                    terms = max(math.prod(of[1:]), math.prod(y.shape) // of[0])
                    assert_close(call.name, got, want, terms)
                else:
                    error, allowed = ((t.double() - want).norm() for t in (got, plain))
                    assert error <= 2 * allowed + torch.finfo(dtype).eps / 2 * want.norm(), (call.name, conv)
    finally:
        torch.set_num_threads(before)


def parts(result: Any) -> list[Tensor]:
    """The tensors of a primitive's result."""
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [t for part in result for t in parts(part)]


@pytest.mark.parametrize("stride", [(1, 3), (2, 1), (2, 2), (3, 3)], ids=str)
def test_strided_pointwise_gradient(stride: tuple[int, int]) -> None:
    """oneDNN's gradient of the weight is wrong here on a processor with AVX2 alone."""
    x, weight, conv = random(2, 3, 17, 27), torch.randn(16, 3, 1, 1), ConvSpec(stride)
    y = random(*conv.out_shape(x.shape, weight.shape))
    pre, coef = Prologue(vectors(3), Act("relu")), DyCoefficients(*vectors(16))
    call = ConvBackward(y, y, coef, x, pre, weight, conv, False, True, None)
    exact = call.replace(**{name: double(value) for name, value in vars(call).items()}).on(aten.of)
    assert_close("dw", parts(call.on(cpu.of))[0], parts(exact)[0], y.numel() // 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    x, weight, conv = (
        random(2, 24, 40, 33, dtype=dtype),
        torch.randn(48, 24, 3, 3),
        ConvSpec((1, 1), (1, 1), products=ALL),
    )
    dy = random(2, 48, 40, 33, dtype=dtype)
    coef = DyCoefficients(torch.ones(48), None, None, torch.zeros(48))

    def results() -> list[Tensor]:
        y, *_ = ConvStats(x, weight, conv, None, False).on(cpu.of)
        return [y, *ConvBackward(dy, dy, coef, x, None, weight, conv, True, True, None).on(cpu.of)[:2]]

    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(results())
    torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_they_run_where_they_are_named() -> None:
    """Each bit stands for one pass; a dtype that our kernels do not multiply has no such products."""
    x, weight = random(2, 8, 12, 12), torch.randn(16, 8, 3, 3)

    def name(bits: int, backward: bool, x: Tensor = x, **geometry: Any) -> str | None:
        conv = ConvSpec(padding=(1, 1), products=bits, **geometry)
        return cpu.algorithm(ConvBackward if backward else ConvStats, x, weight.to(x.dtype), conv, False)

    assert [name(bits, False) for bits in (0, 1, 6)] == ["aten", "implicit_gemm", "aten"]
    assert [name(bits, True) for bits in (1, 6)] == ["aten", "implicit_gemm"]
    assert name(2, True) == "implicit_gemm for the input, aten for the weight"
    assert name(4, True) == "aten for the input, implicit_gemm for the weight"
    assert name(ALL, True, stride=(2, 2)) == "aten for the input, implicit_gemm for the weight"
    assert name(ALL, False, x.double()) == name(ALL, True, x.double()) == "aten"
    assert name(ALL, False, x.contiguous()) == name(ALL, True, x.contiguous()) == "aten"


class Asked(list[tuple[int, tuple[int, ...], tuple[int, ...]]]):
    """Answers the question of ``choice.py`` with every pass, and keeps the questions."""

    def __call__(self, x: Tensor, weight: Tensor, conv: ConvSpec, passes: int) -> int:
        self.append((passes, tuple(x.shape), tuple(weight.shape)))
        return passes


@pytest.mark.parametrize("training", [True, False])
def test_networks(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution that can runs so, in its own shapes, and the network computes what it computed."""
    monkeypatch.setattr(choice, "products", asked := Asked())
    model = fr.models.resnet18(num_classes=5).train(training)
    plain = fr.unfuse(copy.deepcopy(model))
    x = random(2, 3, 64, 48)
    got, want, exact = step(model, x), step(plain, x), step(copy.deepcopy(plain).double(), x.double())
    for name, value in ((n, v) for n, v in exact.items() if v.is_floating_point()):
        error, allowed = ((t[name].double() - value).norm() for t in (got, want))
        assert error <= 3 * allowed + 1e-6 * value.norm(), name
    convs = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    of = {(weight, image): passes for passes, image, weight in asked}
    assert {weight for weight, _ in of} == {tuple(m.weight.shape) for m in convs}
    assert of[(64, 3, 7, 7), (2, 3, 64, 48)] == of[(128, 64, 3, 3), (2, 64, 16, 12)] == ALL
    assert of[(128, 64, 1, 1), (2, 64, 16, 12)] == of[(512, 512, 3, 3), (2, 512, 2, 2)] == ALL
    asked.clear()
    with torch.no_grad():
        model(x)
    assert {passes for passes, *_ in asked} == {products.OUTPUT}
