"""The chain's operators against the reference: values, gradients, statistics, determinism."""

from __future__ import annotations

import itertools
from typing import Any

import chains
import pytest
import torch
from chains import LAYOUT_PAIRS, call, in_layout, leaves
from tolerances import assert_as_good, assert_close

from fused_resnet import reference
from fused_resnet.spec import Act, ChainSpec, ConvSpec, ShortcutSpec, UnitSpec

ops = torch.ops.fused_resnet
ACTS, MODES, SHAPES = list(chains.ACTS), list(chains.MODES), list(chains.SHAPES)
DTYPES = (torch.float64, torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_same_numbers(backend: str, shape: str) -> None:
    """Output, statistics and every gradient are the reference's, for every shape x BatchNorm mode in every layout."""
    for i, mode in enumerate(MODES):
        act = ACTS[(i + SHAPES.index(shape)) % len(ACTS)]
        chain = chains.make(shape, act, mode, width=3, batch=3, size=(7, 6))
        drawn = chains.draw(chain).map(lambda v: v.float().double())
        want = chains.truth(chain, drawn)
        for layout, dtype in itertools.product(LAYOUT_PAIRS, DTYPES):
            got = chains.run(chain, in_layout(chain, drawn, dtype, layout))
            assert got.keys() == want.keys()
            for name in want:
                where = f"{act}, {mode}, {layout}, {dtype}: {name}"
                assert_close(where, got[name], want[name], chains.reduction(chain))
                assert got[name].dtype == dtype, where


# Sizes from which a backend may do otherwise (Winograd's convolution from 64 channels and 256 pixels on; more rows, or
# tiles, than one slice of a product): shape, width, batch, image.
LARGE = {
    "odd_tiles": ("basic", 64, 5, (7, 9)),
    "smallest_tile": ("basic_projection", 64, 16, (8, 8)),
    "uneven_widths": ("conv", 65, 13, (5, 4)),
    "many_tiles": ("conv_identity", 64, 1, (66, 66)),
    "many_rows": ("conv_1x1_identity", 512, 1, (64, 65)),
}


@pytest.mark.parametrize("mode", ["batch", "frozen"])
@pytest.mark.parametrize("case", LARGE)
def test_same_numbers_where_sizes_decide(backend: str, case: str, mode: str) -> None:
    """The same for wide and for long tensors, inference included."""
    shape, width, batch, size = LARGE[case]
    chain = chains.make(shape, "silu", mode, width, batch, size)
    t = in_layout(chain, chains.draw(chain), torch.float32, "nhwc")
    want, got = chains.truth(chain, t), chains.run(chain, t)
    for name in want:
        assert_close(name, got[name], want[name], chains.reduction(chain))
    if chain.spec.frozen:
        out = ops.chain_inference(t.x, t.residual, t.params, chain.text)
        assert_close("inference", out, want["out"], chains.reduction(chain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_is_as_good_as_plain_where_sizes_decide(backend: str, dtype: torch.dtype) -> None:
    """The 16-bit rule for wide tensors."""
    for mode in ("batch", "frozen"):
        chain = chains.make("basic", "silu", mode, 64, 5, (7, 9))
        t = in_layout(chain, chains.draw(chain), dtype, "nhwc")
        want, plain, got = chains.truth(chain, t), chains.run(chain, t, chains.plain), chains.run(chain, t)
        for name in want:
            assert_as_good(f"{mode}: {name}", [got[name]], [plain[name]], [want[name]], dtype)


@pytest.mark.parametrize("padding", [0, 1, 2, (1, 0)], ids=str)
def test_padding_of_wide_convolutions(backend: str, padding: Any) -> None:
    """Every padding of a wide 3x3 convolution, behind an activation that is not 0 at 0."""
    p = (padding, padding) if isinstance(padding, int) else padding
    units = tuple(UnitSpec(ConvSpec(padding=p), Act("sigmoid")) for _ in range(2))
    shapes = [("weight", (64, 64, 3, 3)), ("bn_weight", (64,)), ("bn_bias", (64,))] * 2
    chain = chains.Chain(ChainSpec(units, ShortcutSpec()), (7, 64, 9, 8), None, tuple(shapes))
    t = in_layout(chain, chains.draw(chain), torch.float32, "nhwc")
    want, got = chains.truth(chain, t), chains.run(chain, t)
    for name in want:
        assert_close(name, got[name], want[name], chains.reduction(chain))


@pytest.mark.parametrize("shape", SHAPES)
def test_inference_same_numbers(backend: str, shape: str) -> None:
    """With BatchNorm folded into the convolutions the output is the reference's."""
    frozen = [mode for mode in MODES if mode.startswith("frozen")]
    for act, mode in zip(ACTS, itertools.cycle(frozen), strict=False):
        chain = chains.make(shape, act, mode, width=3, batch=3, size=(7, 6))
        drawn = chains.draw(chain).map(lambda v: v.float().double())
        want = reference.chain(drawn.x, drawn.residual, drawn.params, chain.spec).out
        for layout, dtype in itertools.product(("nchw", "nhwc"), DTYPES):
            t = in_layout(chain, drawn, dtype, layout)
            got = ops.chain_inference(t.x, t.residual, t.params, chain.text)
            assert_close(f"{act}, {mode}, {layout}, {dtype}", got, want, chains.reduction(chain))
            assert got.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_16_bit_is_as_good_as_plain(backend: str, shape: str, dtype: torch.dtype) -> None:
    """In 16 bits the error against fp64 is at most twice plain PyTorch's, for out, statistics and every gradient.

    A value that rounding carries across a kink (or from one maximum of a pool to another) costs more than all other
    errors together, in either implementation, and which one meets more of them is chance: chains with kinks get few
    values, none near one, and the median of several draws decides.
    """
    for act, mode in [("relu", "batch-conv_bias"), ("silu", "batch"), ("sigmoid", "frozen")]:
        kinks = act == "relu" or shape.startswith("stem")
        size = {"width": 3, "batch": 2, "size": (4, 4)} if kinks else {"width": 8, "batch": 4, "size": (9, 10)}
        chain = chains.make(shape, act, mode, **size)
        margin = 1.5 * torch.finfo(dtype).eps if kinks else 0
        draws = [chains.cast(chain, chains.draw(chain, margin), dtype) for _ in range(9 if kinks else 3)]
        want = [chains.truth(chain, t) for t in draws]
        for layout in ("nchw", "nhwc"):
            laid = [in_layout(chain, t, dtype, layout) for t in draws]
            plain = [chains.run(chain, t, chains.plain) for t in laid]
            got = [chains.run(chain, t) for t in laid]
            for name in want[0]:
                if name.startswith("d ") and name.endswith(".bias") and chain.spec.all_units[int(name[2])].batch_stats:
                    assert not any(g[name].any() for g in got), f"{name}: the mean takes a bias away: no gradient"
                    continue
                ours, theirs, true = ([r[name] for r in results] for results in (got, plain, want))
                assert_as_good(f"{act}, {mode}, {layout}: {name}", ours, theirs, true, dtype)
                assert ours[0].dtype == theirs[0].dtype


def test_far_mean_keeps_the_variance(backend: str) -> None:
    """|mean| = 1e4, std = 1 in fp32: the variance is right to 1e-3, where sum(y^2)/M - mean^2 has lost every digit."""
    x = (torch.randn(4, 3, 16, 16, dtype=torch.float64) + 1e4).float()
    var = x.double().var((0, 2, 3), unbiased=False)
    weight = torch.eye(3)[:, :, None, None].contiguous()
    for fmt in chains.LAYOUTS.values():
        y = x.contiguous(memory_format=fmt)
        for conv, params in ((None, []), (ConvSpec(), [weight])):
            spec = ChainSpec((UnitSpec(conv, Act("identity"), bn_weight=False, bn_bias=False),), ShortcutSpec())
            *_, mean, _, got = ops.chain(y, None, params, spec.encode())
            torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
            torch.testing.assert_close(got.double(), var, rtol=1e-3, atol=0)


def test_far_mean_keeps_the_gradient(backend: str) -> None:
    """|mean| = 1e4, std = 1 in fp32: dgamma and dx are those of fp64 (sum dz*y - mean*sum dz would cancel)."""
    x = (torch.randn(4, 3, 16, 16, dtype=torch.float64) + 1e4).float().requires_grad_()
    gamma, beta = torch.rand(3) + 0.5, torch.rand(3)
    dout = torch.randn(4, 3, 16, 16)
    spec = ChainSpec((UnitSpec(None, Act("silu")),), ShortcutSpec())
    params = [gamma.requires_grad_(), beta.requires_grad_()]
    got = torch.autograd.grad(ops.chain(x, None, params, spec.encode())[0], [x, *params], dout)
    wide = [v.detach().double().requires_grad_() for v in (x, *params)]
    want = torch.autograd.grad(reference.chain(wide[0], None, wide[1:], spec).out, wide, dout.double())
    for name, g, w in zip(("dx", "dgamma", "dbeta"), got, want, strict=True):
        assert (g.double() - w).norm() <= 2e-3 * w.norm(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_is_written(backend: str, shape: str) -> None:
    """Memory that comes filled with NaN leaves no NaN in any output or gradient, forward, backward and inference."""
    torch.use_deterministic_algorithms(True)  # torch.empty and its C++ kin now return NaN
    try:
        assert torch.empty(8).isnan().all()
        for mode, layout in itertools.product(("batch", "frozen"), ("nchw", "nhwc")):
            chain = chains.make(shape, "silu", mode, width=3, batch=2, size=(7, 6))
            t = in_layout(chain, chains.draw(chain), torch.float32, layout)
            for name, value in chains.run(chain, t).items():
                assert value.isfinite().all(), f"{mode}, {layout}: {name}"
            for out in ops.chain(t.x, t.residual, t.params, chain.text):
                assert out.isfinite().all()
            if chain.spec.frozen:
                assert ops.chain_inference(t.x, t.residual, t.params, chain.text).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_given_is_touched(backend: str, shape: str, layout: str) -> None:
    """Forward and backward leave x, residual, parameters, dout and what was saved as they were: a second backward pass
    through the same graph has the bits of the first."""
    for act, dtype in itertools.product(("identity", "relu"), (torch.float32, torch.bfloat16)):
        chain = chains.make(shape, act, "batch", width=4, size=(6, 5))
        t = in_layout(chain, chains.draw(chain, margin=0), dtype, layout)
        dout = t.dout.contiguous(memory_format=LAYOUT_PAIRS[layout][0])  # no copy is needed, none protects it
        bits = [v.clone() for v in (*t.inputs, dout) if v is not None]
        inputs = leaves(chain, t)
        wanted = [v for v in inputs if v is not None and v.requires_grad]
        out = call(chain, inputs)[0]
        kept = out.detach().clone()
        first, second = (torch.autograd.grad(out, wanted, dout, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(out, kept)
        assert all(
            torch.equal(a, b) for a, b in zip(bits, [v for v in (*t.inputs, dout) if v is not None], strict=True)
        )


@pytest.mark.parametrize("shape", ["basic_projection", "bottleneck", "stem", "no_conv_residual", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_bits_each_time(backend: str, shape: str, dtype: torch.dtype) -> None:
    """The same input gives the same bits: no sum depends on who comes first."""
    chain = chains.make(shape, "silu", "batch", width=16, batch=4, size=(20, 17))
    t = in_layout(chain, chains.draw(chain, margin=0), dtype, "nhwc")
    first = chains.run(chain, t)
    for _ in range(3):
        again = chains.run(chain, t)
        for name in first:
            assert torch.equal(first[name], again[name]), name
