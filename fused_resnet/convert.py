"""fuse, unfuse, freeze: the blocks of a model that exists, run as chains and back again.

``fuse`` changes a block's class to a subclass of its own class whose forward runs the block's own children as one
chain. Nothing is copied or renamed: parameters, buffers, names, hooks on the block, isinstance and pickling stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.backends import warn_once
from fused_resnet.freezing import Frozen, freeze_chains
from fused_resnet.modules import ChainModules, UnitModules, has_hooks, run_row

# What networks of the known classes call their stages.
_STAGES = ("layer1", "layer2", "layer3", "layer4")


class CannotFuse(Exception):
    """A block that is left as it is; the message is the reason."""


@dataclass(frozen=True)
class Block:
    """How a class of residual blocks names its children: the units' convs and norms, one activation, the shortcut."""

    units: int
    shortcut: bool = True
    method: str = "forward"

    def chain(self, m: nn.Module) -> ChainModules:
        """The block's children as a chain.

        Raises:
            CannotFuse: they are not what the class's own constructor makes.
        """
        relu = _child(m, "relu")
        units = [
            UnitModules(_child(m, f"conv{i}"), _child(m, f"bn{i}"), relu)  # type: ignore[arg-type]
            for i in range(1, self.units + 1)
        ]
        return ChainModules(units, *(_shortcut(m) if self.shortcut else (None,)))

    def forward(self, m: Any, x: Tensor, chain: ChainModules) -> Tensor:
        """The whole of the class's ``method``."""
        return chain(x)


@dataclass(frozen=True)
class Network:
    """How a class of networks names its stem; stages, pooling and classifier follow."""

    stem: tuple[str, ...] = ("conv1", "bn1", "relu", "maxpool")
    method: str = "forward"

    def chain(self, m: nn.Module) -> ChainModules:
        """The stem as a chain (raises CannotFuse as ``Block.chain`` does)."""
        conv, bn, act, *pool = (_child(m, name) for name in self.stem)
        if pool and type(pool[0]) is not nn.MaxPool2d:
            raise CannotFuse(f"{type(pool[0]).__name__} in the place of MaxPool2d")
        return ChainModules([UnitModules(conv, bn, act)], max_pool=pool[0] if pool else None)  # type: ignore[arg-type]

    def forward(self, m: Any, x: Tensor, chain: ChainModules) -> Tensor:
        """The whole of the class's ``method``."""
        x = chain(x)
        for stage in _STAGES:
            if hasattr(m, stage):
                x = getattr(m, stage)(x)
        return m.fc(torch.flatten(m.avgpool(x), 1))


# Classes by name, so that no library is imported that the user doesn't have.
PATTERNS: dict[str, Block | Network] = {
    "fused_resnet.models.resnet.BasicBlock": Block(2),
    "fused_resnet.models.resnet.Bottleneck": Block(3),
    "fused_resnet.models.resnet.PlainBlock": Block(2, shortcut=False),
    "fused_resnet.models.resnet.ResNet": Network(),
    "fused_resnet.models.cifar.CifarResNet": Network(("conv1", "bn1", "relu")),
    "torchvision.models.resnet.BasicBlock": Block(2),
    "torchvision.models.resnet.Bottleneck": Block(3),
    "torchvision.models.resnet.ResNet": Network(method="_forward_impl"),
}


def _child(m: nn.Module, name: str) -> nn.Module:
    child = getattr(m, name, None)
    if not isinstance(child, nn.Module):
        raise CannotFuse(f"no module {name!r}")
    return child


def _shortcut(m: nn.Module) -> tuple[UnitModules | str | None, int, nn.AvgPool2d | None]:
    """(shortcut, stride, average pool) of a block's ``downsample``."""
    down = getattr(m, "downsample", None)
    if down is None:
        return "identity", 1, None
    if has_hooks(down):
        raise CannotFuse(f"the shortcut, a {type(down).__name__}, has hooks")
    if type(down).__name__ == "ZeroPadShortcut" and type(down).__module__ == "fused_resnet.models.cifar":
        return "pad", down.stride, None
    if type(down) is nn.Identity:
        return "identity", 1, None
    if type(down) is not nn.Sequential:
        raise CannotFuse(f"shortcut of type {type(down).__name__}")
    layers = [layer for layer in down if type(layer) is not nn.Identity]
    pool = layers.pop(0) if layers and type(layers[0]) is nn.AvgPool2d else None
    if len(layers) != 2:
        raise CannotFuse(f"shortcut of {', '.join(type(layer).__name__ for layer in down)}")
    return UnitModules(layers[0], layers[1]), 1, pool  # type: ignore[arg-type, return-value]


# ---------------------------------------------------------------------------------------------------- fused classes
class FusedModule:
    """What a fused class adds to the class it was made from."""

    _fr_original: type[nn.Module]
    _fr_pattern: Block | Network

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__()
        return _rebuild, (self._fr_original,), state


