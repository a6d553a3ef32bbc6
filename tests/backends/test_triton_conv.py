"""The Triton convolutions against aten in float64: in the interpreter on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

import pytest
import torch
from primitives import Positional, aten
from tolerances import assert_as_good, assert_close
from torch import Tensor

from fused_resnet import functional
from fused_resnet.backends import DyCoefficients, Norm, Prologue, allow_tf32, use_backend
from fused_resnet.base.arguments import integers
from fused_resnet.spec import ACTIVATIONS, Act, ConvSpec

pytest.importorskip("triton", reason="needs Triton")

from fused_resnet.backends.triton import configs, runtime  # noqa: E402
from fused_resnet.backends.triton import conv as conv_module  # noqa: E402

if not runtime.INTERPRET and not torch.cuda.is_available():
    pytest.skip("needs a GPU or Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

DEVICE = "cpu" if runtime.INTERPRET else "cuda"
conv = Positional(conv_module)
# Small tiles: several of them along every axis of a tiny problem, with rests, and several steps of every sum.
SMALL = configs.Config(32, 32, 32, num_warps=4, num_stages=2)
SMALL_WGRAD = configs.Config(32, 64, 16, num_warps=4, num_stages=2, splits=2)


@dataclass(frozen=True)
class Shape:
    """One convolution, and what goes with it (pairwise, not the full product)."""

    c: int
    k: int
    kernel: int | tuple[int, int] = 1
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    n: int = 1
    h: int = 6
    w: int = 5
    act: str = "relu"
    frozen: bool = False

    @property
    def conv(self) -> ConvSpec:
        return ConvSpec(*(integers(v, "", 0) for v in (self.stride, self.padding, self.dilation)))

    def __str__(self) -> str:
        kernel, stride, padding, dilation = (
            "x".join(map(str, integers(v, "", 0))) for v in (self.kernel, self.stride, self.padding, self.dilation)
        )
        return f"{self.c}-{self.k}-k{kernel}-s{stride}-p{padding}-d{dilation}-{self.n}x{self.h}x{self.w}-{self.act}"


SHAPES = [
    Shape(64, 24, n=3, h=5, w=4, act="relu"),
    Shape(8, 65, act="silu", frozen=True),
    Shape(65, 8, stride=2, n=3, h=7, w=7, act="hardswish"),
    Shape(32, 16, stride=2, h=6, w=8, act="identity", frozen=True),
    Shape(32, 32, 3, padding=1, h=7, w=6, act="leaky_relu"),
    Shape(24, 64, 3, padding=1, n=3, h=3, w=4, act="relu6"),
    Shape(64, 32, 3, stride=2, padding=1, h=7, w=6, act="relu"),
    Shape(8, 24, 3, stride=2, padding=1, n=3, h=5, w=5, act="elu", frozen=True),
    Shape(16, 16, 3, padding=2, dilation=2, h=6, w=5, act="sigmoid"),
    Shape(8, 8, 3, stride=2, padding=2, dilation=2, h=7, w=6, act="silu"),
    Shape(3, 16, 7, stride=2, padding=3, h=11, w=9, act="relu"),
    Shape(3, 8, 3, padding=1, n=3, act="hardswish", frozen=True),
    Shape(16, 8, (1, 3), (2, 1), (0, 1), (1, 2), h=5, w=6, act="relu"),
    Shape(8, 16, 2, stride=2, h=7, w=7, act="leaky_relu"),  # the last row and column reach no output
    Shape(16, 16, 1, stride=3, padding=1, h=7, w=5, act="elu"),  # most pixels reach no output
    Shape(1, 1, 3, padding=1, n=3, act="relu"),
]
DTYPES = [torch.float32, torch.bfloat16]
both = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and workspaces are NaN until a kernel writes them."""
    for owner, name in ((torch, "empty"), (Tensor, "new_empty")):
        real = getattr(owner, name)

        def empty(*args: object, real: object = real, **kwargs: object) -> Tensor:
            t = real(*args, **kwargs)  # type: ignore[operator]
            return t.fill_(float("nan")) if t.is_floating_point() and t.device.type != "meta" else t

        monkeypatch.setattr(owner, name, empty)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def small() -> Iterator[None]:
    with configs.use(fprop=SMALL, dgrad=SMALL, wgrad=SMALL_WGRAD):
        yield


