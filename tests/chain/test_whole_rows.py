"""A row in one C++ call gives the bits of the same row composed of the CPU backend's primitives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import chains
import pytest
import rows
import torch
from torch import Tensor

from fused_resnet.backends import RowForward, load, use_backend
from fused_resnet.backends.backend import Backend
from fused_resnet.chain import backward, forward
from fused_resnet.spec import RowSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture(autouse=True)
def backend() -> Iterator[Backend]:
    found, reason = load("cpu")
    if found is None:
        pytest.skip(reason)
    with use_backend("cpu"):
        yield found


def whole(kind: str, *args: Any) -> list[Tensor]:
    """The operator, which runs the row in one call."""
    found = getattr(torch.ops.fused_resnet, kind)(*args)
    return found if isinstance(found, list) else [found]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == w.dtype and g.shape == w.shape and g.stride() == w.stride(), i
        assert torch.equal(g, w) or torch.equal(g.isnan(), w.isnan()), i


def compare(
    x: Tensor, residual: Tensor | None, params: list[Tensor], dout: Tensor, text: str, parts: bool = False
) -> None:
    """Forward, and backward for all gradients; with ``parts`` also for each alone, and for all but one."""
    outs = forward.row_forward(x, residual, params, text)
    assert_same(whole("chain", x, residual, params, text), outs)
    names = [name for unit in RowSpec.decode(text).all_units for name in unit.param_names]
    weights = [p for name, p in zip(names, params, strict=True) if name == "weight"]
    every = [True, residual is not None, *(not name.startswith("running") for name in names)]
    saved, n = outs[1:], len(every)
    wanted = [every]
    for i in (i for i in range(n) if parts and every[i]):
        wanted += [[j == i for j in range(n)], [j != i and need for j, need in enumerate(every)]]
    for needs in wanted:
        args = x, residual, weights, saved, text, needs
        assert_same(whole("chain_backward", dout, *args), backward.row_backward(dout.clone(), *args))
        if parts:
            own, composed = (
                steps(f, dout, *args) for f in (torch.ops.fused_resnet.chain_backward, backward.row_backward)
            )
            assert own == composed


def steps(function: Callable[..., Any], dout: Tensor, *args: Any) -> Counter[str]:
    """How often each primitive of the backend runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        function(dout.clone(), *args)
    names = (event.name.removeprefix("fused_resnet_cpu::") for event in found.events() or [])
    return Counter(n for n in names if n in ("conv_stats", "conv_backward", "bn_act_backward", "bn_backward"))


@pytest.mark.parametrize("mode", ["batch", "frozen", "mixed", "batch-no_affine", "frozen-conv_bias"])
@pytest.mark.parametrize("shape", chains.SHAPES)
def test_chains(shape: str, mode: str) -> None:
    chain = chains.make(shape, "leaky_relu", mode, width=3, batch=3, size=(7, 6))
    drawn = chains.draw(chain, 0)
    for layout in chains.LAYOUT_PAIRS:
        for dtype in DTYPES:
            t = chains.in_layout(chain, drawn, dtype, layout)
            parts = layout == "nhwc" and dtype == torch.float32
            compare(t.x, t.residual, t.params, t.dout, chain.text, parts)


@pytest.mark.parametrize("shape", chains.SHAPES)
def test_inference(shape: str) -> None:
    chain = chains.make(shape, "relu", "frozen-conv_bias", width=3, batch=2, size=(9, 8))
    drawn = chains.draw(chain, 0)
    for layout in chains.LAYOUT_PAIRS:
        for dtype in DTYPES:
            t = chains.in_layout(chain, drawn, dtype, layout)
            args = t.x, t.residual, t.params, chain.text
            assert_same(whole("chain_inference", *args), [forward.inference(*args)])


@pytest.mark.parametrize("name", rows.ROWS)
def test_inference_of_rows(name: str) -> None:
    row = rows.make(name, mode="frozen-beta_or_gamma", width=3, size=(9, 8))
    drawn = rows.draw(row, 0)
    for layout in chains.LAYOUTS.values():
        for dtype in DTYPES:
            t = rows.cast(row, drawn, dtype, layout)
            args = t.x, None, t.params, row.spec.encode()
            assert_same(whole("chain_inference", *args), [forward.inference(*args)])


@pytest.mark.parametrize("name", rows.ROWS)
def test_rows(name: str) -> None:
    row = rows.make(name)
    drawn = rows.draw(row, 0)
    for layout in chains.LAYOUTS.values():
        for dtype in DTYPES:
            t = rows.cast(row, drawn, dtype, layout)
            parts = layout == torch.channels_last and dtype == torch.float32
            compare(t.x, None, t.params, t.dout, row.spec.encode(), parts)


def test_one_call(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators come here through it, and a group's statistics, or another backend, do not."""
    seen: list[str] = []
    real = type(backend).row_forward

    def spied(self: Backend, call: RowForward) -> list[Tensor]:
        seen.append(call.spec)
        return real(self, call)

    monkeypatch.setattr(type(backend), "row_forward", spied)
    chain = chains.make("basic")
    t = chains.draw(chain)
    args = t.x, None, t.params, chain.text
    torch.ops.fused_resnet.chain(*args)
    assert seen == [chain.text]
    with use_backend("aten"):
        torch.ops.fused_resnet.chain(*args)
    assert seen == [chain.text]
