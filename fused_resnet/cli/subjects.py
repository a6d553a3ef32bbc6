"""The subjects of ``check``: the distinct blocks of every model, and one whole network of every family."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fused_resnet import models
from fused_resnet.cli.options import UsageError

# Configurations beyond the defaults of a factory: model -> {name: keyword arguments}.
VARIATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "resnet20": {"option B": {"shortcut": "B"}, "option C": {"shortcut": "C"}},
    "resnet50": {
        "dilated": {"replace_stride_with_dilation": [False, True, True]},
        "avg_down": {"avg_down": True},
    },
}
# Libraries whose networks can be checked as "library/name", and the function that builds one.
LIBRARIES: dict[str, Callable[[Any, str], nn.Module]] = {
    "torchvision": lambda library, name: library.models.get_model(name, weights=None),
    "timm": lambda library, name: library.create_model(name),
    "transformers": lambda library, name: getattr(library, name)(getattr(library, name).config_class()),
}
BLOCKS = (models.BasicBlock, models.Bottleneck, models.PlainBlock)


@dataclass(frozen=True)
class Subject:
    """A plain float32 module on the CPU, and the input that it takes.

    Attributes:
        label: its name in the table. model: its name in ``models.list_models()`` (the first model that has it), or
            "library/name".
        build: builds it, with weights from the default generator. whole: it is a network, not a block.
        shape: the input's shape. shape16: the same for 16-bit dtypes, so large that many values fall on the other side
            of a ReLU's kink. Then their number, here and in plain PyTorch, does not depend on luck.
    """

    label: str
    model: str
    build: Callable[[], nn.Module]
    whole: bool
    shape: tuple[int, int, int, int]
    shape16: tuple[int, int, int, int]


def _network(name: str, kwargs: dict[str, Any]) -> Any:
    return getattr(models, name)(fused=False, **kwargs)


def _shape_of(conv: nn.Conv2d) -> str:
    """ "3x3 /2 d2 g32": the properties of a convolution, except its channels, that decide how it is computed."""
    others = (("/", conv.stride[0]), ("d", conv.dilation[0]), ("g", conv.groups))
    return " ".join(["x".join(map(str, conv.kernel_size)), *(f"{sign}{n}" for sign, n in others if n > 1)])


def _shortcut_of(block: nn.Module) -> str:
    down = block.downsample
    if isinstance(block, models.PlainBlock):
        return "no shortcut"
    if not isinstance(down, nn.Sequential):
        return "identity" if down is None else "zero-padded"
    pooled = "pooled " if isinstance(down[0], nn.AvgPool2d) else ""
    conv = next(m for m in down if isinstance(m, nn.Conv2d))
    return f"{pooled}projection {_shape_of(conv)}"


def _convs(block: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of the branch, in order."""
    return [m for name, m in block.named_children() if name.startswith("conv") and isinstance(m, nn.Conv2d)]


def _kind(block: nn.Module) -> tuple[str, ...]:
    """A key that is equal for blocks that differ only by a common factor of their channels."""
    convs = _convs(block)
    base = convs[0].in_channels
    ratios = "-".join(f"{c.out_channels / base:g}" for c in convs)
    return type(block).__name__, ratios, *map(_shape_of, convs), _shortcut_of(block)


def _describe(block: nn.Module) -> str:
    convs = _convs(block)
    channels = "-".join(str(c) for c in (convs[0].in_channels, *(conv.out_channels for conv in convs)))
    shapes = ", ".join(_shape_of(conv) for conv in convs)
    return f"{type(block).__name__} {channels} ({shapes}; {_shortcut_of(block)})"


def _rebuild(block: nn.Module) -> nn.Module:
    """A block of a network on the meta device, with weights, as the only child of a module."""
    block = copy.deepcopy(block).to_empty(device="cpu")
    models.resnet.init_weights(block)
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
    return nn.Sequential(block)


def _stem(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A network without its stages and with a small classifier."""
    network = _network(name, kwargs)
    channels = network.conv1.out_channels
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        if hasattr(network, stage):
            setattr(network, stage, nn.Sequential())
    network.fc = nn.Linear(channels, 10)
    return network


def _input_of(block: nn.Module, values: int) -> tuple[int, int, int, int]:
    """The shape of two images: not square, and large enough for the dilation and for that many values per channel."""
    convs = _convs(block)
    stride = math.prod(c.stride[0] for c in convs)
    side = stride * math.isqrt(values // (2 * min(c.out_channels for c in convs)))
    side = max(side, 5 + 2 * max(stride, *(c.dilation[0] for c in convs)))
    return 2, convs[0].in_channels, side, side + 1


class OneTensor(nn.Module):
    """A network whose outputs are joined into one tensor and whose runs draw the same random numbers.

    Args:
        network: takes [N, C, H, W]. Its dropout is switched off in place, because random numbers differ by dtype.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for m in network.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return torch.cat([t.flatten(1) for t in tree_leaves(self.network(x)) if isinstance(t, Tensor)], 1)


def _from_library(name: str) -> nn.Module:
    """The network "library/name" with random weights; a UsageError if there is none."""
    library, _, of = name.partition("/")
    try:
        return OneTensor(LIBRARIES[library](importlib.import_module(library), of))
    except ImportError as error:
        raise UsageError(f"--models {name}: {library} can't be imported: {error}") from error
    except Exception as error:  # each library raises an exception of its own
        raise UsageError(f"--models {name}: {library} builds no such network: {error}") from error


def subjects(names: Sequence[str]) -> Iterator[Subject]:
    """The subjects for the named models.

    These are every kind of block, first at its narrowest and then each model's widest; every network with a kind of
    block that no earlier network of its class had; and, for other libraries ("library/name"), the whole network.
    """
    seen_blocks: set[str] = set()
    seen_kinds: set[tuple[str, ...]] = set()
    seen_in_network: set[tuple[str, ...]] = set()
    for name in names:
        if "/" in name:
            yield Subject(f"whole {name}", name, partial(_from_library, name), True, (4, 3, 64, 64), (4, 3, 64, 64))
            continue
        for variation, kwargs in {"": {}, **VARIATIONS.get(name, {})}.items():
            with torch.device("meta"):
                network = _network(name, kwargs)
            blocks = [m for m in network.modules() if isinstance(m, BLOCKS)]
            kinds = {_kind(block) for block in blocks}
            firsts = {_kind(block): block for block in reversed(blocks)}  # the narrowest of each kind
            for block in [*(block for kind, block in firsts.items() if kind not in seen_kinds), blocks[-1]]:
                label = _describe(block)
                if label not in seen_blocks:
                    shapes = _input_of(block, 0), _input_of(block, 100_000)
                    yield Subject(label, name, partial(_rebuild, block), False, *shapes)
                seen_blocks.add(label)
            in_network = {(type(network).__name__, *kind) for kind in kinds}
            if in_network - seen_in_network:
                large = isinstance(network, models.ResNet)
                stem = f"stem {_shape_of(network.conv1)}{', max-pool' if large else ''}"
                if stem not in seen_blocks:
                    yield Subject(stem, name, partial(_stem, name, kwargs), False, (2, 3, 24, 22), (2, 3, 96, 97))
                seen_blocks.add(stem)
                shape = (4, 3, 48, 48) if large else (8, 3, 32, 32)
                label = f"whole {name}, {variation}" if variation else f"whole {name}"
                yield Subject(label, name, partial(_network, name, kwargs), True, shape, shape)
            seen_kinds |= kinds
            seen_in_network |= in_network
