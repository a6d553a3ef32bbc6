"""The ImageNet ResNet family (He et al., arXiv 1512.03385) in plain PyTorch, with torchvision's names throughout.

Nothing here knows about kernels. A factory builds the plain network and passes it to ``fused_resnet.fuse``.
"""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from fused_resnet.base.arguments import integer

__all__ = [
    "BasicBlock", "Bottleneck", "PlainBlock", "ResNet", "plain18", "plain34", "resnet18", "resnet34", "resnet50",
    "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2",
]  # fmt: skip
NormLayer: TypeAlias = Callable[..., nn.Module]
ActLayer: TypeAlias = Callable[[], nn.Module]
Weights: TypeAlias = "str | os.PathLike[str] | Mapping[str, Tensor] | Enum"
Net = TypeVar("Net", bound=nn.Module)
Net_co = TypeVar("Net_co", bound=nn.Module, covariant=True)


def check_positive_int(name: str, value: object) -> None:
    """Raises a TypeError or ValueError that names the argument, unless ``value`` is an int (numpy's too) above 0."""
    try:
        small = integer(value, name) < 1
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}") from None
    if small:
        raise ValueError(f"{name} must be at least 1, got {value}")


def conv(inplanes: int, planes: int, size: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution without bias, size x size (odd), that keeps the image's size at stride 1."""
    return nn.Conv2d(inplanes, planes, size, stride, size // 2 * dilation, dilation, groups, bias=False)


class _Block(nn.Module):
    """The constructor of all blocks: checks, then makes the children in torchvision's order, the shortcut last."""

    expansion: ClassVar[int] = 1
    weighted_layers: ClassVar[int] = 2
    has_shortcut: ClassVar[bool] = True
    _add_branch: Callable[..., None]

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        ints = {"inplanes": inplanes, "planes": planes, "stride": stride, "groups": groups, "dilation": dilation}
        for argument, value in {**ints, "base_width (width_per_group)": base_width}.items():
            check_positive_int(f"{name}: {argument}", value)
        outplanes = planes * self.expansion
        if not self.has_shortcut and downsample is not None:
            raise ValueError(f"{name}: downsample must be None (there is no shortcut), got {downsample!r}")
        if self.has_shortcut and downsample is None and (stride != 1 or inplanes != outplanes):
            raise ValueError(
                f"{name}: downsample=None is an identity shortcut, which needs stride 1 and {outplanes} input channels "
                f"(planes * expansion), got stride {stride} and inplanes {inplanes}"
            )
        act = act_layer or partial(nn.ReLU, inplace=True)
        self._add_branch(inplanes, planes, stride, groups, base_width, dilation, norm_layer or nn.BatchNorm2d, act())
        self.downsample = downsample
        self.stride = stride


class _TwoConvs(_Block):
    """conv3x3 - norm - relu - conv3x3 - norm: the branch of BasicBlock, and all of PlainBlock."""

    def _add_branch(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int, norm: NormLayer,
        act: nn.Module,
    ) -> None:  # fmt: skip
        given = {"groups": (groups, 1), "base_width (width_per_group)": (base_width, 64), "dilation": (dilation, 1)}
        for name, (got, expected) in given.items():
            if got != expected:
                raise ValueError(f"{type(self).__name__}: {name} must be {expected}, got {got}; others need Bottleneck")
        self.conv1 = conv(inplanes, planes, 3, stride)
        self.bn1 = norm(planes)
        self.relu = act
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = norm(planes)


class BasicBlock(_TwoConvs):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), both convolutions 3x3, the stride in the first.

    Args:
        inplanes: channels of the input, (N, inplanes, H, W).
        planes: channels of the output, (N, planes, ceil(H / stride), ceil(W / stride)).
        stride: stride of ``conv1``.
        downsample: the shortcut; None is the identity.
        groups, base_width, dilation: must be 1, 64 and 1. They exist so that the same call builds all blocks.
        norm_layer: called with a number of channels; None is ``nn.BatchNorm2d``.
        act_layer: called without arguments; None is ``nn.ReLU(inplace=True)``. The module is always named ``relu``.

    Raises:
        TypeError, ValueError: an argument is not a positive int, or has a value that only Bottleneck supports, or
            ``downsample`` is None although the shortcut has to change the shape.

    Source: arXiv 1512.03385, figure 5 left; ``torchvision.models.resnet.BasicBlock``.
    """

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class PlainBlock(_TwoConvs):
    """relu(bn2(conv2(relu(bn1(conv1(x)))))): BasicBlock without its shortcut, for the plain networks.

    Args, Raises: as :class:`BasicBlock`, but ``downsample`` must be None. Source: arXiv 1512.03385, figure 3 middle.
    """

    has_shortcut: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions with a shortcut; the 3x3 carries stride, dilation and groups (ResNet v1.5).

    Args:
        inplanes, downsample, norm_layer, act_layer: as for :class:`BasicBlock`.
        planes: a quarter of the output's channels, (N, 4 * planes, ceil(H / stride), ceil(W / stride)).
        stride, groups, dilation: those of ``conv2``.
        base_width: channels per group at ``planes`` = 64; ``conv2`` has ``int(planes * base_width / 64) * groups``.

    Raises:
        TypeError, ValueError: an argument is not a positive int, ``conv2`` would have no channels, or ``downsample``
            is None although the shortcut has to change the shape.

    Source: arXiv 1512.03385, figure 5 right; ``torchvision.models.resnet.Bottleneck``.
    """

    expansion: ClassVar[int] = 4
    weighted_layers: ClassVar[int] = 3

    def _add_branch(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int, norm: NormLayer,
        act: nn.Module,
    ) -> None:  # fmt: skip
        width = int(planes * (base_width / 64)) * groups
        if width < 1:
            raise ValueError(
                f"Bottleneck: base_width (width_per_group) must give conv2 at least one channel, got {base_width}, "
                f"which gives int({planes} * {base_width} / 64) = 0 channels per group"
            )
        self.conv1 = conv(inplanes, width, 1)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = conv(width, planes * self.expansion, 1)
        self.bn3 = norm(planes * self.expansion)
        self.relu = act

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def init_weights(model: nn.Module, zero_init_residual: bool = False) -> None:
    """He initialisation of every convolution (fan-out, relu), 1 and 0 for the norms' weights and biases.

    Args:
        model: changed in place; its Linear layers keep PyTorch's initialisation.
        zero_init_residual: start the last norm of every branch at 0, so that each block starts as its shortcut.

    Raises:
        ValueError: ``zero_init_residual`` without a residual block, or with a norm that has no weight.

    Source: arXiv 1502.01852, section 2.2; zero_init_residual: arXiv 1706.02677, section 5.1.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    residual = [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)] if zero_init_residual else []
    if zero_init_residual and not residual:
        raise ValueError(f"zero_init_residual=True needs residual blocks, got a {type(model).__name__} without any")
    for block in residual:
        norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
        if not isinstance(weight := getattr(norm, "weight", None), Tensor):
            raise ValueError(f"zero_init_residual=True needs a norm_layer with a weight, got {norm!r}")
        nn.init.zeros_(weight)


class ResNet(nn.Module):
    """A residual network for images: 7x7 stem, max-pool, four stages, average pool, linear classifier.

    Maps (N, 3, H, W) to (N, num_classes), any floating dtype, NCHW or channels_last. ``state_dict()`` has
    torchvision's keys, shapes and order, and the same random seed gives the same initial weights.

    Args:
        block: :class:`BasicBlock`, :class:`Bottleneck`, :class:`PlainBlock`, or a module class built by the same call.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of ``fc``.
        zero_init_residual: see :func:`init_weights`.
        groups, width_per_group: those of the 3x3 convolutions (Bottleneck only).
        replace_stride_with_dilation: whether stages 2, 3 and 4 dilate instead of striding (Bottleneck only).
        norm_layer: called with a number of channels; None is ``nn.BatchNorm2d``.
        avg_down: ResNet-D's shortcut: a 2x2 average pool carries the stride (``nn.Identity`` where the stride is 1),
            then a 1x1 convolution of stride 1 and the norm, as ``downsample.0``, ``.1`` and ``.2``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, or the block can't do what it asks for.

    Source: arXiv 1512.03385, table 1; ``torchvision.models.ResNet``; avg_down: arXiv 1812.01187, figure 2c.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        avg_down: bool = False,
    ) -> None:
        super().__init__()
        if not (isinstance(block, type) and issubclass(block, nn.Module) and hasattr(block, "expansion")):
            raise TypeError(f"block must be a block class such as BasicBlock or Bottleneck, got {block!r}")
        if not isinstance(layers, Sequence) or len(layers) != 4:
            raise ValueError(f"layers must be 4 numbers of blocks, one for each stage, got {layers!r}")
        for i, blocks in enumerate(layers):
            check_positive_int(f"layers[{i}]", blocks)
        check_positive_int("num_classes", num_classes)
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if not isinstance(dilate, Sequence) or len(dilate) != 3 or not all(isinstance(d, bool) for d in dilate):
            raise ValueError(f"replace_stride_with_dilation must be None or 3 bools (stages 2, 3, 4), got {dilate!r}")
        if any(dilate) and issubclass(block, _TwoConvs):
            raise ValueError(f"replace_stride_with_dilation needs Bottleneck, got {dilate!r} with {block.__name__}")
        if avg_down and not getattr(block, "has_shortcut", True):
            raise ValueError(f"avg_down=True needs a block with a shortcut, got {block.__name__}")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes, self.dilation = 64, 1
        self.groups, self.base_width, self.avg_down = groups, width_per_group, avg_down
        self.conv1 = conv(3, self.inplanes, 7, stride=2)
        self.bn1 = norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0], 1, False, norm_layer)
        self.layer2 = self._make_layer(block, 128, layers[1], 2, dilate[0], norm_layer)
        self.layer3 = self._make_layer(block, 256, layers[2], 2, dilate[1], norm_layer)
        self.layer4 = self._make_layer(block, 512, layers[3], 2, dilate[2], norm_layer)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        init_weights(self, zero_init_residual)

    def _make_layer(self, block: Any, planes: int, n: int, stride: int, dilate: bool, norm: NormLayer) -> nn.Module:
        outplanes = planes * block.expansion
        first_dilation = self.dilation  # the first block still has the pixel spacing of the stage before
        if dilate:
            self.dilation *= stride
            stride = 1
        downsample = None
        if getattr(block, "has_shortcut", True) and (stride != 1 or self.inplanes != outplanes):
            downsample = self._make_shortcut(outplanes, stride, norm)
        common = {"groups": self.groups, "base_width": self.base_width, "norm_layer": norm}
        layer = [block(self.inplanes, planes, stride, downsample, dilation=first_dilation, **common)]
        self.inplanes = outplanes
        layer += [block(outplanes, planes, dilation=self.dilation, **common) for _ in range(1, n)]
        return nn.Sequential(*layer)

    def _make_shortcut(self, outplanes: int, stride: int, norm: NormLayer) -> nn.Sequential:
        if not self.avg_down:
            return nn.Sequential(conv(self.inplanes, outplanes, 1, stride), norm(outplanes))
        pool = nn.Identity() if stride == 1 else nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
        return nn.Sequential(pool, conv(self.inplanes, outplanes, 1), norm(outplanes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _torchvision_entry(name: str, weights: str | Enum, in_torchvision: bool) -> Any:
    """The member of torchvision's weights enum for ``name`` that ``weights`` is or names."""
    others = "a path to a .pt or .pth file or a state_dict"
    if not in_torchvision:
        raise ValueError(f"weights: torchvision has none for {name}, expected {others}, got {weights!r}")
    try:
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another version of torch
        raise ImportError(
            f"weights={weights!r} names weights of torchvision, which can't be imported ({error}). Install the "
            f"torchvision that belongs to torch {torch.__version__}, or pass {others}."
        ) from error
    known = models.get_model_weights(name)
    entry = known.__members__.get(weights.removeprefix(f"{known.__name__}.")) if isinstance(weights, str) else weights
    if not isinstance(entry, known):
        names = ", ".join(f"{known.__name__}.{key}" for key in known.__members__)
        raise ValueError(f"weights: {name} takes one of {names}, {others}, got {weights!r}")
    return entry


def _read_weights(name: str, weights: Any, kwargs: dict[str, Any], in_torchvision: bool) -> Mapping[str, Tensor]:
    if isinstance(weights, Enum) or (isinstance(weights, str) and not weights.endswith((".pt", ".pth"))):
        entry = _torchvision_entry(name, weights, in_torchvision)
        classes = len(entry.meta["categories"])
        if kwargs.setdefault("num_classes", classes) != classes:
            raise ValueError(f"num_classes must be {classes} with weights={entry}, got {kwargs['num_classes']!r}")
        return entry.get_state_dict(progress=True, check_hash=True)
    if isinstance(weights, str | os.PathLike):
        try:
            weights = torch.load(weights, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"weights: {weights!r} is not a state_dict saved by torch.save: {error}") from error
    if not isinstance(weights, Mapping):
        expected = "None, a member of torchvision's weights or its name, a path to a .pt or .pth file or a state_dict"
        raise TypeError(f"weights must be {expected}, got {type(weights).__name__}")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"weights must map names to tensors, got {key!r}: {type(value).__name__}")
    return weights


def build(
    name: str, network: Callable[..., Net], weights: Any, fused: bool, in_torchvision: bool, kwargs: dict[str, Any]
) -> Net:
    """Constructs, loads and fuses, for every factory; see the docstring that :func:`factory` writes."""
    if not isinstance(fused, bool):
        raise TypeError(f"fused must be a bool, got {fused!r} of type {type(fused).__name__}")
    state_dict = None if weights is None else _read_weights(name, weights, kwargs, in_torchvision)
    model: Any = network(**kwargs)
    if state_dict is not None:
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            raise ValueError(f"weights don't fit {name} with these arguments: {error}") from error
    if fused:
        from fused_resnet.fusion.swap import fuse

        model = fuse(model)
    return model


# A network's class -> the names of its factories, by depth.
FACTORIES: dict[type[nn.Module], list[str]] = {}


class Factory(Protocol[Net_co]):
    """The signature that all factories share."""

    def __call__(self, *, weights: Weights | None = None, fused: bool = True, **kwargs: Any) -> Net_co: ...


def factory(
    name: str, arxiv: str, network: type[Net], *args: Any, in_torchvision: bool = True, **defaults: Any
) -> Factory[Net]:
    """The function ``name(*, weights=None, fused=True, **kwargs)``, which builds ``network(*args, **kwargs)``."""

    def make(*, weights: Weights | None = None, fused: bool = True, **kwargs: Any) -> Net:
        return build(name, partial(network, *args, **defaults), weights, fused, in_torchvision, kwargs)

    FACTORIES.setdefault(network, []).append(name)
    make.__name__ = make.__qualname__ = name
    make.__module__ = network.__module__
    make.__doc__ = f"""The network {name}, as in arXiv {arxiv}.

    Args:
        weights: None, or what to load: a state_dict, a path to a .pt or .pth file that holds one, or, for the networks
            that torchvision has, a member of its weights enum or the name of one ("DEFAULT", "IMAGENET1K_V1").
        fused: return ``fused_resnet.fuse(model)``; False leaves plain PyTorch modules.
        kwargs: the keyword arguments of :class:`{network.__name__}`.

    Returns:
        The network, float32, NCHW, on the default device.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, or the weights are not this network's.
        FileNotFoundError: ``weights`` is a path to no file.
        ImportError: ``weights`` names weights of torchvision, which can't be imported.
    """
    return make


_R18, _R34, _R50, _R101, _R152 = [2, 2, 2, 2], [3, 4, 6, 3], [3, 4, 6, 3], [3, 4, 23, 3], [3, 8, 36, 3]
resnet18 = factory("resnet18", "1512.03385", ResNet, BasicBlock, _R18)
resnet34 = factory("resnet34", "1512.03385", ResNet, BasicBlock, _R34)
resnet50 = factory("resnet50", "1512.03385", ResNet, Bottleneck, _R50)
resnet101 = factory("resnet101", "1512.03385", ResNet, Bottleneck, _R101)
resnet152 = factory("resnet152", "1512.03385", ResNet, Bottleneck, _R152)
wide_resnet50_2 = factory("wide_resnet50_2", "1605.07146", ResNet, Bottleneck, _R50, width_per_group=128)
wide_resnet101_2 = factory("wide_resnet101_2", "1605.07146", ResNet, Bottleneck, _R101, width_per_group=128)
resnext50_32x4d = factory("resnext50_32x4d", "1611.05431", ResNet, Bottleneck, _R50, groups=32, width_per_group=4)
resnext101_32x8d = factory("resnext101_32x8d", "1611.05431", ResNet, Bottleneck, _R101, groups=32, width_per_group=8)
plain18 = factory("plain18", "1512.03385", ResNet, PlainBlock, _R18, in_torchvision=False)
plain34 = factory("plain34", "1512.03385", ResNet, PlainBlock, _R34, in_torchvision=False)
