"""The paper's networks for CIFAR-10: 6n + 2 layers with shortcuts of option A, B or C, and their plain twins.

With bottleneck blocks they have 9n + 2 layers.

Source: He et al., arXiv 1512.03385, section 4.2; section 4.1 (table 3) has the options.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.models.resnet import (
    ActLayer,
    BasicBlock,
    NormLayer,
    PlainBlock,
    Weights,
    build,
    check_positive_int,
    conv,
    factory,
    init_weights,
)

__all__ = [
    "CifarResNet", "ZeroPadShortcut", "cifar_resnet", "plain20", "plain32", "plain44", "plain56", "plain110",
    "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet1202",
]  # fmt: skip
Shortcut: TypeAlias = Literal["A", "B", "C"]


class ZeroPadShortcut(nn.Module):
    """Option A: every ``stride``-th pixel of every ``stride``-th row, and zeros for the missing channels.

    Maps (N, C, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)), in the input's dtype and layout, without
    parameters. The input's channels come first, the zeros after them (the paper leaves open where the zeros go).

    Args:
        stride: the distance of the pixels that are kept.
        out_channels: channels of the output, at least C.

    Raises:
        TypeError, ValueError: an argument is not a positive int, or (in ``forward``) the input is not 4-dimensional
            or has more than ``out_channels`` channels.

    Source: arXiv 1512.03385, sections 3.3 and 4.1, option A.
    """

    def __init__(self, stride: int, out_channels: int) -> None:
        super().__init__()
        check_positive_int("ZeroPadShortcut: stride", stride)
        check_positive_int("ZeroPadShortcut: out_channels", out_channels)
        self.stride = stride
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] > self.out_channels:
            expected = f"(N, C, H, W) with C at most out_channels = {self.out_channels}"
            raise ValueError(f"ZeroPadShortcut: x must have shape {expected}, got {tuple(x.shape)}")
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.out_channels - x.shape[1]))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, out_channels={self.out_channels}"


class CifarResNet(nn.Module):
    """A 3x3 stem of 16 filters, three stages of n blocks with 16, 32 and 64 filters, average pool, linear classifier.

    Maps (N, in_channels, H, W), 32x32 in the paper, to (N, num_classes), any floating dtype, NCHW or channels_last.

    Args:
        depth: weighted layers as the paper counts them (without projections), 6n + 2 for blocks of two
            convolutions, 9n + 2 for :class:`fused_resnet.models.Bottleneck`.
        shortcut: "A": identity, and :class:`ZeroPadShortcut` where the shape changes; "B": a 1x1 convolution and a
            norm where the shape changes, identity elsewhere; "C": a 1x1 convolution and a norm in every block;
            None: the plain network, without shortcuts.
        num_classes: outputs of ``fc``.
        in_channels: channels of the images.
        zero_init_residual: see :func:`fused_resnet.models.resnet.init_weights`.
        norm_layer: called with a number of channels; None is ``nn.BatchNorm2d``.
        act_layer: called without arguments, for the stem and each block; None is ``nn.ReLU(inplace=True)``. The
            initialisation stays ReLU's.
        block: a class of residual blocks, built by the call of :class:`fused_resnet.models.BasicBlock`; stages have
            16, 32 and 64 times its ``expansion`` channels. None is BasicBlock, or PlainBlock without shortcuts.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.

    Source: arXiv 1512.03385, section 4.2; with bottlenecks arXiv 1603.05027, section 5.
    """

    def __init__(
        self,
        depth: int,
        shortcut: Shortcut | None = "A",
        num_classes: int = 10,
        in_channels: int = 3,
        zero_init_residual: bool = False,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        block: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("depth", depth)
        if shortcut is not None and shortcut not in ("A", "B", "C"):
            raise ValueError(f'shortcut must be "A", "B", "C" or None (a plain network), got {shortcut!r}')
        made: Any = PlainBlock if shortcut is None else BasicBlock
        if block is not None:
            if not (isinstance(block, type) and issubclass(block, nn.Module) and hasattr(block, "weighted_layers")):
                raise TypeError(f"block must be a block class such as BasicBlock or Bottleneck, got {block!r}")
            made = block
        if (shortcut is None) is made.has_shortcut:
            has = "has a" if made.has_shortcut else "has no"
            raise ValueError(f"block={made.__name__} {has} shortcut, got shortcut={shortcut!r}")
        step = 3 * made.weighted_layers
        if depth < step + 2 or (depth - 2) % step:
            examples = ", ".join(str(step * n + 2) for n in range(1, 6))
            raise ValueError(f"depth must be {step}n + 2 with n at least 1 ({examples} ...), got {depth}")
        check_positive_int("num_classes", num_classes)
        check_positive_int("in_channels", in_channels)
        self.depth = depth
        self.shortcut = shortcut
        n, norm, e = (depth - 2) // step, norm_layer or nn.BatchNorm2d, made.expansion
        self.conv1 = conv(in_channels, 16, 3)
        self.bn1 = norm(16)
        self.relu = (act_layer or partial(nn.ReLU, inplace=True))()
        make = partial(self._make_layer, partial(made, norm_layer=norm, act_layer=act_layer), n, e, norm)
        self.layer1 = make(16, 16, 1)
        self.layer2 = make(16 * e, 32, 2)
        self.layer3 = make(32 * e, 64, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64 * e, num_classes)
        init_weights(self, zero_init_residual)

    def _make_layer(
        self, block: Any, n: int, expansion: int, norm: NormLayer, inplanes: int, planes: int, stride: int
    ) -> nn.Sequential:
        outplanes = planes * expansion
        shapes = [(inplanes, stride)] + [(outplanes, 1)] * (n - 1)
        return nn.Sequential(*(block(c, planes, s, self._make_shortcut(c, outplanes, s, norm)) for c, s in shapes))

    def _make_shortcut(self, inplanes: int, planes: int, stride: int, norm: NormLayer) -> nn.Module | None:
        same_shape = inplanes == planes and stride == 1
        if self.shortcut is None or (same_shape and self.shortcut != "C"):
            return None
        if self.shortcut == "A":
            return ZeroPadShortcut(stride, planes)
        return nn.Sequential(conv(inplanes, planes, 1, stride), norm(planes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def cifar_resnet(
    depth: int,
    *,
    shortcut: Shortcut | None = "A",
    weights: Weights | None = None,
    fused: bool = True,
    **kwargs: Any,
) -> CifarResNet:
    """A network of the 6n + 2 family of any depth.

    Args:
        depth, shortcut: as for :class:`CifarResNet`; ``shortcut=None`` is the plain network.
        weights: None, a state_dict, or a path to a .pt or .pth file that holds one.
        fused: return ``fused_resnet.fuse(model)``; False leaves plain PyTorch modules.
        kwargs: the other keyword arguments of :class:`CifarResNet`.

    Returns:
        The network, float32, NCHW, on the default device.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, or the weights are not this network's.
        FileNotFoundError: ``weights`` is a path to no file.

    Source: arXiv 1512.03385, section 4.2.
    """
    network: Callable[..., CifarResNet] = partial(CifarResNet, depth, shortcut)
    return build(f"cifar_resnet({depth})", network, weights, fused, False, kwargs)


resnet20 = factory("resnet20", "1512.03385", CifarResNet, 20, in_torchvision=False)
resnet32 = factory("resnet32", "1512.03385", CifarResNet, 32, in_torchvision=False)
resnet44 = factory("resnet44", "1512.03385", CifarResNet, 44, in_torchvision=False)
resnet56 = factory("resnet56", "1512.03385", CifarResNet, 56, in_torchvision=False)
resnet110 = factory("resnet110", "1512.03385", CifarResNet, 110, in_torchvision=False)
resnet1202 = factory("resnet1202", "1512.03385", CifarResNet, 1202, in_torchvision=False)
plain20 = factory("plain20", "1512.03385", CifarResNet, 20, None, in_torchvision=False)
plain32 = factory("plain32", "1512.03385", CifarResNet, 32, None, in_torchvision=False)
plain44 = factory("plain44", "1512.03385", CifarResNet, 44, None, in_torchvision=False)
plain56 = factory("plain56", "1512.03385", CifarResNet, 56, None, in_torchvision=False)
plain110 = factory("plain110", "1512.03385", CifarResNet, 110, None, in_torchvision=False)
