"""What a network costs, counted without running it: parameters and multiply-adds."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet.fusion.swap import unfuse
from fused_resnet.models import Bottleneck


def parameters(model: nn.Module) -> int:
    """Trainable values; BatchNorm's two vectors among them, its statistics not."""
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, channels: int, size: int) -> int:
    """Multiply-adds of convolutions and matrix products for one image, the paper's FLOPs.

    Args:
        model: on the meta device, where nothing is computed; it is unfused, as the counter sees PyTorch's operators.
        channels, size: of the image, [1, channels, size, size].

    Source: arXiv 1512.03385, table 1 ("FLOPs (multiply-adds)"); PyTorch's counter takes each for two.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        unfuse(model).eval()(torch.empty(1, channels, size, size, device="meta"))
    return counter.get_total_flops() // 2


def stride_first(model: nn.Module) -> nn.Module:
    """Moves each bottleneck's stride from the 3x3 convolution to the first 1x1, in place: the paper's placement.

    Parameters and keys stay; the networks here, like torchvision's, carry the stride in the 3x3 ("v1.5").
    """
    for block in model.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return model
