"""The chain's operators against the reference: values, gradients, statistics, memory, determinism, tracing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import chains
import pytest
import torch
from tolerances import assert_as_good, assert_close
from torch import Tensor

import fused_resnet.chain
import fused_resnet.chain_backward
from fused_resnet import functional, reference
from fused_resnet.functional import Unit
from fused_resnet.spec import Act, ChainSpec, ConvSpec, UnitSpec

ops = torch.ops.fused_resnet
ACTS, MODES, SHAPES = list(chains.ACTS), list(chains.MODES), list(chains.SHAPES)
# x and the weights in one layout, or one in each: the chain works in channels_last as soon as anything comes in it.
LAYOUTS = {
    "nchw": (torch.contiguous_format, torch.contiguous_format),
    "nhwc": (torch.channels_last, torch.channels_last),
    "x_nchw-weight_nhwc": (torch.contiguous_format, torch.channels_last),
    "x_nhwc-weight_nchw": (torch.channels_last, torch.contiguous_format),
}


def in_layout(chain: chains.Chain, t: chains.Tensors, dtype: torch.dtype, layout: str) -> chains.Tensors:
    """The tensors in a dtype, x's layout and the weights' chosen apart; dout comes in the other one."""
    x_format, weight_format = LAYOUTS[layout]
    t = chains.cast(chain, t, dtype, weight_format)
    other = {torch.contiguous_format: torch.channels_last, torch.channels_last: torch.contiguous_format}[x_format]
    return t._replace(x=t.x.contiguous(memory_format=x_format), dout=t.dout.contiguous(memory_format=other))


def leaves(chain: chains.Chain, t: chains.Tensors) -> list[Tensor | None]:
    """x, residual and the parameters, all that can learn wanting a gradient; strides kept."""
    return [
        None if v is None else v.detach().requires_grad_(need)
        for v, need in zip(t.inputs, chains.learnable(chain), strict=True)
    ]


def call(chain: chains.Chain, inputs: list[Tensor | None]) -> list[Tensor]:
    return ops.chain(inputs[0], inputs[1], inputs[2:], chain.text)


# ------------------------------------------------------------------------------------------------ values and gradients
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_numbers(backend: str, shape: str, layout: str, dtype: torch.dtype) -> None:
    """Output, statistics and every gradient are the reference's, for every shape x BatchNorm mode in every layout."""
    for i, mode in enumerate(MODES):
        act = ACTS[(i + SHAPES.index(shape)) % len(ACTS)]
        chain = chains.make(shape, act, mode, width=3, batch=3, size=(7, 6))
        t = in_layout(chain, chains.draw(chain), dtype, layout)
        want, got = chains.truth(chain, t), chains.run(chain, t)
        assert got.keys() == want.keys()
        for name in want:
            assert_close(f"{act}, {mode}: {name}", got[name], want[name], chains.reduction(chain))
            assert got[name].dtype == dtype


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
    chain = chains.Chain(ChainSpec(units), (7, 64, 9, 8), None, tuple(shapes))
    t = in_layout(chain, chains.draw(chain), torch.float32, "nhwc")
    want, got = chains.truth(chain, t), chains.run(chain, t)
    for name in want:
        assert_close(name, got[name], want[name], chains.reduction(chain))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES)
