"""The CPU backend's convolutions for frozen models: their errors, and what is no number. Their values:
``test_every_instruction_set_agrees_with_aten``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from primitives import aten, cpu, image
from torch import Tensor

from fused_resnet.backends import ConvBiasAct, Packed, load
from fused_resnet.spec import ACTIVATIONS, Act, ConvSpec, PoolSpec

pytestmark = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")


def test_not_a_number_goes_through_the_stem() -> None:
    """A NaN pixel reaches the outputs of its windows, and no other, as in PyTorch."""
    x, w, b = image(2, 3, 40, 40), torch.randn(64, 3, 7, 7) / 12, torch.randn(64)
    x[1, 2, 20, 33] = float("nan")
    conv, pool = ConvSpec.make(w.shape, 2, 3), PoolSpec.make(3, 2, 1)
    packed = Packed(torch.ops.fused_resnet_cpu.stem_prepack(w), "stem")
    got = cpu.conv_pooled(ConvBiasAct(x, w, b, conv, Act(), None), packed, pool)
    want = torch.max_pool2d(aten.conv_bias_act(x, w, b, conv, Act(), None), 3, 2, 1)
    assert 0 < int(want.isnan().sum()) < want.numel() / 2
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 4, 4)}, "^x: expected .*channels_last, with 16 channels"),
        ({"x": torch.zeros(1, 16, 4, 4)}, "^x: expected .*channels_last"),
        ({"packed": torch.zeros(64, 16)}, "^packed: expected what gemm_prepack returns"),
        ({"bias": torch.zeros(32)}, "^bias: expected as many channels as were packed"),
        ({"out": torch.zeros(1, 64, 4, 5)}, "^out: expected the convolution's result"),
        ({"residual": torch.zeros(1, 64, 4, 4)}, "^residual: expected the output's shape, dtype and layout"),
    ],
)
def test_bad_operands_of_a_convolution_by_products(change: dict[str, Tensor], message: str) -> None:
    ops = torch.ops.fused_resnet_cpu
    args: dict[str, Any] = {
        "x": image(1, 16, 4, 4),
        "packed": ops.gemm_prepack(torch.randn(64, 16, 3, 3)),
        "bias": torch.zeros(64),
        "residual": image(1, 64, 4, 4),
        "out": image(1, 64, 4, 4),
        **{"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "act": 1, "act_param": 0.0},
    }
    ops.gemm_bias_act(**args)
    with pytest.raises(RuntimeError, match=message):
        ops.gemm_bias_act(**args | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 4, 4)}, "^x: expected .*channels_last, with 16 channels"),
        ({"x": torch.zeros(1, 16, 4, 4)}, "^x: expected .*channels_last"),
        ({"packed": torch.zeros(16, 1, 3, 3)}, "^packed: expected what depthwise_prepack returns"),
        ({"bias": torch.zeros(32)}, "^bias: expected 16 float32 values"),
        ({"residual": torch.zeros(1, 16, 4, 4)}, "^residual: expected the output's shape, dtype and layout"),
    ],
)
def test_bad_operands_of_a_depthwise_convolution(change: dict[str, Tensor], message: str) -> None:
    ops = torch.ops.fused_resnet_cpu
    args: dict[str, Any] = {
        "x": image(1, 16, 4, 4),
        "packed": ops.depthwise_prepack(torch.randn(16, 1, 3, 3)),
        "bias": torch.zeros(16),
        "residual": image(1, 16, 4, 4),
        **{"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "act": 1, "act_param": 0.0},
    }
    ops.depthwise_bias_act(**args)
    with pytest.raises(RuntimeError, match=message):
        ops.depthwise_bias_act(**args | change)
    with pytest.raises(RuntimeError, match=r"^weight: expected float32 or bfloat16 \[C, 1, R, S\]"):
        ops.depthwise_prepack(torch.randn(16, 2, 3, 3))


def test_not_a_number_goes_through_a_depthwise_convolution() -> None:
    """A NaN pixel reaches the outputs of its windows in its own channel, and no other, as in PyTorch."""
    x, w, b, conv = image(2, 20, 9, 9), torch.randn(20, 1, 3, 3), torch.randn(20), ConvSpec((1, 1), (1, 1), groups=20)
    x[1, 17, 4, 0] = float("nan")
    for act in ACTIVATIONS:
        call = ConvBiasAct(x, w, b, conv, Act.make(act), None)
        got = cpu.conv_packed(call, Packed(torch.ops.fused_resnet_cpu.depthwise_prepack(w), "depthwise"), False)
        torch.testing.assert_close(got, aten.conv_bias_act(x, w, b, conv, Act.make(act), None), equal_nan=True)
        assert int(got.isnan().sum()) == 6
