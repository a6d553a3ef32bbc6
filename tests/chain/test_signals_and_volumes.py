"""Chains of signals [N, C, L] and of volumes [N, C, D, H, W]."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import chains
import pytest
import torch
import torch.nn.functional as F
from chains import ACTS, LAYOUT_PAIRS, MODES, VOLUMES, call, in_layout
from functional_cases import BOTH, Case, image, same, unit
from tolerances import assert_as_good, assert_close

from fused_resnet import functional as fr
from fused_resnet.backends import ConvStats, loaded
from fused_resnet.functional import PoolSpec, Unit

NAMES = list(ACTS)


# ------------------------------------------------------------------------------------------------ volumes
@pytest.mark.parametrize("shape", VOLUMES)
def test_volumes_have_the_same_numbers(backend: str, shape: str) -> None:
    """Output, statistics and every gradient are the reference's, for every shape x BatchNorm mode in every layout."""
    for i, mode in enumerate(MODES):
        act = NAMES[(i + VOLUMES.index(shape)) % len(NAMES)]
        chain = chains.make(shape, act, mode, width=2, batch=2, size=(3, 5, 4))
        drawn = chains.draw(chain).map(lambda v: v.float().double())
        want = chains.truth(chain, drawn)
        for layout, dtype in itertools.product(LAYOUT_PAIRS, (torch.float64, torch.float32)):
            t = in_layout(chain, drawn, dtype, layout)
            got = chains.run(chain, t)
            for name in want:
                assert_close(f"{act}, {mode}, {layout}: {name}", got[name], want[name], chains.reduction(chain))
            if chain.spec.frozen:
                out = torch.ops.fused_resnet.chain_inference(t.x, t.residual, t.params, chain.text)
                assert_close("inference", out, want["out"], chains.reduction(chain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("mode", ["batch", "frozen"])
def test_volumes_in_16_bits_are_as_good_as_plain(backend: str, mode: str, dtype: torch.dtype) -> None:
    chain = chains.make("basic_projection", "silu", mode, 16, 2, (4, 6, 5))
    t = in_layout(chain, chains.draw(chain), dtype, "nhwc")
    want, plain, got = chains.truth(chain, t), chains.run(chain, t, chains.plain), chains.run(chain, t)
    for name in want:
        assert_as_good(name, [got[name]], [plain[name]], [want[name]], dtype)


@pytest.mark.parametrize("size", [(1, 9, 10), (2, 9, 10), (5, 8, 8)], ids=str)
def test_volumes_where_sizes_decide(backend: str, size: tuple[int, int, int]) -> None:
    """Wide convolutions, which the CPU backend computes by Winograd's algorithm; kernels deeper than the volume."""
    for shape, mode in (("basic", "batch"), ("bottleneck_projection", "mixed"), ("conv_residual", "frozen")):
        chain = chains.make(shape, "silu", mode, 64, 2, size)
        t = in_layout(chain, chains.draw(chain), torch.float32, "nhwc")
        want, got = chains.truth(chain, t), chains.run(chain, t)
        for name in want:
            assert_close(f"{shape}: {name}", got[name], want[name], chains.reduction(chain))
        if shape == "basic" and backend == "cpu" and size[0] > 1:
            conv, weight = chain.spec.units[0].conv, t.params[0]
            assert conv is not None
            assert loaded("cpu").algorithm(ConvStats, t.x, weight, conv, False) == "winograd"


@pytest.mark.parametrize("shape", ["conv", "no_conv_residual", "bottleneck_projection", "option_a", "resnet_d"])
def test_gradcheck_of_volumes(shape: str) -> None:
    """Each shape with some activations, in three modes."""
    for mode, act in zip(("batch", "frozen", "batch-no_affine", "mixed"), itertools.cycle(("silu", "elu", "relu"))):
        chain = chains.make(shape, act, mode, width=2, batch=2, size=(2, 3, 2))
        inputs = chains.leaves(chain, chains.draw(chain))
        given = [v for v in inputs if v is not None and v.requires_grad]

        def first(*_: Any, chain: Any = chain, inputs: Any = inputs) -> Any:
            return call(chain, inputs)[0]

        assert torch.autograd.gradcheck(first, given, atol=1e-5), (shape, mode)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_the_operator_describes_volumes(layout: str) -> None:
    """The fake kernels give the sizes and the layouts of the real ones."""
    for shape in ("conv", "bottleneck_projection", "option_a", "resnet_d"):
        chain = chains.make(shape, "relu", "batch", 2, 2, (3, 4, 5))
        t = in_layout(chain, chains.draw(chain), torch.float32, layout)
        torch.library.opcheck(
            torch.ops.fused_resnet.chain, (t.x, t.residual, t.params, chain.text), test_utils=chains.EVERYTHING[:3]
        )


# ------------------------------------------------------------------------------------------------ the functional API
SIZES = {1: (9,), 2: (6, 5), 3: (4, 5, 3)}
DIMS = pytest.mark.parametrize("dims", SIZES)


def _unit(dims: int, cin: int | None, cout: int, kernel: int = 3, **options: Any) -> Unit:
    return unit(cin, cout, (kernel,) * dims, **options)


@BOTH
@DIMS
def test_units_of_all_dimensions(backend: str, dims: int, training: bool) -> None:
    """One unit with each of its hyper-parameters, as numbers and as tuples, equals PyTorch's functions."""
    size = SIZES[dims]
    for options in ({}, {"stride": 2}, {"stride": (2,) * dims, "dilation": (2,) * dims, "padding": 2}, {"groups": 2},
                    {"padding": "same"}, {"padding": "valid", "bias": torch.randn(6).requires_grad_()}):  # fmt: skip
        same(Case(image(3, 4, *size), [_unit(dims, 4, 6, training=training, **options)]))
    same(Case(image(3, 4, *size), [_unit(dims, None, 4, training=training)], residual=image(3, 4, *size)))


@BOTH
@DIMS
def test_blocks_of_all_dimensions(backend: str, dims: int, training: bool) -> None:
    """A bottleneck with an identity, a projection and a residual."""
    size = SIZES[dims]

    def block(**options: Any) -> list[Unit]:
        units = ((4, 3, 1), (3, 3, 3), (3, 4, 1))
        return [_unit(dims, *u, training=training, **(options if u[2] == 3 else {})) for u in units]

    same(Case(image(3, 4, *size), block(), shortcut="identity"))
    projection = _unit(dims, 4, 4, 1, stride=2, act=None, training=training)
    same(Case(image(3, 4, *size), block(stride=2), shortcut=projection))
    same(Case(image(3, 4, *size), block(), residual=image(3, 4, *size)))


@DIMS
def test_stems_of_all_dimensions(backend: str, dims: int) -> None:
    pool = PoolSpec.make(3, 2, 1, dims=dims)
    for recompute in (False, True):
        same(Case(image(3, 4, *(2 * n for n in SIZES[dims])), [_unit(dims, 4, 6)], max_pool=pool, recompute=recompute))


@pytest.mark.parametrize("dims", [1, 3])
def test_shortcuts_of_options_a_and_d(backend: str, dims: int) -> None:
    """The paper's option A, and ResNet-D's average pool, over signals and volumes."""
    x = image(2, 4, *(2 * n for n in SIZES[dims]))
    units = [_unit(dims, 4, 6, stride=2), _unit(dims, 6, 6)]
    average = {1: F.avg_pool1d, 3: F.avg_pool3d}[dims]
    conv = {1: F.conv1d, 3: F.conv3d}[dims]

    def branch(units: list[Unit]) -> torch.Tensor:
        h = x
        for u in units:
            h = conv(h, u.weight, None, u.stride, u.padding)
            h = F.batch_norm(h, None, None, u.bn_weight, u.bn_bias, True, 0.0, u.eps)
            h = F.silu(h) if u is units[0] else h
        return h

    plain = [replace(u, running_mean=None, running_var=None) for u in units]
    strided = x[(slice(None), slice(None), *[slice(None, None, 2)] * dims)]
    padded = F.pad(strided, [0, 0] * dims + [0, 2])
    got = fr.residual_chain(x, plain, shortcut="pad", shortcut_stride=2)
    assert_close("option A", got, F.silu(branch(plain) + padded), 4 * 3**dims)
    projection = _unit(dims, 4, 6, 1, act=None, running_mean=None, running_var=None)
    pool = PoolSpec.make(2, 2, ceil_mode=True, count_include_pad=False, dims=dims)
    pooled = conv(average(x, 2, 2, 0, True, False), projection.weight)
    pooled = F.batch_norm(pooled, None, None, projection.bn_weight, projection.bn_bias, True, 0.0, 1e-5)
    got = fr.residual_chain(x, plain, shortcut=projection, shortcut_pool=pool)
    assert_close("ResNet-D", got, F.silu(branch(plain) + pooled), 4 * 3**dims)


@pytest.mark.parametrize("dims", [1, 3])
def test_gradcheck_of_all_dimensions(dims: int) -> None:
    """Each activation in training, with running statistics, and double backward."""
    for i, act in enumerate(ACTS):
        training = i % 2 == 0
        x = image(2, 2, *(3,) * dims, dtype=torch.float64)
        u = _unit(dims, 2, 2, act=ACTS[act], training=training)
        u = Unit(**{n: v.detach().double() if isinstance(v, torch.Tensor) else v for n, v in vars(u).items()})
        learnt = [t.requires_grad_() for t in (u.weight, u.bn_weight, u.bn_bias)]  # type: ignore[union-attr]

        def run(x: torch.Tensor, *_: Any, u: Unit = u) -> torch.Tensor:
            v = replace(u, running_mean=None, running_var=None) if u.training else u
            return fr.residual_chain(x, [v], shortcut="identity")

        assert torch.autograd.gradcheck(run, (x, *learnt), atol=1e-5), act
        if act == "silu":
            assert torch.autograd.gradgradcheck(run, (x, *learnt), atol=1e-4)


@DIMS
def test_empty_and_single_inputs(dims: int) -> None:
    """An empty batch passes, one value per channel is an error in training."""
    u = _unit(dims, 4, 6, 1)
    assert fr.residual_chain(torch.empty(0, 4, *SIZES[dims]), [u], shortcut=None).shape == (0, 6, *SIZES[dims])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fr.residual_chain(torch.ones(1, 4, *[1] * dims), [u], shortcut=None)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((2, 4, 9), (6, 4, 3, 3), r"weight: expected 3 dimensions .*got shape \(6, 4, 3, 3\)"),
        ((2, 4, 9, 9), (6, 4, 3), r"weight: expected 4 dimensions .*got shape \(6, 4, 3\)"),
        ((2, 4, 5, 9, 9), (6, 4, 3, 3), r"weight: expected 5 dimensions .*kD, kH, kW.*got shape \(6, 4, 3, 3\)"),
        ((2, 4), (6, 4, 3), r"x: expected 4 dimensions .*got shape \(2, 4\)"),
        ((2, 4, 3, 3, 3, 3), (6, 4, 3, 3, 3), r"x: expected 4 dimensions .*5 \[N, C, D, H, W\]"),
        ((2, 5, 9), (6, 4, 3), r"weight: expected 5 input channels"),
    ],
)
def test_dimensions_that_do_not_fit(x: Any, weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fr.conv_bn_act(torch.randn(x), torch.randn(weight), torch.ones(6), torch.zeros(6), training=True)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("dims", [1, 3])
def test_numbers_that_do_not_fit(dims: int, name: str) -> None:
    """As many numbers as the images have dimensions, or one."""
    x, w = torch.randn(2, 4, *SIZES[dims]), torch.randn(6, 4, *[1] * dims)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        fr.conv_bn_act(x, w, training=True, **{name: (1, 1)})
    with pytest.raises(TypeError, match=f"{name}: expected"):
        fr.conv_bn_act(x, w, training=True, **{name: 1.5})


def test_signals_keep_their_memory() -> None:
    """The output is dense like PyTorch's, the weight's gradient has the weight's shape."""
    x, u = image(3, 4, 9), _unit(1, 4, 6)
    out = fr.residual_chain(x, [u], shortcut=None)
    assert out.is_contiguous() and out.shape == (3, 6, 9)
    out.sum().backward()
    assert u.weight is not None and u.weight.grad is not None and u.weight.grad.shape == u.weight.shape
    assert math.isfinite(u.weight.grad.sum())
