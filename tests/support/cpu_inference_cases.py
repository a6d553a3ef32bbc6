"""The convolutions that the CPU backend has of its own for frozen models, beside PyTorch's."""

from __future__ import annotations

import torch
from primitives import aten, cpu, image
from torch import Tensor

from fused_resnet.backends import ConvBiasAct, Packed
from fused_resnet.spec import ACTIVATIONS, Act, ConvSpec, PoolSpec


def worst(got: tuple[object, ...], want: tuple[object, ...]) -> float:
    """The largest relative error (norm) over the tensors of two results."""
    errors = [0.0]
    for g, w in zip(got, want, strict=True):
        if isinstance(g, Tensor) and isinstance(w, Tensor):
            errors.append(float((g.double() - w.double()).norm() / w.double().norm().clamp_min(1e-6)))
        elif isinstance(g, tuple) and isinstance(w, tuple):
            errors.append(worst(g, w))
    return max(errors)


# input and output channels, kernel, image, convolution: several blocks of rows, groups of panels and slices of depth;
# parts of tiles and of panels; patches that lie outside the image
PRODUCTS = (
    (64, 64, (1, 1), (9, 5), ConvSpec()),
    (24, 65, (1, 1), (20, 31), ConvSpec()),
    (3, 1, (1, 1), (1, 1), ConvSpec()),
    (300, 40, (1, 1), (9, 9), ConvSpec((2, 2))),
    (30, 150, (3, 3), (13, 9), ConvSpec((1, 1), (1, 1))),
    (5, 20, (2, 5), (8, 11), ConvSpec((2, 1), (3, 4), (2, 3))),
    (3, 16, (7, 7), (15, 15), ConvSpec((2, 2), (3, 3))),
)
# channels, kernel, image, convolution: blocks and vectors of channels that are not full; images that are narrower than
# the kernel, and rows of taps that lie outside of them; taps that several pixels see
DEPTHWISE = (
    (64, (3, 3), (9, 14), ConvSpec((1, 1), (1, 1), groups=64)),
    (83, (3, 3), (7, 7), ConvSpec((2, 2), (1, 1), groups=83)),
    (3, (5, 5), (6, 11), ConvSpec((1, 1), (2, 2), groups=3)),
    (150, (5, 3), (12, 13), ConvSpec((1, 2), (4, 3), (3, 2), groups=150)),
    (16, (7, 7), (2, 3), ConvSpec((1, 1), (3, 3), groups=16)),
    (24, (1, 4), (1, 1), ConvSpec((3, 1), (0, 6), (1, 3), groups=24)),
    (40, (3, 3), (5, 39), ConvSpec((1, 2), (1, 1), groups=40)),
    (20, (2, 3), (9, 21), ConvSpec((2, 1), (0, 1), (2, 1), groups=20)),
)
# channels in and out, groups, kernel, image, convolution: vectors that are not full, several vectors, widths of every
# remainder, rows of taps that lie outside of the image
GROUPED = (
    (48, 48, 6, (3, 3), (9, 14), ConvSpec((2, 2), (1, 1), groups=6)),
    (24, 24, 3, (3, 3), (7, 7), ConvSpec((1, 1), (1, 1), groups=3)),
    (10, 15, 5, (2, 3), (6, 31), ConvSpec((1, 2), (3, 2), groups=5)),
    (12, 114, 2, (1, 1), (3, 23), ConvSpec(groups=2)),
    (64, 96, 2, (3, 3), (5, 13), ConvSpec((1, 1), (1, 1), groups=2)),
)


# Of float32 results; in bfloat16 an error is at most this many times that of rounding the true result once.
BOUND, ROUNDED_ONCE = 2e-5, 1.1


