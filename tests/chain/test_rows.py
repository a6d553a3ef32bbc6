"""Chains in a row as one operator: the reference's numbers, the single chains' memory, no work that nobody needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chains
import pytest
import rows
import torch
from chains import EVERYTHING
from tolerances import assert_as_good, assert_close
from torch import Tensor
from watching import composed, saved_tensors

import fused_resnet.chain.backward
from fused_resnet.backends import Call, ConvBackward
from fused_resnet.spec import RowSpec

ops = torch.ops.fused_resnet
ACTS, MODES, ROWS = list(chains.ACTS), list(chains.MODES), list(rows.ROWS)
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


# ------------------------------------------------------------------------------------------------ values and gradients
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", ROWS)
def test_same_numbers(backend: str, name: str, layout: str, dtype: torch.dtype) -> None:
    """Output and every gradient are the reference's, over the rows in every mode and with every activation."""
    at = ROWS.index(name)
    for i, mode in enumerate(("batch", "frozen", MODES[at % len(MODES)])):
        act = ACTS[(3 * at + i) % len(ACTS)]
        row = rows.make(name, act, mode, width=3, batch=3, size=(9, 8))
        t = rows.cast(row, rows.draw(row), dtype, FORMATS[layout])
        want, got = rows.truth(row, t), rows.run(row, t)
        for key in want:
            assert_close(f"{act}, {mode}: {key}", got[key], want[key], rows.reduction(row))
            assert got[key].dtype == dtype


@pytest.mark.parametrize("name", ROWS)
def test_interpreted(interpreted: str, name: str, nan_filled: None) -> None:
    """The same on the backends of a GPU."""
    at = ROWS.index(name)
    row = rows.make(name, ACTS[(at + 1) % len(ACTS)], ("batch", "mixed")[at % 2], width=3, batch=2, size=(7, 6))
    t = rows.draw(row)
    want, got = rows.truth(row, t), rows.run(row, rows.cast(row, t, torch.float32, torch.channels_last))
    for key in want:
        assert_close(key, got[key], want[key], rows.reduction(row), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ROWS)
def test_16_bit_is_as_good_as_plain(backend: str, name: str, dtype: torch.dtype) -> None:
    """The 16-bit rule: at most twice plain PyTorch's error."""
    compare_16_bit(name, dtype)


def test_16_bit_interpreted(interpreted: str) -> None:
    compare_16_bit("bottleneck_stage", torch.bfloat16)


def compare_16_bit(name: str, dtype: torch.dtype) -> None:
    row = rows.make(name, "silu", "batch", width=8, batch=2, size=(8, 6))
    draws = [rows.cast(row, rows.draw(row, 0), dtype, torch.channels_last) for _ in range(3)]
    want, got = ([way(row, t) for t in draws] for way in (rows.truth, rows.run))
    plain = [rows.run(row, t, rows.plain) for t in draws]
    for key in want[0]:
        ours, theirs, true = ([r[key] for r in results] for results in (got, plain, want))
        assert_as_good(key, ours, theirs, true, dtype)


@pytest.mark.usefixtures("in_one_thread")
@pytest.mark.parametrize(("name", "act"), [(n, act) for i, n in enumerate(ROWS) for act in chains.some_acts(i)])
def test_gradcheck(backend: str, name: str, act: str) -> None:
    """fp64: every gradient is the derivative, for every row x activation."""
    mode = MODES[(ACTS.index(act) + ROWS.index(name)) % len(MODES)]
    row = rows.make(name, act, mode)
    inputs = rows.leaves(row, rows.draw(row, 2e-4))
    assert torch.autograd.gradcheck(function(row, inputs), free(inputs), fast_mode=True)


@pytest.mark.usefixtures("in_one_thread")
def test_gradgradcheck(backend: str) -> None:
    """create_graph=True goes through the reference."""
    row = rows.make("bottleneck_stage", "silu", "mixed")
    inputs = rows.leaves(row, rows.draw(row, 2e-4))
    assert torch.autograd.gradgradcheck(function(row, inputs), free(inputs), fast_mode=True)


def free(inputs: list[Tensor]) -> list[Tensor]:
    return [v for v in inputs if v.requires_grad]


def function(row: rows.Row, inputs: list[Tensor]) -> Callable[..., Tensor]:
    def out(*values: Tensor) -> Tensor:
        it = iter(values)
        x, *params = [next(it) if v.requires_grad else v for v in inputs]
        result: Tensor = ops.chain(x, None, params, row.spec.encode())[0]
        return result

    return out


@pytest.mark.parametrize("name", ["basic_stage", "bottleneck_stage", "projection_last", "one_unit"])
def test_nothing_given_is_touched_and_same_bits(backend: str, name: str) -> None:
    """A second backward pass through the same graph has the bits of the first; inputs and what was saved stay."""
    for act in ("identity", "relu"):
        row = rows.make(name, act, "batch", width=4, size=(6, 5))
        t = rows.cast(row, rows.draw(row, 0), torch.float32, torch.channels_last)
        inputs, bits = rows.leaves(row, t), [v.clone() for v in (t.x, *t.params, t.dout)]
        outs = ops.chain(inputs[0], None, inputs[1:], row.spec.encode())
        kept = [v.detach().clone() for v in outs]
        first, second = (
            torch.autograd.grad(outs[0], free(inputs), t.dout, retain_graph=True, allow_unused=False) for _ in range(2)
        )
        assert all(map(torch.equal, first, second))
        assert all(map(torch.equal, kept, outs)) and all(map(torch.equal, bits, (t.x, *t.params, t.dout)))