def _rebuild(original: type[nn.Module]) -> nn.Module:
    """Unpickling and deepcopy: an empty module of the fused class."""
    fused: Any = _fused_class(original)
    made: nn.Module = fused.__new__(fused)
    return made


class FusedSequential(FusedModule, nn.Sequential):
    """A stage of a network: consecutive blocks that can run as chains run as one row of chains, as long as nobody could
    tell that they are not called themselves; everything else is called as by any nn.Sequential."""

    _fr_original = nn.Sequential

    def forward(self, input: Any) -> Any:
        for blocks in rows_of(self):
            chains = [chain for _, chain in blocks if chain is not None]
            input = run_row(chains, input) if len(chains) > 1 else blocks[0][0](input)
        return input


def rows_of(stage: nn.Sequential) -> list[list[tuple[nn.Module, ChainModules | None]]]:
    """The stage's children as they run now: rows of blocks with their chains, and those called alone."""
    rows: list[list[tuple[nn.Module, ChainModules | None]]] = []
    for m in stage:
        chain = _row_chain(m)
        # a block that comes twice finds its running statistics updated the second time
        if chain is not None and rows and rows[-1][0][1] is not None and all(m is not other for other, _ in rows[-1]):
            rows[-1].append((m, chain))
        else:
            rows.append([(m, chain)])
    return rows


def _row_chain(m: nn.Module) -> ChainModules | None:
    """The chain of a block which nothing but its own forward would see called; else None."""
    if not isinstance(m, FusedModule) or isinstance(m, FusedSequential) or not isinstance(m._fr_pattern, Block):
        return None
    own = type(m).forward is _FUSED[m._fr_original].forward and type(m).__call__ is nn.Module.__call__
    if not own or has_hooks(m) or "forward" in m.__dict__ or m._compiled_call_impl is not None:
        return None
    try:
        chain = m._fr_pattern.chain(m)
    except CannotFuse:
        return None
    return chain if chain.why_not() is None else None


_FUSED: dict[type, Any] = {nn.Sequential: FusedSequential}


def _fused_class(original: type) -> type:
    """The subclass of ``original`` whose forward runs a chain; one per class and process."""
    if original not in _FUSED:
        _FUSED[original] = _make_fused_class(original)
    return _FUSED[original]


@lru_cache
def _unfused_class(cls: Any) -> type:
    """``cls`` without what ``fuse`` put into it, also where others derived a class from the fused one since, as
    torch.distributed.fsdp.fully_shard does."""
    if "_fr_original" in vars(cls):
        original: type = cls._fr_original
        return original
    bases = tuple(_unfused_class(base) if issubclass(base, FusedModule) else base for base in cls.__bases__)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__.replace("Fused", "", 1), bases, own)


def _make_fused_class(original: Any) -> type:
    pattern = _pattern(original)
    assert pattern is not None

    def forward(self: Any, x: Tensor) -> Tensor:
        try:
            chain = pattern.chain(self)
            reason = chain.why_not()
        except CannotFuse as because:
            reason = str(because)
        if reason is not None:
            if not torch.compiler.is_compiling():
                warn_once(f"a fused {original.__name__} runs plain: {reason}")
            return getattr(original, pattern.method)(self, x)
        return pattern.forward(self, x, chain)

    forward.__doc__ = getattr(original, pattern.method).__doc__
    name = f"Fused{original.__name__}"
    return type(
        name,
        (FusedModule, original),
        {"_fr_original": original, "_fr_pattern": pattern, pattern.method: forward, "__module__": __name__},
    )


def _pattern(cls: type) -> Block | Network | None:
    """The pattern of the class, or of the base class whose forward it still uses."""
    for base in cls.__mro__:
        pattern = PATTERNS.get(f"{base.__module__}.{base.__qualname__}")
        if pattern is not None:
            same = all(getattr(cls, f) is getattr(base, f) for f in {"forward", pattern.method})
            return pattern if same else None
    return None


def _known(cls: type) -> bool:
    return any(f"{base.__module__}.{base.__qualname__}" in PATTERNS for base in cls.__mro__)


# ---------------------------------------------------------------------------------------------------- fuse and back
def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, ChainModules | None, str | None]]:
    """(name, module, its chain, why it can't be fused) of every block and network of a known class."""
    owners: dict[int, list[str]] = {}
    for name, m in model.named_modules(remove_duplicate=False):
        for child_name, child in m.named_children():
            if isinstance(child, nn.Conv2d | nn.BatchNorm2d | nn.SyncBatchNorm):
                owners.setdefault(id(child), []).append(f"{name}.{child_name}".lstrip("."))
    for name, m in model.named_modules():
        if isinstance(m, FusedSequential):
            continue
        if isinstance(m, FusedModule):
            pattern: Block | Network | None = m._fr_pattern
        elif _known(type(m)):
            pattern = _pattern(type(m))
        else:
            continue
        if pattern is None:
            yield name, m, None, f"{type(m).__name__} has a forward of its own"
            continue
        if "forward" in m.__dict__ or pattern.method in m.__dict__:
            yield name, m, None, "its forward was replaced"
            continue
        try:
            chain = pattern.chain(m)
        except CannotFuse as because:
            yield name, m, None, str(because)
            continue
        reason = chain.why_not()
        for unit in chain.all_units:
            for child in unit:
                if len(owners.get(id(child), ())) > 1:
                    reason = f"a {type(child).__name__} is shared: {', '.join(owners[id(child)])}"
        yield name, m, chain, reason


