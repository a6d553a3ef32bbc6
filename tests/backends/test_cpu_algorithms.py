"""The names of the CPU's convolutions: those that run, and those that ``explain`` prints."""

from __future__ import annotations

import pytest
import torch
from primitives import cpu, vectors
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fused_resnet as fr
from fused_resnet.backends import ConvBackward, ConvStats, DyCoefficients, Prologue, load
from fused_resnet.spec import Act, ConvSpec

pytestmark = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")

# input channels, output channels, kernel, image, convolution, channels_last -> forward, dgrad, wgrad; of two names the
# second is that with a prologue
CASES = {
    "1x1": (24, 40, 1, (9, 7), ConvSpec(), True, ("gemm",) * 3),
    "1x1 NCHW": (24, 40, 1, (9, 7), ConvSpec(), False, ("aten",) * 3),
    "1x1/2": (24, 40, 1, (9, 8), ConvSpec((2, 2)), True, ("gemm", "gemm aten", "gemm implicit_gemm")),
    "3x3": (72, 64, 3, (20, 17), ConvSpec((1, 1), (1, 1)), True, ("winograd",) * 3),
    "3x3 padded by 2": (64, 72, 3, (20, 17), ConvSpec((1, 1), (2, 2)), True, ("winograd", "aten", "winograd")),
    "3x3 of few pixels": (64, 64, 3, (5, 5), ConvSpec((1, 1), (1, 1)), True, ("aten",) * 3),
    "3x3 of few channels": (16, 64, 3, (20, 17), ConvSpec((1, 1), (1, 1)), True, ("aten",) * 3),
    "3x3/2": (64, 64, 3, (20, 17), ConvSpec((2, 2), (1, 1)), True, ("aten",) * 3),
    "3x3 in groups": (128, 128, 3, (20, 17), ConvSpec((1, 1), (1, 1), groups=2), True, ("aten",) * 3),
}


def runs_aten(call: ConvStats | ConvBackward, name: str) -> bool:
    """Whether PyTorch's convolution, or its backward, runs in the call."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        call.on(cpu.of)
    return any(event.key == name for event in record.key_averages())


@pytest.mark.parametrize("prologue", [False, True], ids=["raw", "prologue"])
@pytest.mark.parametrize("case", CASES)
def test_the_named_algorithm_runs(case: str, prologue: bool) -> None:
    c, k, kernel, size, conv, last, names = CASES[case]
    fmt = torch.channels_last if last else torch.contiguous_format

    def image(channels: int, h: int, w: int) -> Tensor:
        return (torch.randn(2, channels, h, w) * 2 + 1).contiguous(memory_format=fmt)

    x, weight = image(c, *size), torch.randn(k, c // conv.groups, kernel, kernel).contiguous(memory_format=fmt)
    dz, y = (image(k, *conv.out_size(size, (kernel, kernel))) for _ in range(2))
    pre, coef = Prologue(vectors(c), Act()) if prologue else None, DyCoefficients(*vectors(k))
    forward, dgrad, wgrad = (name.split()[-1 if prologue else 0] for name in names)
    assert cpu.algorithm(ConvStats, x, weight, conv, prologue) == forward
    assert runs_aten(ConvStats(x, weight, conv, pre, True), "aten::convolution") is (forward == "aten")
    for needs, name in (((True, False), dgrad), ((False, True), wgrad)):
        call = ConvBackward(dz, y, coef, x, pre, weight, conv, *needs, None)
        assert runs_aten(call, "aten::convolution_backward") is (name == "aten")
    named = cpu.algorithm(ConvBackward, x, weight, conv, prologue)
    assert named == (dgrad if dgrad == wgrad else f"{dgrad} for the input, {wgrad} for the weight")


def test_explain_names_them() -> None:
    def unit(c: int, k: int, kernel: int) -> list[nn.Module]:
        return [nn.Conv2d(c, k, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(k), nn.ReLU()]

    model = nn.Sequential(*unit(3, 64, 7), *unit(64, 72, 3), *unit(72, 80, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 20, 18).to(memory_format=torch.channels_last)
    fused = fr.fuse(model)
    fused(x).sum().backward()
    text = str(fr.explain(fused))
    for kernel, name in (("7x7", "aten"), ("3x3", "winograd"), ("1x1", "gemm")):
        for primitive in ("conv_stats", "conv_backward"):
            assert f"{primitive} {kernel}: cpu ({name})" in text, text


def test_explain_names_all_of_a_block() -> None:
    """Of two 3x3 convolutions the first has a stride, which Winograd's algorithm does not take."""
    block = fr.models.resnet18(num_classes=4).layer2[0].to(memory_format=torch.channels_last)
    block(torch.randn(2, 64, 36, 34).to(memory_format=torch.channels_last)).sum().backward()
    (row,) = fr.explain(block).rows
    assert row.backends["conv_stats 3x3"] == "cpu (aten) and cpu (winograd)"
    assert row.backends["conv_stats 1x1"] == "cpu (gemm)"


def test_a_name_is_only_given_where_it_is_known() -> None:
    """Autocast convolves in another dtype than the weights'."""
    model = fr.fuse(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)))
    x = torch.randn(2, 64, 20, 18)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    (row,) = fr.explain(model).rows
    assert row.backends["conv_stats 3x3"] == row.backends["conv_backward 3x3"] == "cpu"


def test_bfloat16_by_winograd() -> None:
    """Winograd's products of bfloat16 tensors are float32: their error is no larger than that of oneDNN's."""
    where, compute = ([1, 1], [1, 1], [1, 1], 1), torch.bfloat16
    x, dz, y = (torch.randn(8, 64, 28, 28).to(compute).to(memory_format=torch.channels_last) for _ in range(3))
    weight = (torch.randn(64, 64, 3, 3) / 24).to(compute).to(memory_format=torch.channels_last)
    if torch.ops.fused_resnet_cpu.conv_algorithm("fprop", x, weight, *where, False, compute, True, 0) != "winograd":
        pytest.skip("this machine has no vdpbf16ps, or it has AMX")
    out, mean, var = torch.ops.fused_resnet_cpu.conv_stats(x, weight, *where, [], 0, 0.0, True, compute, True, 0)
    coef = [torch.ones(64)]
    dx, dw, _, _ = torch.ops.fused_resnet_cpu.conv_backward(
        dz, y, coef, x, [], 0, 0.0, weight, *where, True, True, None, compute, True, 0
    )
    found = {"out": out, "mean": mean, "var": var, "dx": dx, "dw": dw}

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        image, w = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        conv = torch.conv2d(image, w, None, 1, 1)
        conv.backward(dz.to(dtype))
        wide = conv.detach().to(torch.promote_types(dtype, torch.float32))
        assert image.grad is not None and w.grad is not None
        return {
            "out": conv.detach(),
            "mean": wide.mean((0, 2, 3)),
            "var": wide.var((0, 2, 3), correction=0),
            "dx": image.grad,
            "dw": w.grad,
        }

    exact, native = plain(torch.float64), plain(compute)
    for name, value in found.items():
        error, allowed = ((t.double() - exact[name]).norm() for t in (value, native[name]))
        assert error <= 1.05 * allowed + 1e-6 * exact[name].norm(), name
