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


def compare_inference() -> dict[str, float]:
    """The convolutions of our own that frozen models use, whether or not they pay on this instruction set."""
    ops, errors = torch.ops.fused_resnet_cpu, {}
    for act in ACTIVATIONS:
        a = Act.make(act)
        code, b = a.index, torch.randn(64)
        for kernel, stride, pad, size in (
            ((7, 7), 2, 3, (37, 50)),
            ((3, 3), 1, 1, (9, 9)),
            ((3, 5), (2, 1), (0, 2), (21, 40)),
        ):
            conv, pool = ConvSpec.make((64, 3, *kernel), stride, pad), PoolSpec.make(3, 2, 1)
            x, w = image(3, 3, *size), torch.randn(64, 3, *kernel) / 12
            want = aten.conv_bias_act(x, w, b, conv, a, None)
            call, packed = ConvBiasAct(x, w, b, conv, a, None), Packed(ops.stem_prepack(w), "stem")
            got = cpu.conv_pooled(call, packed, pool), cpu.conv_packed(call, packed, False)
            errors[f"stem {kernel} {act}-float32"] = worst(got, (torch.max_pool2d(want, 3, 2, 1), want))
        for c, k, kernel, size, conv in PRODUCTS:
            x, w, b = (
                image(2, c, *size),
                torch.randn(k, c, *kernel) / (c * kernel[0] * kernel[1]) ** 0.5,
                torch.randn(k),
            )
            r = image(*conv.out_shape(x.shape, w.shape))
            packed, where = ops.gemm_prepack(w), (conv.stride, conv.padding, conv.dilation)
            for residual in (None, r):
                want = aten.conv_bias_act(x, w, b, conv, a, residual)
                out = torch.full_like(r, float("nan"))
                ops.gemm_bias_act(x, packed, b, *where, code, a.param, residual, out)
                errors[f"gemm {c} {k} {kernel} {act} {residual is None}-float32"] = worst((out,), (want,))
            ops.gemm_bias_act(x, packed, b, *where, code, a.param, r, r)  # in the residual's place
            errors[f"gemm {c} {k} {kernel} {act} in place-float32"] = worst((r,), (want,))
        for c, kernel, size, conv in DEPTHWISE:
            x, w, b = image(2, c, *size), torch.randn(c, 1, *kernel) / (kernel[0] * kernel[1]) ** 0.5, torch.randn(c)
            packed, where = ops.depthwise_prepack(w), (conv.stride, conv.padding, conv.dilation)
            for residual in (None, image(*conv.out_shape(x.shape, w.shape))):
                want = aten.conv_bias_act(x, w, b, conv, a, residual)
                got = ops.depthwise_bias_act(x, packed, b, *where, code, a.param, residual)
                errors[f"depthwise {c} {kernel} {act} {residual is None}-float32"] = worst((got,), (want,))
        for c, k, groups, kernel, size, conv in GROUPED:
            w = torch.randn(k, c // groups, *kernel) / (c // groups * kernel[0] * kernel[1]) ** 0.5
            x, b, packed = image(2, c, *size), torch.randn(k), ops.grouped_prepack(w, groups)
            for residual in (None, image(*conv.out_shape(x.shape, w.shape))):
                want = aten.conv_bias_act(x, w, b, conv, a, residual)
                got = ops.grouped_bias_act(x, packed, b, conv.stride, conv.padding, code, a.param, residual)
                errors[f"grouped {c} {k} {kernel} {act} {residual is None}-float32"] = worst((got,), (want,))
    # slices of tiles for each thread, several of them, the last one shorter
    x, w, b = image(4, 64, 43, 36), torch.randn(80, 64, 3, 3) / 24, torch.randn(80)
    want = aten.conv_bias_act(x, w, b, ConvSpec((1, 1), (1, 1)), Act(), None)
    for tile in (2, 4):
        got = ops.winograd_bias_act(x, ops.winograd_prepack(w, tile), b, 1, Act.make("relu").index, 0.0, None)
        errors[f"winograd {tile}-float32"] = worst((got,), (want,))
    return errors
