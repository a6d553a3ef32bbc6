"""Plain PyTorch's bfloat16 convolutions on CPUs where PyTorch has no fast ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor, nn

FAST = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def bf16_convolutions() -> AbstractContextManager[None]:
    """For plain networks alone. Without AVX-512 PyTorch's bfloat16 convolution takes many times as long as its float32
    one. It multiplies bfloat16 numbers, sums in float32 and rounds each result, and so does this one."""
    return nullcontext() if FAST else computed_in_float32()


@contextmanager
def computed_in_float32() -> Iterator[None]:
    """As ``bf16_convolutions``, on any CPU."""
    real = nn.Conv2d._conv_forward

    def forward(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if dtype != torch.bfloat16 or bias is not None:
            return real(conv, x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            return real(conv, x.to(dtype).float(), weight.to(dtype).float(), None).to(dtype)

    with patch.object(nn.Conv2d, "_conv_forward", forward):
        yield
