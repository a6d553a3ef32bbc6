"""What is encoded of a row, and how often."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from fused_resnet.chain import call, encoding
from fused_resnet.functional import Chain, Unit


def step(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of a training step."""
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    return [out, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_a_settled_step_encodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fr.models.resnet20(num_classes=4, fused=False)
    model, x = fr.fuse(copy.deepcopy(plain)), torch.randn(4, 3, 32, 32) * 2 + 1
    step(model, x)

    def encode(*args: Any) -> Any:
        pytest.fail("encoded again")

    monkeypatch.setattr(call, "chain_key", encode)
    monkeypatch.setattr(encoding, "encoded", encode)
    monkeypatch.setattr(json, "dumps", encode)
    monkeypatch.setattr(json, "loads", encode)
    step(plain, x)  # as many updates of the statistics
    for got, want in zip(step(model, x), step(plain, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_place_whose_tensors_change() -> None:
    """Channels of the padded shortcut, kernels with padding 'same', and whether the convolution is made again."""
    rows = encoding.Rows()
    for channels, outputs, kernel, recompute in ((4, 6, 3, False), (3, 8, 5, False), (4, 6, 1, True), (4, 6, 3, False)):
        x = torch.randn(2, channels, 7, 6) * 2 + 1
        vectors = {"bn_weight": torch.randn(outputs), "bn_bias": torch.randn(outputs)}
        weight = torch.randn(outputs, channels, kernel, kernel, requires_grad=True)
        chains = [Chain([Unit(weight, **vectors, padding="same", training=True)], "pad")]
        got = call.run_checked(x, chains, None, call.checked(x, chains, None, None, recompute, rows))
        torch.testing.assert_close(got, call.run(x, chains, None, None, recompute))
    assert len(rows.known) == 3


def test_what_a_place_keeps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_KEPT", 2)
    rows = encoding.Rows()
    for outputs in range(1, 6):
        unit = Unit(torch.randn(outputs, 3, 1, 1), training=True)
        call.checked(torch.randn(2, 3, 4, 4), [Chain([unit], None)], rows=rows)
        assert 1 <= len(rows.known) <= 2
