"""The cost of a network, counted without running it: parameters and multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet.fusion.swap import unfuse
from fused_resnet.models import Bottleneck
from fused_resnet.studies.trainings import Network
from fused_resnet.training import ImageData


def parameters(model: nn.Module) -> int:
    """Trainable values, including BatchNorm's two vectors, without its statistics."""
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, channels: int, size: int) -> int:
    """Multiply-adds of convolutions and matrix products for one image, the paper's FLOPs.

    Args:
        model: on the meta device, where nothing is computed. It is unfused: the counter sees PyTorch's operators.
        channels, size: the image is [1, channels, size, size].

    Source: arXiv 1512.03385, table 1 ("FLOPs (multiply-adds)"); PyTorch's counter counts each as two.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        unfuse(model).eval()(torch.empty(1, channels, size, size, device="meta"))
    return counter.get_total_flops() // 2


def stride_first(model: nn.Module) -> nn.Module:
    """Moves each bottleneck's stride from the 3x3 convolution to the first 1x1, in place: the paper's placement.

    Parameters and keys stay. The networks here, like torchvision's, have the stride in the 3x3 ("v1.5").
    """
    for block in model.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return model


def beside(found: Mapping[str, dict[str, Any]], networks: Sequence[Network], data: ImageData) -> dict[str, Any]:
    """The figures of each network with its cost on these images."""
    costs = {}
    for network in networks:
        with torch.device("meta"):
            model = network.build(data.channels, len(data.classes), fused=False)
        operations = multiply_adds(model, data.channels, data.size)
        costs[network.name] = {"parameters": parameters(model), "multiply_adds": operations}
    return {name: figures | costs[name] for name, figures in found.items()}