def image(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """mean != 0, var != 1, NHWC."""
    t = (torch.randn(n, c, h, w) * 1.5 + 0.7).to(DEVICE, dtype)
    return t.contiguous(memory_format=torch.channels_last)


def norm(c: int) -> Norm:
    """scale of both signs."""
    return Norm(*(torch.randn(c, device=DEVICE) for _ in range(4)))


def coefficients(k: int, frozen: bool) -> DyCoefficients:
    a, b, c, center = (torch.randn(k, device=DEVICE) for _ in range(4))
    return DyCoefficients(a, None, None, center) if frozen else DyCoefficients(a, b, c, center)


def inputs(s: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, and a float32 weight as a model keeps it."""
    kernel = integers(s.kernel, "", 1)
    weight = torch.randn(s.k, s.c, *kernel, device=DEVICE) / (s.c * math.prod(kernel)) ** 0.5
    return image(s.n, s.c, s.h, s.w, dtype), weight


def double(value: object) -> object:
    """The same in float64, tuples of tensors too."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(double, value))
    return value


def compare(got: object, plain: object, truth: object, reduction: int, dtype: torch.dtype, name: str) -> None:
    """A primitive's results, None, tensors or Sums: float32 by the tolerance, bfloat16 by plain PyTorch's error."""
    if truth is None or got is None:
        assert got is None and truth is None, name
    elif isinstance(truth, tuple):
        for i, parts in zip(count(), zip(got, plain, truth, strict=True)):  # type: ignore[call-overload]
            compare(*parts, reduction, dtype, f"{name}[{i}]")
    else:
        assert isinstance(got, Tensor) and isinstance(plain, Tensor) and isinstance(truth, Tensor)
        assert got.dtype == plain.dtype, name
        if dtype == torch.float32:
            assert_close(name, got, truth, reduction)
        else:
            assert_as_good(name, [got], [plain], [truth], dtype)


def check(primitive: str, args: tuple[object, ...], reduction: int, dtype: torch.dtype) -> tuple[object, ...]:
    """Runs it here, by aten in the same dtype, and by aten in float64."""
    got = getattr(conv, primitive)(*args)
    plain = getattr(aten, primitive)(*args)
    truth = getattr(aten, primitive)(*map(double, args))
    compare(got, plain, truth, reduction, dtype, primitive)
    return got


# ------------------------------------------------------------------------------------------------------------- fprop
@both
@shapes
def test_conv_bias_act(shape: Shape, dtype: torch.dtype, small: None) -> None:
    x, weight = inputs(shape, dtype)
    act = Act.make(shape.act)
    bias = torch.randn(shape.k, device=DEVICE)
    y = aten.conv_bias_act(x, weight, None, shape.conv, Act("identity"), None)
    reduction = weight[0].numel()
    check("conv_bias_act", (x, weight, bias, shape.conv, act, image(*y.shape, dtype)), reduction, dtype)
    check("conv_bias_act", (x, weight, None if shape.frozen else bias, shape.conv, act, None), reduction, dtype)


@both
@shapes
def test_conv_stats(shape: Shape, dtype: torch.dtype, small: None) -> None:
    x, weight = inputs(shape, dtype)
    for prologue in (None, Prologue(norm(shape.c), Act.make(shape.act))):
        y, mean, var = check("conv_stats", (x, weight, shape.conv, prologue, True), weight[0].numel(), dtype)
        assert isinstance(y, Tensor) and isinstance(mean, Tensor) and isinstance(var, Tensor)
        # of y as it is stored, which is what BatchNorm sees
        want_mean, want_var = aten.bn_stats(y.double())
        assert mean.dtype == var.dtype == torch.float32
        assert_close("mean", mean, want_mean, y.numel() // shape.k)
        assert_close("var", var, want_var, y.numel() // shape.k)
        again = conv.conv_stats(x, weight, shape.conv, prologue, False)
        assert again[1] is None and again[2] is None and torch.equal(again[0], y)


@both
def test_statistics_where_mean_is_much_larger_than_std(dtype: torch.dtype, small: None) -> None:
    x, weight = inputs(Shape(16, 24, 3, padding=0, n=3, h=7, w=6), dtype)
    x = (x * 1e-3 + 1).to(dtype)
    y, mean, var = conv.conv_stats(x, weight.abs(), ConvSpec(), None, True)
    want_mean, want_var = aten.bn_stats(y.double())
    assert mean is not None and var is not None
    torch.testing.assert_close(mean.double(), want_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), want_var, rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_not_a_number_goes_where_pytorch_sends_it(small: None) -> None:
    s = Shape(16, 8, 3, padding=1, n=3, h=3, w=4)
    x, weight = inputs(s, torch.float32)
    x[0, 3, 1, 1], x[1, 5, 0, 0], x[2, 0, 2, 3] = float("nan"), float("inf"), -float("inf")
    for name in ACTIVATIONS:
        act = Act.make(name)
        for primitive, args in (
            ("conv_bias_act", (x, weight, None, s.conv, act, None)),
            ("conv_stats", (x, weight, s.conv, Prologue(norm(16), act), False)),
        ):
            got, want = getattr(conv, primitive)(*args), getattr(aten, primitive)(*args)
            got, want = (t[0] if isinstance(t, tuple) else t for t in (got, want))
            assert torch.equal(got.isnan(), want.isnan()), f"{primitive} {name}"
    coef, dz = coefficients(8, False), image(3, 8, 3, 4, torch.float32)
    for name in ACTIVATIONS:
        args = (dz, dz, coef, x, Prologue(norm(16), Act.make(name)), weight, s.conv, True, True, None)
        got, want = conv.conv_backward(*args), aten.conv_backward(*args)
        assert torch.equal(got[0].isnan(), want[0].isnan()), name
        assert torch.equal(got[1].isnan(), want[1].isnan()), name
        assert torch.equal(got[2].dz_y.isnan(), want[2].dz_y.isnan()), name


# ------------------------------------------------------------------------------------------------------------- backward
@both
@shapes
def test_conv_backward(shape: Shape, dtype: torch.dtype, small: None) -> None:
    """With a prologue: the previous unit's dz and sums. Without: alone, and added to another path's gradient."""
    x, weight = inputs(shape, dtype)
    y = aten.conv_stats(x, weight, shape.conv, None, False)[0].contiguous(memory_format=torch.channels_last)
    dz = image(*y.shape, dtype)
    coef = coefficients(shape.k, shape.frozen)
    reduction = max(weight[:, 0].numel(), y[:, 0].numel(), x[:, 0].numel())
    prologue = Prologue(norm(shape.c), Act.make(shape.act))
    rest = (weight, shape.conv, True, True)
    got = check("conv_backward", (dz, y, coef, x, prologue, *rest, None), reduction, dtype)
    assert got[1].dtype == torch.float32 and got[1].is_contiguous(memory_format=torch.channels_last)
    add = image(*x.shape, dtype)
    plain = aten.conv_backward(dz, y, coef, x, None, *rest, add)
    truth = aten.conv_backward(*map(double, (dz, y, coef, x, None, *rest, add)))  # type: ignore[arg-type]
    got = conv.conv_backward(dz, y, coef, x, None, *rest, add)
    compare(got, plain, truth, reduction, dtype, "add")
    assert got[0].data_ptr() == add.data_ptr()


@both
def test_conv_backward_of_what_is_asked(dtype: torch.dtype, small: None) -> None:
    s = Shape(16, 16, 3, padding=1, n=3)
    x, weight = inputs(s, dtype)
    dz, y, coef = image(3, 16, 6, 5, dtype), image(3, 16, 6, 5, dtype), coefficients(16, False)

    def run(need_input: bool, need_weight: bool, add: Tensor | None) -> tuple[object, ...]:
        args = (dz, y, coef, x, None, weight, s.conv, need_input, need_weight, add)
        return check("conv_backward", args, 16 * 9, dtype)

    run(True, False, None)
    run(False, True, None)
    assert run(False, False, None) == (None, None, None, None)
    # dz itself is never overwritten, nor a tensor of another dtype
    before = dz.clone()
    run(True, True, dz)
    assert torch.equal(dz, before)
    other = torch.float16 if dtype == torch.float32 else torch.float32
    add = image(3, 16, 6, 5, other)
    before = add.clone()
    dx = conv.conv_backward(dz, y, coef, x, None, weight, s.conv, True, False, add)[0]
    alone = conv.conv_backward(dz, y, coef, x, None, weight, s.conv, True, False, None)[0]
    assert dx is not None and alone is not None and dx.dtype == dtype and torch.equal(add, before)
    torch.testing.assert_close(dx.float(), alone.float() + add.float(), rtol=0.02, atol=0.05)


def test_weight_gradient_in_the_weights_dtype(small: None) -> None:
    s = Shape(16, 24, 3, padding=1)
    x, weight = inputs(s, torch.bfloat16)
    dz, y = (image(1, 24, 6, 5, torch.bfloat16) for _ in range(2))
    coef = coefficients(24, False)
    for one in (weight, weight.bfloat16()):
        dw = conv.conv_backward(dz, y, coef, x, None, one, s.conv, False, True, None)[1]
        assert dw is not None and dw.dtype == one.dtype and dw.stride() == (144, 1, 48, 16)


# ------------------------------------------------------------------------------------------------------------- the rest
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[6], SHAPES[10]], ids=str)
def test_offsets_of_64_bits(shape: Shape, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(shape, torch.float32)
    prologue = Prologue(norm(shape.c), Act())

    def run() -> list[Tensor]:
        y, mean, var = conv.conv_stats(x, weight, shape.conv, prologue, True)
        dx, dw, sums, _ = conv.conv_backward(y, y, coef, x, prologue, weight, shape.conv, True, True, None)
        return [y, mean, var, dx, dw, *sums]

    coef = coefficients(shape.k, False)
    narrow = run()
    monkeypatch.setattr(runtime, "_WIDE", 0)
    assert all(map(torch.equal, narrow, run()))


@both
def test_no_images(dtype: torch.dtype) -> None:
    for s in (Shape(8, 16, 3, stride=2, padding=1, n=0), Shape(8, 16, n=0)):
        x, weight = inputs(s, dtype)
        y, mean, var = conv.conv_stats(x, weight, s.conv, None, True)
        assert y.shape[:2] == (0, 16) and mean is not None and mean.isnan().all() and var is not None
        assert conv.conv_bias_act(x, weight, None, s.conv, Act(), None).shape == y.shape
        prologue = Prologue(norm(8), Act())
        dx, dw, sums, _ = conv.conv_backward(
            y, y, coefficients(16, False), x, prologue, weight, s.conv, True, True, None
        )
        assert dx is not None and dx.shape == x.shape and dw is not None and not dw.any()
        assert sums is not None and not sums.dz.any() and not sums.dz_y.any()


def test_any_layout_comes_and_nhwc_goes(small: None) -> None:
    s = Shape(8, 16, 3, padding=1)
    x, weight = inputs(s, torch.float32)
    want = conv.conv_stats(x, weight, s.conv, None, False)[0]
    for other in (x.contiguous(), x[:, :, ::1].expand(1, 8, 6, 5), torch.cat([x, x], 1)[:, :8]):
        y = conv.conv_stats(other, weight, s.conv, None, False)[0]
        assert torch.equal(y, want) and y.stride()[1] == 1


def test_every_candidate_gives_the_right_numbers() -> None:
    s = Shape(64, 72, padding=1, n=1)
    x, weight = inputs(s, torch.float32)
    prologue = Prologue(norm(64), Act())
    dz = image(1, 72, 8, 7, torch.float32)
    backward = (dz, dz, coefficients(72, False), x, prologue, weight, s.conv)
    for kind, m, n, k, c in (("fprop", 56, 72, 64, 64), ("dgrad", 30, 64, 72, 72), ("wgrad", 72, 64, 56, 64)):
        problem = configs.Problem(kind, m, n, k, c, 2, False, True)
        found = configs.candidates(problem, configs.TARGETS["sm_90"])
        assert len(found) > 1
        for config in found:
            with configs.use(**{kind: config}):
                if kind == "fprop":
                    check("conv_stats", (x, weight, s.conv, prologue, True), 64, torch.float32)
                else:
                    check("conv_backward", (*backward, kind == "dgrad", kind == "wgrad", None), 72, torch.float32)


@pytest.mark.parametrize("splits", [3, 100])
def test_sum_over_many_splits(splits: int, small: None) -> None:
    """More parts than one tile of the reduction holds, a rest in each direction."""
    s = Shape(3, 5, n=1, h=40, w=41)
    x, weight = inputs(s, torch.float32)
    dz = image(1, 5, 40, 41, torch.float32)
    with configs.use(wgrad=replace(SMALL_WGRAD, splits=splits)):
        check("conv_backward", (dz, dz, coefficients(5, False), x, None, weight, s.conv, False, True, None), 1640,
              torch.float32)  # fmt: skip


def test_a_block_by_these_kernels_alone(small: None) -> None:
    """Through the public API: stride 2, a projection, batch statistics; against plain PyTorch's gradients."""
    units = [
        functional.Unit(
            torch.randn(16, 8, 3, 3) / 8, torch.randn(16), torch.randn(16), stride=2, padding=1, training=True
        ),
        functional.Unit(torch.randn(16, 16, 3, 3) / 12, torch.randn(16), torch.randn(16), padding=1, training=True),
    ]
    projection = functional.Unit(
        torch.randn(16, 8, 1, 1) / 3, torch.randn(16), torch.randn(16), stride=2, act=None, training=True
    )
    x = image(2, 8, 6, 5, torch.float32)
    results = []
    for name in ("triton", "aten"):
        leaves = [x.clone().requires_grad_(), *(u.weight.clone().requires_grad_() for u in (*units, projection))]
        mine = [replace(u, weight=w) for u, w in zip((*units, projection), leaves[1:], strict=True)]
        with use_backend(name):
            out = functional.residual_chain(leaves[0], mine[:2], shortcut=mine[2])
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert_close(str(i), got, want, 144)


def test_meta_tensors_are_counted_and_nothing_runs() -> None:
    """Bytes by hand: a 1x1 convolution with a prologue, and one with stride 2, which skips three quarters of x."""
    s = Shape(64, 128, n=256, h=56, w=56)
    x = torch.empty(s.n, s.c, s.h, s.w, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty(s.k, s.c, 1, 1, device="meta")
    prologue = Prologue(Norm(*torch.empty(4, s.c, device="meta")), Act())
    with runtime.traffic() as record:
        y, mean, var = conv.conv_stats(x, weight, s.conv, prologue, True)
    assert y.shape == (256, 128, 56, 56) and mean is not None and mean.shape == var.shape == (128,)
    first = record.launches[0]
    assert first.kernel == "conv_fprop_kernel"
    assert first.read == 2 * x.numel() + 2 * weight.numel() + 8 * 64
    tiles = 256 * 56 * 56 // configs.choose("fprop", 256 * 56 * 56, 128, 64, 64, x, tf32=False, formed=True).block_m
    assert first.written == 2 * y.numel() + 8 * tiles * 128
    coef = DyCoefficients(*torch.empty(4, s.k, device="meta"))
    with runtime.traffic() as record:
        dx, dw, sums, _ = conv.conv_backward(y, y, coef, x, prologue, weight, s.conv, True, True, None)
    assert dx.shape == x.shape and dw.shape == weight.shape and sums.dz.shape == (64,)
    dgrad = next(one for one in record.launches if one.kernel == "conv_dgrad_kernel")
    assert dgrad.read == 4 * y.numel() + 2 * weight.numel() + 2 * x.numel()
    with runtime.traffic() as record:
        conv.conv_stats(x, weight, replace(s, stride=2).conv, None, False)
    assert record.launches[0].read == 2 * x.numel() // 4 + 2 * weight.numel()


def test_tf32_follows_pytorchs_setting() -> None:
    assert not allow_tf32(torch.float32)
    torch.backends.cudnn.allow_tf32 = True
    assert allow_tf32(torch.float32) and not allow_tf32(torch.bfloat16)
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert not allow_tf32(torch.float32)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_same_bits_run_after_run() -> None:
    s = SHAPES[6]
    x, weight = inputs(s, torch.bfloat16)
    y = image(1, 32, 4, 4, torch.bfloat16)
    args = (y, y, coefficients(32, False), x, Prologue(norm(64), Act()), weight, s.conv, True, True, None)
    first, second = conv.conv_backward(*args), conv.conv_backward(*args)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(map(torch.equal, first[2], second[2]))