def fuse(model: nn.Module) -> nn.Module:
    """Swaps the residual blocks, their stages and the stem of ``model`` for fused ones, in place, and returns it.

    Parameters, buffers, names, ``state_dict``, optimizers made before or after, hooks on the blocks: everything stays.
    A block that can't be fused stays as it is; ``explain`` says why. An nn.Sequential of blocks becomes one that runs
    them in rows. Fusing twice changes nothing. SyncBatchNorm and DistributedDataParallel may come before or after; a
    SyncBatchNorm of a fused block shares its statistics with the other processes of its group on any device.

    Args:
        model: fused_resnet's or torchvision's ResNet family (ResNet, wide, ResNeXt), or any module that contains such.

    Returns:
        The same ``model``.

    Raises:
        TypeError: not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    found = False
    for _, m, _, reason in list(candidates(model)):
        if reason is None:
            found = True
            if not isinstance(m, FusedModule):
                m.__class__ = _fused_class(type(m))
    for m in model.modules():
        if type(m) is nn.Sequential and any(len(blocks) > 1 for blocks in rows_of(m)):
            m.__class__ = FusedSequential
    if not found:
        warn_once(f"fuse: nothing in this {type(model).__name__} could be fused; print(fused_resnet.explain(model))")
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every fused module of ``model`` its own class back, in place, and returns it.

    Raises:
        TypeError: not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for m in model.modules():
        if isinstance(m, FusedModule):
            cls: Any = type(m)
            m.__class__ = _unfused_class(cls)
    return model


def freeze(
    model: nn.Module,
    example: Tensor,
    *,
    dtype: torch.dtype | None = None,
    cuda_graph: bool = False,
    portable: bool = False,
) -> Frozen:
    """A copy of ``model`` for inference only: BatchNorm folded into the weights, weights prepacked for ``example``.

    Args:
        model: in any mode; it is not changed. Running statistics are used as they are now. What can't be frozen stays
            as it is, in eval mode; ``explain`` of the result says why.
        example: an input, [N, C, H, W] on the device to run on; other batch and image sizes work too, each packs its
            weights at its first call where it needs another layout of them.
        dtype: float32, bfloat16 or float16, the dtype of the result; None keeps the parameters' dtype. A CPU without a
            fast 16-bit matrix unit computes 16-bit models in float32 (see ``fused-resnet env``).
        cuda_graph: start the forward as one CUDA graph per input shape (the first 8; other shapes run without one). The
            result is a copy, the caller's own. A model that can't be recorded runs without, with a warning.
        portable: made of PyTorch's own operators alone, so that what ``torch.export`` makes of it runs where
            fused_resnet is not installed; in ``dtype`` on every machine.

    Returns:
        A module whose forward takes x and returns what ``model.eval()(x)`` would, without gradients. Threads may call
        it at once. ``torch.export`` takes it, with dynamic shapes too.

    Raises:
        TypeError, ValueError: a model that is no nn.Module, an example that is no [N, C, H, W] floating tensor, a
            dtype that is not floating, cuda_graph with an example that is not on a CUDA device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")

    def chains(copied: nn.Module) -> Iterator[tuple[str, nn.Module, ChainModules, Callable[[nn.Module], None]]]:
        for name, m, chain, reason in list(candidates(unfuse(copied))):
            if chain is not None and reason is None:
                yield name, m, chain, _replacer(copied, name, m)

    def networks(frozen: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        for m in frozen.modules():
            pattern = _pattern(type(m))
            if isinstance(pattern, Network):
                yield m, (pattern.stem[0], *_STAGES)

    return freeze_chains(model, example, dtype, cuda_graph, portable, chains, networks)


def _replacer(model: nn.Module, name: str, m: nn.Module) -> Callable[[nn.Module], None]:
    """How a frozen chain takes the place of a block, or of the stem's first module (the others become identities)."""
    pattern = _pattern(type(m))
    if isinstance(pattern, Network):

        def replace_stem(frozen: nn.Module) -> None:
            first, *others = pattern.stem
            setattr(m, first, frozen)
            for other in others:
                setattr(m, other, nn.Identity())

        return replace_stem
    parent, _, child = name.rpartition(".")
    return lambda frozen: setattr(model.get_submodule(parent), child, frozen)
