"""conv_backward with something that closes before its input: every backend against aten's composition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from primitives import Positional, aten
from tolerances import assert_as_good, assert_close
from torch import Tensor

from fused_resnet import planner
from fused_resnet.backends import Closing, ConvBackward, DyCoefficients, Norm, load
from fused_resnet.spec import ACTIVATIONS, Act, ConvSpec

# name -> (input and output channels, kernel, convolution, image)
CONVS = {
    "1x1": (24, 40, (1, 1), ConvSpec(), (9, 7)),
    "1x1/2": (24, 16, (1, 1), ConvSpec(stride=(2, 2)), (7, 8)),
    "3x3": (16, 24, (3, 3), ConvSpec(padding=(1, 1)), (6, 7)),
    "3x3/2": (16, 8, (3, 3), ConvSpec(stride=(2, 2), padding=(1, 1)), (7, 6)),
    "1x3/3": (8, 8, (1, 3), ConvSpec(stride=(3, 1), padding=(0, 1)), (8, 5)),  # most rows reach no output
}
BACKENDS = ("aten", "cpu", "cudnn", "triton")


@pytest.fixture(params=BACKENDS)
def module(request: pytest.FixtureRequest, nan_filled: None) -> Iterator[Any]:
    """A backend; a GPU's is interpreted, with tiles of which a tiny problem has several."""
    found, reason = load(request.param)
    if found is None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    if request.param != "triton":
        yield Positional(found)
        return
    if torch.cuda.is_available():
        pytest.skip("compiled here, not interpreted")
    from fused_resnet.backends.triton import configs

    with configs.use(dgrad=configs.Config(32, 32, 16, 4, 2), wgrad=configs.Config(32, 32, 16, 4, 2, splits=2)):
        yield Positional(found)


def image(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(n, c, h, w) * 1.5 + 0.7).to(dtype).contiguous(memory_format=torch.channels_last)


def norm(c: int) -> Norm:
    """scale of both signs."""
    return Norm(*(torch.randn(c) for _ in range(4)))


def arguments(name: str, act: str, summand: str, add: str, dtype: torch.dtype) -> tuple[Any, ...]:
    c, k, kernel, conv, (h, w) = CONVS[name]
    x, weight = image(2, c, h, w, dtype), torch.randn(k, c, *kernel) / c**0.5
    oh, ow = conv.out_size((h, w), kernel)
    dz, y = image(2, k, oh, ow, dtype), image(2, k, oh, ow, dtype)
    coef = DyCoefficients(*(torch.randn(k) for _ in range(4)))
    residual = None if summand == "none" else image(2, c, h, w, dtype)
    closing = Closing(
        image(2, c, h, w, dtype), norm(c), Act.make(act), residual, norm(c) if summand == "norm" else None
    )
    more = None if add == "none" else dz if add == "dz" else image(2, c, h, w, dtype)
    return dz, y, coef, x, None, weight, conv, True, True, more, closing


def double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(double, value))
    return value


def flat(results: tuple[Any, ...]) -> list[Tensor]:
    """dx, dw, and the sums there are."""
    dx, dw, *sums = results
    return [dx, dw, *(t for s in sums if s is not None for t in s)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("summand", ["none", "raw", "norm"])
@pytest.mark.parametrize("name", CONVS)
def test_closing(module: Any, name: str, summand: str, dtype: torch.dtype) -> None:
    """dx, dw and the sums, with and without another path's gradient; inputs but for ``add`` stay as they are."""
    at = 3 * list(CONVS).index(name) + ("none", "raw", "norm").index(summand)
    for i, add in enumerate(("none", "given")):
        args = arguments(name, list(ACTIVATIONS)[(at + 5 * i) % len(ACTIVATIONS)], summand, add, dtype)
        want = flat(aten.conv_backward(*map(double, args)))
        plain = flat(aten.conv_backward(*args))
        given = [args[0], args[1], args[3], args[10].y, args[10].summand]
        before = [t.clone() for t in given if t is not None]
        got = flat(module.conv_backward(*args))
        assert len(got) == len(want) == (6 if summand == "norm" else 4)
        for what, g, p, t in zip(("dx", "dw", "sum", "sum_y", "sum", "sum_r"), got, plain, want, strict=False):
            if dtype == torch.float32:
                assert_close(f"{add} {what}", g, t, 9 * 40 + 2 * 9 * 8)
            else:
                assert_as_good(f"{add} {what}", [g], [p], [t], dtype)
        assert all(map(torch.equal, before, [t for t in given if t is not None]))


def test_add_that_is_dz(module: Any) -> None:
    """A chain of one unit hands its own dz on: it is not overwritten."""
    c, k, kernel, conv, size = CONVS["3x3"]
    args = arguments("3x3", "relu", "raw", "none", torch.float32)
    weight = torch.randn(c, c, *kernel)
    dz, y = image(2, c, *size, torch.float32), image(2, c, *size, torch.float32)
    coef = DyCoefficients(*(torch.randn(c) for _ in range(4)))
    args = (dz, y, coef, args[3], None, weight, conv, True, True, dz, args[10])
    before, want = dz.clone(), flat(aten.conv_backward(*map(double, args)))
    for g, t in zip(flat(module.conv_backward(*args)), want, strict=True):
        assert_close("", g, t, 9 * c + 84)
    assert torch.equal(dz, before)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_not_a_number_goes_where_pytorch_sends_it(module: Any, act: str) -> None:
    args = arguments("1x1", act, "raw", "given", torch.float32)
    closing = args[10]
    closing.y[0, 3, 1, 1], closing.y[1, 5, 0, 0] = float("nan"), float("inf")
    closing.summand[0, 7, 2, 2], args[9][1, 9, 3, 3] = -float("inf"), float("nan")
    want = flat(aten.conv_backward(*(a.clone() if isinstance(a, Tensor) else a for a in args)))
    for g, t in zip(flat(module.conv_backward(*args)), want, strict=True):
        assert torch.equal(g.isnan(), t.isnan())


def test_planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Measured as one job, with the closing's kind in the signature; apart, the weight's part knows nothing of it."""
    if load("cpu")[0] is None:
        pytest.skip("one backend alone leaves nothing to choose: the extension is not built")
    monkeypatch.setenv("FUSED_RESNET_PLAN", "measure")
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    told = []

    def milliseconds(call: Any, device: torch.device) -> float:
        choice, timed = call.args
        needs = timed.need_input, timed.need_weight
        told.append((*needs, timed.closing is not None))
        # what is fastest: the input's gradient by cpu, the weight's by aten
        return {(True, True): 9.0, (True, False): 1.0, (False, True): 2.0}[needs] + (
            0.5 if (choice.backend == "cpu") == (not timed.need_input) else 0.0
        )

    monkeypatch.setattr(planner.measuring, "milliseconds", milliseconds)
    planner.forget()
    try:
        for summand in ("none", "raw", "norm"):
            args = arguments("1x1", "silu", summand, "given", torch.float32)
            add = args[9].clone()
            want = flat(aten.conv_backward(*args))
            got = flat(planner.run(ConvBackward(*args[:9], add, args[10])))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
        names = planner.cache_of(torch.device("cpu")).choices
        kinds = {"closing(silu(0))", "closing(silu(0),summand)", "closing(silu(0),norm)"}
        assert len(names) == 3 and {text.split()[-1] for text in names} == kinds
        assert {entry["choice"]["backend"] for entry in names.values()} == {"apart"}
        assert {True} == {c for i, w, c in told if i} and {False} == {c for i, w, c in told if not i}
    finally:
        planner.forget()