def share(got: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The share of its bound that the error takes."""
    rounded = worst(tuple(t.to(g.dtype) for g, t in zip(got, truth, strict=True)), truth)
    return worst(got, truth) / (BOUND + (ROUNDED_ONCE * rounded if got[0].dtype == torch.bfloat16 else 0.0))


def compare_inference() -> dict[str, float]:
    """The convolutions of our own that frozen models use, whether or not they pay on this instruction set:
    {case: share of its bound}."""
    shares: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for act in ACTIVATIONS:
            cases = _of_act(dtype, Act.make(act))
            shares |= {f"{name} {act}-{str(dtype).removeprefix('torch.')}": used for name, used in cases.items()}
    return shares


def _of_act(dtype: torch.dtype, a: Act) -> dict[str, float]:
    ops, shares = torch.ops.fused_resnet_cpu, {}

    def weight(k: int, c: int, *kernel: int) -> Tensor:
        return (torch.randn(k, c, *kernel) / (c * kernel[0] * kernel[1]) ** 0.5).to(dtype)

    def truth(x: Tensor, w: Tensor, b: Tensor, conv: ConvSpec, residual: Tensor | None) -> Tensor:
        return aten.conv_bias_act(
            *(t.double() for t in (x, w, b)), conv, a, None if residual is None else residual.double()
        )

    for kernel, stride, pad, size in (
        ((7, 7), 2, 3, (37, 50)),
        ((3, 3), 1, 1, (9, 9)),
        ((3, 5), (2, 1), (0, 2), (21, 40)),
    ):
        conv, pool = ConvSpec.make((64, 3, *kernel), stride, pad), PoolSpec.make(3, 2, 1)
        x, w, b = image(3, 3, *size, dtype=dtype), weight(64, 3, *kernel), torch.randn(64)
        want = truth(x, w, b, conv, None)
        call, packed = ConvBiasAct(x, w, b, conv, a, None), Packed(ops.stem_prepack(w), "stem")
        got = cpu.conv_pooled(call, packed, pool), cpu.conv_packed(call, packed, False)
        shares[f"stem {kernel}"] = share(got, (torch.max_pool2d(want, 3, 2, 1), want))
    for c, k, kernel, size, conv in PRODUCTS:
        x, w, b = image(2, c, *size, dtype=dtype), weight(k, c, *kernel), torch.randn(k)
        if not ops.gemm_suits(x, w, 1):
            assert dtype == torch.bfloat16 and c * kernel[0] * kernel[1] % 2
            continue
        r = image(*conv.out_shape(x.shape, w.shape), dtype=dtype)
        packed, where = ops.gemm_prepack(w), (conv.stride, conv.padding, conv.dilation)
        for residual in (None, r):
            want = truth(x, w, b, conv, residual)
            out = torch.full_like(r, float("nan"))
            ops.gemm_bias_act(x, packed, b, *where, *a.numbers, residual, out)
            shares[f"gemm {c} {k} {kernel} {residual is None}"] = share((out,), (want,))
        ops.gemm_bias_act(x, packed, b, *where, *a.numbers, r, r)  # in the residual's place
        shares[f"gemm {c} {k} {kernel} in place"] = share((r,), (want,))
    for c, kernel, size, conv in DEPTHWISE:
        x, w, b = image(2, c, *size, dtype=dtype), weight(c, 1, *kernel), torch.randn(c)
        packed, where = ops.depthwise_prepack(w), (conv.stride, conv.padding, conv.dilation)
        for residual in (None, image(*conv.out_shape(x.shape, w.shape), dtype=dtype)):
            got = ops.depthwise_bias_act(x, packed, b, *where, *a.numbers, residual)
            shares[f"depthwise {c} {kernel} {residual is None}"] = share((got,), (truth(x, w, b, conv, residual),))
    for c, k, groups, kernel, size, conv in GROUPED:
        w = weight(k, c // groups, *kernel)
        x, b, packed = image(2, c, *size, dtype=dtype), torch.randn(k), ops.grouped_prepack(w, groups)
        for residual in (None, image(*conv.out_shape(x.shape, w.shape), dtype=dtype)):
            got = ops.grouped_bias_act(x, packed, b, conv.stride, conv.padding, *a.numbers, residual)
            shares[f"grouped {c} {k} {kernel} {residual is None}"] = share((got,), (truth(x, w, b, conv, residual),))
    # slices of tiles for each thread, several of them, the last one shorter
    x, w, b, conv = image(4, 64, 43, 36, dtype=dtype), weight(80, 64, 3, 3), torch.randn(80), ConvSpec((1, 1), (1, 1))
    for tile in (2, 4):
        got = ops.winograd_bias_act(x, ops.winograd_prepack(w, tile), b, 1, *a.numbers, None)
        shares[f"winograd {tile}"] = share((got,), (truth(x, w, b, conv, None),))
    return shares
