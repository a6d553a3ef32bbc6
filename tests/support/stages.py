"""Stages of residual blocks as torchvision makes them, images for them, and one step of them compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from networks import prepared
from torch import Tensor, nn
from torchvision_shim import torchvision

BasicBlock = torchvision.models.resnet.BasicBlock


def stage(blocks: int = 3, **norm: Any) -> nn.Sequential:
    """A projection block and some behind it, as torchvision makes them, in float64."""
    layer = lambda c: nn.BatchNorm2d(c, **norm)  # noqa: E731
    down = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), layer(6))
    first = BasicBlock(4, 6, 2, down, norm_layer=layer)
    made = nn.Sequential(first, *(BasicBlock(6, 6, norm_layer=layer) for _ in range(blocks - 1)))
    return (made if "affine" in norm or "track_running_stats" in norm else prepared(made)).double()


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 4, 9, 8, dtype=torch.float64) * 1.3 + 0.4


def step(model: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Output, x's and every parameter's gradient, buffers."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = (call or model)(x)
    (out.square().mean() + out.sin().mean()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "dx": x.grad} | grads | {n: b.clone() for n, b in model.named_buffers()}  # type: ignore[dict-item]


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-7, atol=1e-9, msg=key)