def test_inference_same_numbers(backend: str, shape: str, layout: str) -> None:
    """With BatchNorm folded into the convolutions the output is the reference's."""
    for act, mode in zip(ACTS, itertools.cycle(["frozen", "frozen-no_affine", "frozen-conv_bias"]), strict=False):
        for dtype in (torch.float64, torch.float32):
            chain = chains.make(shape, act, mode, width=3, batch=3, size=(7, 6))
            t = in_layout(chain, chains.draw(chain), dtype, layout)
            want = reference.chain(t.x, t.residual, t.params, chain.spec).out
            got = ops.chain_inference(t.x, t.residual, t.params, chain.text)
            assert_close(f"{act}, {mode}, {dtype}", got, want, chains.reduction(chain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES)
def test_16_bit_is_as_good_as_plain(backend: str, shape: str, layout: str, dtype: torch.dtype) -> None:
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
        draws = [in_layout(chain, chains.draw(chain, margin), dtype, layout) for _ in range(9 if kinks else 3)]
        want = [chains.truth(chain, t) for t in draws]
        plain = [chains.run(chain, t, chains.plain) for t in draws]
        got = [chains.run(chain, t) for t in draws]
        for name in want[0]:
            if name.startswith("d ") and name.endswith(".bias") and chain.spec.all_units[int(name[2])].batch_stats:
                assert not any(g[name].any() for g in got), f"{name}: the mean takes a bias away, its gradient is zero"
                continue
            ours, theirs, true = ([r[name] for r in results] for results in (got, plain, want))
            assert_as_good(f"{act}, {mode}: {name}", ours, theirs, true, dtype)
            assert ours[0].dtype == theirs[0].dtype


def test_far_mean_keeps_the_variance(backend: str) -> None:
    """|mean| = 1e4, std = 1 in fp32: the variance is right to 1e-3, where sum(y^2)/M - mean^2 has lost every digit."""
    x = (torch.randn(4, 3, 16, 16, dtype=torch.float64) + 1e4).float()
    var = x.double().var((0, 2, 3), unbiased=False)
    weight = torch.eye(3)[:, :, None, None].contiguous()
    for fmt in chains.LAYOUTS.values():
        y = x.contiguous(memory_format=fmt)
        for conv, params in ((None, []), (ConvSpec(), [weight])):
            spec = ChainSpec((UnitSpec(conv, Act("identity"), affine=False),))
            *_, mean, got = ops.chain(y, None, params, spec.encode())
            torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
            torch.testing.assert_close(got.double(), var, rtol=1e-3, atol=0)


def test_far_mean_keeps_the_gradient(backend: str) -> None:
    """|mean| = 1e4, std = 1 in fp32: dgamma and dx are those of fp64 (sum dz*y - mean*sum dz would cancel)."""
    x = (torch.randn(4, 3, 16, 16, dtype=torch.float64) + 1e4).float().requires_grad_()
    gamma, beta = torch.rand(3) + 0.5, torch.rand(3)
    dout = torch.randn(4, 3, 16, 16)
    spec = ChainSpec((UnitSpec(None, Act("silu")),))
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
        dout = t.dout.contiguous(memory_format=LAYOUTS[layout][0])  # no copy is needed, none protects it
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


# -------------------------------------------------------------------------------------------------------- gradcheck
def gradcheck(chain: chains.Chain, check: Callable[..., bool], margin: float, **options: Any) -> bool:
    """``check`` of the chain's output as a function of all that can learn."""
    inputs = leaves(chain, chains.draw(chain, margin))
    free = [v for v in inputs if v is not None and v.requires_grad]

    def out(*values: Tensor) -> Tensor:
        it = iter(values)
        return call(chain, [next(it) if v is not None and v.requires_grad else v for v in inputs])[0]

    return check(out, free, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(backend: str, shape: str, act: str, mode: str) -> None:
    """fp64: every gradient is the derivative, for every shape x activation x BatchNorm mode (random projections)."""
    assert gradcheck(chains.make(shape, act, mode), torch.autograd.gradcheck, 2e-4, fast_mode=True)


@pytest.mark.parametrize("mode", ["batch", "frozen-conv_bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_whole_jacobian(backend: str, shape: str, mode: str) -> None:
    """fp64: the same element by element of the Jacobian."""
    assert gradcheck(chains.make(shape, "hardswish", mode, size=(3, 3)), torch.autograd.gradcheck, 2e-4)


@pytest.mark.parametrize("mode", ["batch", "frozen", "batch-conv_bias", "mixed"])
@pytest.mark.parametrize("shape", ["conv", "no_conv_residual", "basic_projection", "bottleneck", "option_a", "stem"])
def test_gradgradcheck(backend: str, shape: str, mode: str) -> None:
    """fp64: the gradient of the gradient is the second derivative."""
    chain = chains.make(shape, "silu", mode)
    assert gradcheck(chain, torch.autograd.gradgradcheck, 2e-4, fast_mode=True)


# ------------------------------------------------------------------------------------------- what PyTorch is promised
OPCHECKED = [
    ("basic", "relu", "batch"),
    ("basic_projection", "silu", "mixed"),
    ("basic_projection", "relu", "batch"),
    ("bottleneck", "relu", "frozen"),
    ("resnet_d", "leaky_relu", "frozen-conv_bias"),
    ("option_a", "elu", "batch-no_affine"),
    ("stem_recompute", "relu", "batch"),
    ("no_conv_residual", "identity", "batch"),
    ("conv_residual", "identity", "frozen"),
]


EVERYTHING = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def opcheck(chain: chains.Chain, t: chains.Tensors, tests: tuple[str, ...]) -> None:
    """torch.library.opcheck of the operators that take this chain."""

    def check(op: Any, *args: Any) -> None:
        result = torch.library.opcheck(op.default, args, test_utils=tests)
        assert result == dict.fromkeys(tests, "SUCCESS")

    x, residual, *params = leaves(chain, t)
    check(ops.chain, x, residual, params, chain.text)
    x, residual, params = t.x, t.residual, t.params
    saved = call(chain, [x, residual, *params])[1:]
    check(ops.chain_backward, t.dout, x, residual, params, saved, chain.text, chains.learnable(chain))
    if chain.spec.frozen:
        check(ops.chain_inference, x, residual, params, chain.text)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", OPCHECKED, ids="-".join)
def test_opcheck(backend: str, case: tuple[str, str, str], layout: str) -> None:
    """Schema, fake kernel and autograd registration of each operator hold: shapes, strides, no alias, traceable."""
    chain = chains.make(*case)
    t = in_layout(chain, chains.draw(chain), torch.float32, layout)
    opcheck(chain, t, EVERYTHING)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fake_kernels(backend: str, shape: str, layout: str) -> None:
    """Without running, the operators foretell shapes, dtypes, strides and that nothing shares memory."""
    for act, mode in [("relu", "batch"), ("identity", "frozen"), ("identity", "mixed")]:
        for dtype in (torch.float32, torch.bfloat16):
            chain = chains.make(shape, act, mode, width=2, size=(6, 5))
            t = in_layout(chain, chains.draw(chain, margin=0), dtype, layout)
            opcheck(chain, t, ("test_faketensor",))


AMBIGUOUS = {
    "one_channel": ((2, 1, 5, 4), 1, (3, 3)),
    "one_pixel": ((3, 4, 1, 1), 4, (3, 3)),
    "one_pixel_1x1": ((3, 4, 1, 1), 4, (1, 1)),
    "one_everything": ((3, 1, 1, 1), 1, (1, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", AMBIGUOUS)
def test_layout_of_size_one(backend: str, sizes: str, layout: str) -> None:
    """Where sizes of 1 leave the layout open, the fake kernel's strides are the real ones and the values right."""
    x_shape, channels, kernel = AMBIGUOUS[sizes]
    conv = ConvSpec(padding=(kernel[0] // 2, kernel[1] // 2))
    unit = UnitSpec(conv, Act("silu"))
    spec = ChainSpec((unit, unit))
    shapes = [("weight", (5, channels, *kernel)), ("bn_weight", (5,)), ("bn_bias", (5,))]
    shapes += [("weight", (1, 5, *kernel)), ("bn_weight", (1,)), ("bn_bias", (1,))]
    chain = chains.Chain(spec, x_shape, None, tuple(shapes))
    t = in_layout(chain, chains.draw(chain), torch.float64, layout)
    want, got = chains.truth(chain, t), chains.run(chain, t)
    for name in want:
        assert_close(name, got[name], want[name], chains.reduction(chain))
    opcheck(chain, t, ("test_faketensor",))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", AMBIGUOUS)
def test_layout_of_size_one_in_inference(backend: str, sizes: str, layout: str) -> None:
    """As above for ``chain_inference``: a grey image is dense in both layouts, its output has the one of the fake."""
    x_shape, channels, kernel = AMBIGUOUS[sizes]
    unit = UnitSpec(ConvSpec(padding=(kernel[0] // 2, kernel[1] // 2)), Act("silu"), 1e-5, False)
    for k in (5, 1):
        shapes = tuple((n, (k, channels, *kernel) if n == "weight" else (k,)) for n in unit.param_names)
        chain = chains.Chain(ChainSpec((unit,)), x_shape, None, shapes)
        t = in_layout(chain, chains.draw(chain), torch.float32, layout)
        out = torch.ops.fused_resnet.chain_inference(t.x, None, t.params, chain.text)
        assert_close("out", out, chains.truth(chain, t)["out"], chains.reduction(chain))
        torch.library.opcheck(
            torch.ops.fused_resnet.chain_inference.default, (t.x, None, t.params, chain.text),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every_other_column": lambda v: torch.stack([v, v + 1], -1)[..., 0],
    "permuted": lambda v: v.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "batch_transposed": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("size", [(5, 4), (1, 1)], ids=["5x4", "1x1"])
def test_strange_strides(backend: str, view: str, size: tuple[int, int]) -> None:
    """x, residual, weights and dout with strides of neither layout: right values, and the strides the fake promises."""
    chain = chains.make("conv_residual", "silu", "batch", width=3, batch=4, size=size)
    t = chains.draw(chain).map(lambda v: VIEWS[view](v) if v.dim() == 4 else v)
    want, got = chains.truth(chain, t), chains.run(chain, t)
    for name in want:
        assert_close(name, got[name], want[name], chains.reduction(chain))
    opcheck(chain, t, ("test_faketensor",))


# ---------------------------------------------------------------------------------------------- memory and needed work
@contextmanager
def saved_tensors() -> Iterator[dict[int, Tensor]]:
    """Everything that autograd saves, by storage."""
    found: dict[int, Tensor] = {}

    def pack(v: Tensor) -> Tensor:
        found[v.untyped_storage().data_ptr()] = v
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        yield found


@pytest.mark.parametrize("mode", ["batch", "frozen"])
@pytest.mark.parametrize("shape", SHAPES)
def test_saved_for_backward(backend: str, shape: str, mode: str) -> None:
    """Kept: the inputs, the raw convolution outputs (not the first under recompute), per-channel vectors, an argmax."""
    chain = chains.make(shape, "relu", mode, width=3, size=(7, 6))
    inputs = leaves(chain, chains.draw(chain, margin=0))
    with saved_tensors() as found:
        outs = call(chain, inputs)
    given = {v.untyped_storage().data_ptr() for v in inputs if v is not None}
    kept = {p: v for p, v in found.items() if p not in given}
    assert kept.keys() == {v.untyped_storage().data_ptr() for v in outs[1:]}
    sizes = fused_resnet.chain.unit_shapes(inputs[0], inputs[2:], chain.spec)
    images = [
        tuple(size)
        for i, (u, size) in enumerate(zip(chain.spec.all_units, sizes, strict=True))
        if u.conv is not None and not (chain.spec.recompute and i == 0)
    ]
    vectors = [(s[1],) for u, s in zip(chain.spec.all_units, sizes, strict=True) if u.batch_stats for _ in "mv"]
    argmax = [tuple(outs[0].shape)] if chain.spec.pool is not None else []
    assert sorted(tuple(v.shape) for v in kept.values()) == sorted(images + vectors + argmax)
    assert all(v.dtype == torch.uint8 for v in kept.values() if argmax and tuple(v.shape) == argmax[0])
    assert all(v.untyped_storage().nbytes() == v.numel() * v.element_size() for v in kept.values())


def test_saved_by_the_functional_api(backend: str) -> None:
    """A training BasicBlock in fp32: 3 images (plain PyTorch keeps 5 and more) and 4 vectors, to the byte."""
    x = torch.randn(2, 4, 8, 8)
    blocks = [unit(4, 4) for _ in range(2)]
    mine = {x.untyped_storage().data_ptr()}
    mine |= {v.untyped_storage().data_ptr() for u in blocks for v in vars(u).values() if isinstance(v, Tensor)}
    with saved_tensors() as found:
        functional.residual_chain(x, blocks)
    new = [v for p, v in found.items() if p not in mine]
    assert sum(v.untyped_storage().nbytes() for v in new) == 2 * x.nbytes + 2 * 2 * 4 * 4


def unit(cin: int, cout: int, **options: Any) -> Unit:
    """A training 3x3 unit with everything, its parameters wanting gradients."""
    return Unit(
        torch.randn(cout, cin, 3, 3).div(3 * cin**0.5).requires_grad_(),
        (torch.rand(cout) + 0.5).requires_grad_(),
        torch.randn(cout).requires_grad_(),
        torch.randn(cout),
        torch.rand(cout) + 0.5,
        **{"padding": 1, "training": True} | options,
    )


class Calls:
    """Which convolution gradients a backward pass asked the backend for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.conv_backward: list[tuple[bool, bool]] = []
        real = fused_resnet.chain_backward.run

        def run(primitive: str, *args: Any) -> Any:
            if primitive == "conv_backward":
                self.conv_backward.append((args[7], args[8]))  # need_input, need_weight
            return real(primitive, *args)

        monkeypatch.setattr(fused_resnet.chain_backward, "run", run)


# (shape, the tensors that want a gradient, the conv_backward calls of that: (need_input, need_weight), last unit first)
PARTIAL = [
    ("bottleneck", ["2.bn_weight"], []),
    ("bottleneck", ["2.bn_bias"], []),
    ("bottleneck", ["2.weight"], [(False, True)]),
    ("bottleneck", ["1.bn_weight"], [(True, False)]),
    ("bottleneck", ["1.weight", "2.bn_bias"], [(True, False), (False, True)]),
    ("bottleneck", ["0.weight"], [(True, False), (True, False), (False, True)]),
    ("bottleneck", ["x"], [(True, False), (True, False), (True, False)]),
    ("basic_projection", ["2.bn_weight"], []),
    ("basic_projection", ["2.weight"], [(False, True)]),
    ("basic_projection", ["1.weight", "2.bn_bias"], [(False, True)]),
    ("basic_projection", ["x"], [(True, False), (True, False), (True, False)]),
    ("resnet_d", ["3.weight"], [(False, True)]),
    ("resnet_d", ["x"], [(True, False)] * 4),
    ("option_a", ["1.bn_weight"], []),
    ("conv_residual", ["residual"], []),
    ("conv_residual", ["0.weight"], [(False, True)]),
    ("conv_residual", ["x"], [(True, False)]),
    ("no_conv_residual", ["residual"], []),
    ("no_conv_then_conv", ["0.bn_weight"], [(True, False)]),
    ("stem", ["0.weight"], [(False, True)]),
    ("stem_recompute", ["0.bn_bias"], []),
]


@pytest.mark.parametrize("mode", ["batch", "frozen"])
@pytest.mark.parametrize("shape, wanted, calls", PARTIAL, ids=[f"{s}-{'+'.join(w)}" for s, w, _ in PARTIAL])
def test_only_what_is_needed(
    backend: str, shape: str, wanted: list[str], calls: list[tuple[bool, bool]], mode: str, monkeypatch: Any
) -> None:
    """With few gradients wanted those are the same, and no convolution gradient is computed for the others."""
    chain = chains.make(shape, "silu", mode)
    t = chains.draw(chain)
    want = chains.run(chain, t)
    inputs = [
        None if v is None else v.detach().requires_grad_(name in wanted)
        for name, v in zip(chain.names, t.inputs, strict=True)
    ]
    counted = Calls(monkeypatch)
    call(chain, inputs)[0].backward(t.dout)
    for name, v in zip(chain.names, inputs, strict=True):
        if v is not None and name in wanted:
            torch.testing.assert_close(v.grad, want[f"d {name}"])
        elif v is not None:
            assert v.grad is None
    assert sorted(counted.conv_backward) == sorted(calls)


def test_unused_output_has_no_backward(backend: str) -> None:
    """The raw outputs and statistics that the operator also returns carry no gradient."""
    chain = chains.make("basic")
    outs = call(chain, leaves(chain, chains.draw(chain)))
    assert outs[0].requires_grad and not any(v.requires_grad for v in outs[1:])


# ------------------------------------------------------------------------------------------------------ torch.compile
@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block_inputs() -> tuple[Tensor, list[Unit]]:
    """A BasicBlock with a projection, conv bias and frozen middle unit: all that a traced call has to carry."""
    units = [unit(3, 4, stride=2), unit(4, 4, training=False, bias=torch.randn(4)), unit(3, 4, stride=2, act=None)]
    return torch.randn(5, 3, 8, 8, requires_grad=True), units


def copy_of(units: list[Unit]) -> list[Unit]:
    def tensor(v: Any) -> Any:
        return v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v

    return [Unit(**{k: tensor(v) for k, v in vars(u).items()}) for u in units]


def same(a: list[Unit], b: list[Unit]) -> None:
    """Running statistics and gradients are the same."""
    for u, v in zip(a, b, strict=True):
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(u, name), getattr(v, name))
        for name in ("weight", "bn_weight", "bn_bias"):
            torch.testing.assert_close(getattr(u, name).grad, getattr(v, name).grad)


def test_compile_residual_chain(backend: str, fresh_compiler: None) -> None:
    """fullgraph: a traced block has the eager one's output, gradients and running statistics, three steps long, and a
    second batch size runs without compiling again."""
    x, units = block_inputs()
    twins = copy_of(units)

    def block(x: Tensor, units: list[Unit]) -> Tensor:
        return functional.residual_chain(x, units[:2], shortcut=units[2])

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for step, images in enumerate((x, x.detach() + 1, torch.randn(7, 3, 8, 8))):
        eager, traced = images.detach().requires_grad_(), images.detach().requires_grad_()
        torch._dynamo.mark_dynamic(traced, 0)
        want = block(eager, units)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            got = compiled(traced, twins)
        want.square().sum().backward()
        got.square().sum().backward()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(traced.grad, eager.grad)
        same(units, twins)


def test_compile_conv_bn_act(backend: str, fresh_compiler: None) -> None:
    """fullgraph: a traced stem (channels_last, max-pool, recompute), training and inference, equals the eager one."""
    a = unit(3, 4)
    (b,) = copy_of([a])
    pool = functional.PoolSpec.make(3, 2, 1)
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)

    def stem(x: Tensor, u: Unit, training: bool) -> Tensor:
        tensors = (u.weight, u.bn_weight, u.bn_bias, u.running_mean, u.running_var)
        return functional.conv_bn_act(x, *tensors, padding=1, training=training, max_pool=pool, recompute=training)

    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")
    for u, f in ((a, stem), (b, compiled)):
        f(images, u, True).square().sum().backward()
    same([a], [b])
    with torch.no_grad():
        torch.testing.assert_close(compiled(images, b, False), stem(images, a, False))
