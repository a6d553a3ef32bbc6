"""What PyTorch is promised of the chain's operators: schemas, shapes, strides, one graph under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chains
import pytest
import torch
from chains import EVERYTHING, LAYOUT_PAIRS, call, in_layout, leaves
from functional_cases import unit
from tolerances import assert_close
from torch import Tensor

from fused_resnet import functional
from fused_resnet.functional import Unit
from fused_resnet.spec import Act, ChainSpec, ConvSpec, ShortcutSpec, UnitSpec

ops = torch.ops.fused_resnet
SHAPES = list(chains.SHAPES)


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


def opcheck(chain: chains.Chain, t: chains.Tensors, tests: tuple[str, ...]) -> None:
    """torch.library.opcheck of the operators that take this chain."""

    def check(op: Any, *args: Any) -> None:
        result = torch.library.opcheck(op.default, args, test_utils=tests)
        assert result == dict.fromkeys(tests, "SUCCESS")

    x, residual, *params = leaves(chain, t)
    check(ops.chain, x, residual, params, chain.text)
    x, residual, params = t.x, t.residual, t.params
    saved = call(chain, [x, residual, *params])[1:]
    weights = chains.weights(chain.spec, params)
    check(ops.chain_backward, t.dout, x, residual, weights, saved, chain.text, chains.learnable(chain))
    if chain.spec.frozen:
        check(ops.chain_inference, x, residual, params, chain.text)


@pytest.mark.parametrize("case", OPCHECKED, ids="-".join)
def test_opcheck(backend: str, case: tuple[str, str, str]) -> None:
    """Schema, fake kernel and autograd registration of each operator hold: shapes, strides, no alias, traceable.

    The operators are the same whichever backend runs: each has one layout here, and all in ``test_fake_kernels``.
    """
    chain = chains.make(*case)
    t = in_layout(chain, chains.draw(chain), torch.float32, "nchw" if backend == "aten" else "nhwc")
    opcheck(chain, t, EVERYTHING)


@pytest.mark.parametrize("layout", LAYOUT_PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fake_kernels(backend: str, shape: str, layout: str) -> None:
    """Without running, the operators foretell shapes, dtypes, strides and that nothing shares memory."""
    low, full = torch.bfloat16, torch.float32
    for act, mode, dtype in [
        ("relu", "batch", full), ("relu", "batch", low), ("identity", "frozen", low), ("identity", "mixed", full)
    ]:  # fmt: skip
        chain = chains.make(shape, act, mode, width=2, size=(6, 5))
        t = in_layout(chain, chains.draw(chain, margin=0), dtype, layout)
        opcheck(chain, t, ("test_faketensor",))


AMBIGUOUS = {
    "one_channel": ((2, 1, 5, 4), 1, (3, 3)),
    "one_pixel": ((3, 4, 1, 1), 4, (3, 3)),
    "one_pixel_1x1": ((3, 4, 1, 1), 4, (1, 1)),
    "one_everything": ((3, 1, 1, 1), 1, (1, 1)),
}


@pytest.mark.parametrize("layout", LAYOUT_PAIRS)
@pytest.mark.parametrize("sizes", AMBIGUOUS)
def test_layout_of_size_one(backend: str, sizes: str, layout: str) -> None:
    """Where sizes of 1 leave the layout open, the fake kernel's strides are the real ones and the values right."""
    x_shape, channels, kernel = AMBIGUOUS[sizes]
    conv = ConvSpec(padding=(kernel[0] // 2, kernel[1] // 2))
    unit = UnitSpec(conv, Act("silu"))
    spec = ChainSpec((unit, unit), ShortcutSpec())
    shapes = [("weight", (5, channels, *kernel)), ("bn_weight", (5,)), ("bn_bias", (5,))]
    shapes += [("weight", (1, 5, *kernel)), ("bn_weight", (1,)), ("bn_bias", (1,))]
    chain = chains.Chain(spec, x_shape, None, tuple(shapes))
    t = in_layout(chain, chains.draw(chain), torch.float64, layout)
    want, got = chains.truth(chain, t), chains.run(chain, t)
    for name in want:
        assert_close(name, got[name], want[name], chains.reduction(chain))
    opcheck(chain, t, ("test_faketensor",))


@pytest.mark.parametrize("layout", LAYOUT_PAIRS)
@pytest.mark.parametrize("sizes", AMBIGUOUS)
def test_layout_of_size_one_in_inference(backend: str, sizes: str, layout: str) -> None:
    """As above for ``chain_inference``: a grey image is dense in both layouts, its output has the one of the fake."""
    x_shape, channels, kernel = AMBIGUOUS[sizes]
    unit = UnitSpec(ConvSpec(padding=(kernel[0] // 2, kernel[1] // 2)), Act("silu"), 1e-5, False)
    for k in (5, 1):
        shapes = tuple((n, (k, channels, *kernel) if n == "weight" else (k,)) for n in unit.param_names)
        chain = chains.Chain(ChainSpec((unit,), ShortcutSpec()), x_shape, None, shapes)
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


# ------------------------------------------------------------------------------------------------------ torch.compile
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