# ------------------------------------------------------------------------------------------- what PyTorch is promised
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        (("basic_stage", "batch"), "nhwc"),
        (("resnet_d", "mixed"), "nchw"),
        (("one_unit", "frozen"), "nhwc"),
        *(pytest.param(*more, marks=pytest.mark.full) for more in (
            (("basic_stage", "batch"), "nchw"), (("resnet_d", "mixed"), "nhwc"), (("one_unit", "frozen"), "nchw"),
        )),
    ],
)  # fmt: skip
def test_opcheck(backend: str, case: tuple[str, str], layout: str) -> None:
    """Schema, fake kernels and autograd registration hold."""
    row = rows.make(case[0], "silu", case[1])
    t = rows.cast(row, rows.draw(row, 0), torch.float32, FORMATS[layout])
    inputs, text = rows.leaves(row, t), row.spec.encode()
    saved = ops.chain(t.x, None, t.params, text)[1:]
    needs, weights = [v.requires_grad for v in inputs], chains.weights(row.spec, t.params)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.chain, (inputs[0], None, inputs[1:], text)),
        (ops.chain_backward, (t.dout, t.x, None, weights, saved, text, [needs[0], False, *needs[1:]])),
    ]
    for op, args in calls:
        result = torch.library.opcheck(op.default, args, test_utils=EVERYTHING)
        assert result == dict.fromkeys(EVERYTHING, "SUCCESS")


@pytest.mark.parametrize("name", ROWS)
def test_saved_as_by_the_single_chains(backend: str, name: str) -> None:
    """Not a byte more is kept for the backward than with an operator per chain."""
    row = rows.make(name, "relu", "batch", width=3, size=(7, 6))
    t = rows.cast(row, rows.draw(row, 0), torch.float32, torch.channels_last)
    kept = []
    for op in (lambda x, r, p, spec: ops.chain(x, r, p, spec.encode())[0], rows.one_by_one):
        inputs = rows.leaves(row, t)
        with saved_tensors() as found:
            out = op(inputs[0], None, inputs[1:], row.spec)
        kept.append(sorted((tuple(v.shape), v.dtype, v.untyped_storage().nbytes()) for v in found.values()))
        assert out.untyped_storage().data_ptr() not in found
    assert kept[0] == kept[1]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(primitive, whether it was told a closing that has a chain's summand) of every call in a backward."""
    calls: list[tuple[str, bool]] = []
    real = fused_resnet.chain.backward.run

    def run(call: Call[Any]) -> Any:
        calls.append((call.name, isinstance(call, ConvBackward) and call.closing is not None))
        return real(call)

    monkeypatch.setattr(fused_resnet.chain.backward, "run", run)
    composed(monkeypatch)
    return calls


@pytest.mark.parametrize("name", ROWS)
def test_one_closing_pass_per_row(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last chain is closed by a pass of its own; each other one by the convolution that follows it."""
    row = rows.make(name)
    t = rows.draw(row, 0)
    calls = counted(monkeypatch)
    rows.run(row, t)
    assert [p for p, _ in calls].count("bn_act_backward") == 1
    assert sum(told for _, told in calls) == len(row.parts) - 1


# the tensors that want a gradient, the convolutions' backwards that takes: (row, wanted, calls)
PARTIAL = [
    ("basic_stage", ["2.1.bn_bias"], 0),
    ("basic_stage", ["2.1.weight"], 1),
    ("basic_stage", ["2.0.weight"], 2),
    ("basic_stage", ["1.1.bn_weight"], 2),
    ("basic_stage", ["1.1.weight", "2.1.bn_bias"], 3),
    ("basic_stage", ["0.2.weight"], 5),
    ("basic_stage", ["0.0.weight"], 6),
    ("basic_stage", ["x"], 7),
    ("projection_last", ["1.2.weight"], 1),
    ("projection_last", ["0.1.bn_weight"], 3),
]


@pytest.mark.parametrize("mode", ["batch", "frozen"])
@pytest.mark.parametrize("name, wanted, convs", PARTIAL, ids=[f"{n}-{'+'.join(w)}" for n, w, _ in PARTIAL])
def test_only_what_is_needed(
    backend: str, name: str, wanted: list[str], convs: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few gradients wanted those are the same, and the backward stops at the first chain that needs it."""
    row = rows.make(name, "silu", mode)
    t = rows.draw(row)
    want = rows.run(row, t)
    inputs = [v.detach().requires_grad_(n in wanted) for n, v in zip(row.names, (t.x, *t.params), strict=True)]
    calls = counted(monkeypatch)
    ops.chain(inputs[0], None, inputs[1:], row.spec.encode())[0].backward(t.dout)
    for n, v in zip(row.names, inputs, strict=True):
        if n in wanted:
            torch.testing.assert_close(v.grad, want[f"d {n}"])
        else:
            assert v.grad is None
    assert [p for p, _ in calls].count("conv_backward") == convs


def test_what_no_row_takes() -> None:
    """A max-pool, a residual or a first unit without conv stand alone."""
    for shape in ("stem", "conv_residual", "no_conv"):
        part = chains.make(shape).spec
        assert RowSpec((part,)).encode()
        with pytest.raises(ValueError, match="^chains: expected a conv first, no max-pool and no residual"):
            RowSpec((part, chains.make("basic").spec))
    with pytest.raises(ValueError, match="at least one chain"):
        RowSpec(())


def test_text_and_back() -> None:
    for name in ROWS:
        spec = rows.make(name, "leaky_relu", "mixed").spec
        assert RowSpec.decode(spec.encode()) == spec
