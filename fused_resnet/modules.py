"""Chains of nn.Modules. The BatchNorm2d children hold the running statistics, under PyTorch's names."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fused_resnet import reference
from fused_resnet.arguments import pair
from fused_resnet.checks import autocasts
from fused_resnet.functional import in_backward, residual_chain
from fused_resnet.patterns import norm_kind, original, same_as
from fused_resnet.spec import Act, ConvSpec, PoolSpec
from fused_resnet.units import Chain, Unit

# Activation modules and the name of the attribute that holds their parameter.
ACT_MODULES: dict[type[nn.Module], tuple[str, str]] = {
    nn.Identity: ("identity", ""),
    nn.ReLU: ("relu", ""),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.ELU: ("elu", "alpha"),
    nn.Sigmoid: ("sigmoid", ""),
    nn.SiLU: ("silu", ""),
    nn.ReLU6: ("relu6", ""),
    nn.Hardswish: ("hardswish", ""),
}


def graphed() -> bool:
    """Whether a tool records a graph: dynamo, ``torch.jit.trace``, ``torch.export``, either way of
    ``torch.onnx.export``.

    Modules then run their own forwards, so that the graph is the plain model's.
    """
    return torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing() or torch.compiler.is_exporting()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has forward, pre-forward or backward hooks."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every (name, module) in the model, parents first. A module in several places appears once per place.

    This is ``named_modules(remove_duplicate=False)``, but it also works for modules with their own ``__eq__`` or
    without a hash.
    """
    rest: list[tuple[str, nn.Module, tuple[int, ...]]] = [("", model, ())]
    while rest:
        name, m, above = rest.pop()
        yield name, m
        if id(m) not in above:  # otherwise the module contains itself
            children = [(k, child) for k, child in m._modules.items() if child is not None]
            rest += [(f"{name}.{k}".lstrip("."), child, (*above, id(m))) for k, child in reversed(children)]


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Each module of the model once, with its first name, parents first."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, m in places(model):
        found.setdefault(id(m), (name, m))
    return list(found.values())


def shared_by(bn: nn.Module) -> dist.ProcessGroup | None:
    """The process group that shares this norm's statistics in training.

    It is a SyncBatchNorm's group; None if there is no group, or if this process is alone in it.
    """
    if original(bn) is not nn.SyncBatchNorm or not dist.is_available() or not dist.is_initialized():
        return None
    given: Any = bn.process_group
    group: dist.ProcessGroup | None = dist.group.WORLD if given is None else given
    return group if dist.get_world_size(group) > 1 else None


def copy_of(model: nn.Module) -> nn.Module:
    """``copy.deepcopy`` without autograd history, which a ScriptModule's copy would have. Process groups are shared."""
    groups = [m.process_group for _, m in named_modules(model) if isinstance(m, nn.SyncBatchNorm)]
    with torch.no_grad():
        return copy.deepcopy(model, {id(group): group for group in groups if group is not None})


def act_of(module: nn.Module | Act) -> Act:
    """The table's entry for an activation module.

    Raises:
        KeyError: the module is not in the table.
    """
    if isinstance(module, Act):
        return module
    name, attribute = ACT_MODULES[same_as(type(module))]
    return Act(name, getattr(module, attribute)) if attribute else Act.make(name)


@dataclass(eq=False)
class UnitModules:
    """The modules of one unit.

    ``act=None`` is the identity; an ``Act`` is an activation that is called as a function. ``bn`` may be one of
    ``patterns.NORMS``; if it has an activation, that is ``act``.
    """

    conv: nn.Conv2d | None
    bn: nn.BatchNorm2d | nn.SyncBatchNorm
    act: nn.Module | Act | None = None

    def __iter__(self) -> Iterator[nn.Module]:
        return (m for m in (self.conv, self.bn, self.act) if isinstance(m, nn.Module))

    @property
    def channels(self) -> int:
        """The number of channels of the unit's output."""
        bn = self.bn
        known = (t for t in (bn.weight, bn.running_mean) if t is not None)
        return int(next((t.shape[0] for t in known), 0)) or bn.num_features

    @property
    def frozen(self) -> bool:
        """Whether the norm never uses a batch's statistics, in any mode."""
        kind = norm_kind(original(self.bn))
        return kind is not None and kind[0]

    def why_not(self) -> str | None:
        """The reason why a chain can't run these modules as they are now, or None."""
        for m in self:
            if has_hooks(m):
                return f"a {type(m).__name__} has hooks"
            if "forward" in m.__dict__:
                return f"the forward of a {type(m).__name__} was replaced"
        conv, bn, act = self.conv, self.bn, self.act
        if conv is not None:
            if same_as(type(conv)) is not nn.Conv2d:
                return f"{type(conv).__name__} in the place of Conv2d"
            if conv.padding_mode != "zeros":
                return f"padding_mode {conv.padding_mode!r}"
            dilation = pair(conv.dilation, "dilation", 1)
            if conv.padding == "same" and any(
                d * (k - 1) % 2 for d, k in zip(dilation, conv.weight.shape[2:], strict=True)
            ):
                return "padding 'same' with an even kernel"
        kind = norm_kind(original(bn))
        if kind is None:
            return f"{type(bn).__name__} in the place of BatchNorm2d"
        if kind[1] and (type(bn.drop) is not nn.Identity or (act is not bn.act and type(bn.act) is not nn.Identity)):
            return f"a {type(bn).__name__} that drops, or whose activation changed"
        if isinstance(act, nn.Module) and same_as(type(act)) not in ACT_MODULES:
            return f"activation {type(act).__name__}"
        if conv is not None and conv.out_channels != self.channels:
            return f"{type(bn).__name__}({self.channels}) after a convolution with {conv.out_channels} channels"
        return None

    def unit(self) -> Unit:
        """The tensors and hyper-parameters as they are now, for the functional API."""
        conv, bn = self.conv, self.bn
        training = bn.training and not self.frozen
        averaging = training and bn.track_running_stats
        momentum = bn.momentum if not self.frozen else 0.0
        if momentum is None:
            momentum = (
                1.0 / float(bn.num_batches_tracked + 1) if averaging and bn.num_batches_tracked is not None else 0.0
            )
        used = averaging or not training
        unit = Unit(
            bn_weight=bn.weight,
            bn_bias=bn.bias,
            running_mean=bn.running_mean if used else None,
            running_var=bn.running_var if used else None,
            act=act_of(self.act) if self.act is not None else None,
            eps=bn.eps,
            momentum=momentum,
            training=training or bn.running_mean is None,
            process_group=shared_by(bn) if training else None,
        )
        if conv is not None:
            unit.weight, unit.bias, unit.groups = conv.weight, conv.bias, conv.groups
            unit.stride, unit.padding, unit.dilation = conv.stride, conv.padding, conv.dilation
        return unit

    def count_batch(self) -> None:
        """Counts num_batches_tracked, after the chain has run."""
        bn = self.bn
        if self.frozen or not (bn.training and bn.track_running_stats):
            return
        if bn.num_batches_tracked is not None and not in_backward():
            bn.num_batches_tracked.add_(1)


@dataclass(eq=False)
class ChainModules:
    """The modules of a chain. They are read from a block each time that it runs, so that changes are seen.

    Args:
        units: first to last; the last one's act comes after the add.
        shortcut: None (plain), "identity", "pad" (option A, with ``stride``), or the projection's modules.
        avg_pool: the pool before the projection. max_pool: the pool at the end (a stem); then there is no shortcut.
    """

    units: Sequence[UnitModules]
    shortcut: UnitModules | str | None = None
    stride: int = 1
    avg_pool: nn.AvgPool2d | None = None
    max_pool: nn.MaxPool2d | None = None

    @property
    def all_units(self) -> list[UnitModules]:
        """The units, followed by the projection."""
        return [*self.units, *([self.shortcut] if isinstance(self.shortcut, UnitModules) else [])]

    def why_not(self) -> str | None:
        """The reason why the chain can't run these modules as they are now, or None."""
        if nn_module._has_any_global_hook():
            return "global module hooks are registered"
        for unit in self.all_units:
            if reason := unit.why_not():
                return reason
        m, a = self.max_pool, self.avg_pool
        if m is not None and (m.return_indices or m.ceil_mode or pair(m.dilation, "dilation", 1) != (1, 1)):
            return "max-pool with return_indices, ceil_mode or dilation"
        if a is not None and a.divisor_override is not None:
            return "average pool with divisor_override"
        return None

    def avg_pool_spec(self) -> PoolSpec | None:
        a = self.avg_pool
        return PoolSpec.make(a.kernel_size, a.stride, a.padding, a.ceil_mode, a.count_include_pad) if a else None

    def max_pool_spec(self) -> PoolSpec | None:
        m = self.max_pool
        return PoolSpec.make(m.kernel_size, m.stride, m.padding) if m else None

    def _recompute(self, x: Tensor) -> bool:
        """Whether to convolve again in the backward: for a stem in 32 bits, whose raw output is the largest tensor."""
        dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
        one_conv = len(self.units) == 1 and self.units[0].conv is not None
        return self.max_pool is not None and one_conv and dtype.itemsize > 2

    def block(self) -> Chain:
        """The tensors and hyper-parameters as they are now, for the functional API."""
        shortcut = self.shortcut.unit() if isinstance(self.shortcut, UnitModules) else self.shortcut
        return Chain([u.unit() for u in self.units], shortcut, self.stride, self.avg_pool_spec())

    def out_shape(self, x: Tensor) -> tuple[int, ...]:
        """The number of channels of the last unit."""
        shape = tuple(x.shape)
        for conv in (u.conv for u in self.units):
            if conv is not None:
                c = ConvSpec.make(conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups)
                shape = (shape[0], conv.weight.shape[0], *c.out_size(shape[2:], conv.weight.shape[2:]))
        return shape

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Runs the chain. ``residual``: a given summand, for a chain without a shortcut."""
        other_dtype = residual is not None and residual.dtype != x.dtype and not autocasts(x)
        if residual is not None and (other_dtype or tuple(residual.shape) != self.out_shape(x)):
            # the add converts or broadcasts a summand, so it is PyTorch's add
            *before, last = self.units
            out = ChainModules([*before, UnitModules(last.conv, last.bn)])(x) + residual
            return reference.act(out, act_of(last.act)) if last.act is not None else out
        block = self.block()
        out = residual_chain(
            x, block.units, shortcut=block.shortcut, shortcut_stride=block.shortcut_stride,
            shortcut_pool=block.shortcut_pool, residual=residual, max_pool=self.max_pool_spec(),
            recompute=self._recompute(x),
        )  # fmt: skip
        for unit in self.all_units:
            unit.count_batch()
        return out


class ConvBNAct(nn.Module):
    """conv -> BatchNorm -> act as one module, children ``conv``, ``bn`` and ``act``.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as ``torch.nn.Conv2d``.
        padding: as ``torch.nn.Conv2d``; None keeps the image's size at stride 1 (odd kernels).
        act: a name of ``fused_resnet.spec.ACTIVATIONS``, a (name, parameter) pair or None.
        eps, momentum: as ``torch.nn.BatchNorm2d``.

    Shape: [N, in_channels, H, W] -> [N, out_channels, oH, oW]; dtype and layout of the input.

    Raises:
        ValueError, TypeError: as ``fused_resnet.functional.conv_bn_act``.

    Source: ``torch.nn.Sequential(Conv2d, BatchNorm2d, ReLU)``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        act: str | tuple[str, float] | Act | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        if padding is None:
            k, d = pair(kernel_size, "kernel_size", 1), pair(dilation, "dilation", 1)
            padding = (d[0] * (k[0] - 1) // 2, d[1] * (k[1] - 1) // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum)
        a = Act.make(act)
        kind, attribute = next((k, v[1]) for k, v in ACT_MODULES.items() if v[0] == a.name)
        self.act = kind(**({attribute: a.param} if attribute else {}))

    def modules_of_unit(self) -> UnitModules:
        """The children as a chain's unit."""
        return UnitModules(self.conv, self.bn, self.act)

    def forward(self, x: Tensor) -> Tensor:
        if graphed():
            plain: Tensor = self.act(self.bn(self.conv(x)))
            return plain
        return _run_or_raise(ChainModules([self.modules_of_unit()]), x)


class ResidualChain(nn.Module):
    """A residual block of any number of units: act(unit_k(... unit_1(x)) + shortcut(x)).

    Args:
        units: the ``ConvBNAct``s in order; the last one's act is applied after the add.
        shortcut: "identity", None (a plain block) or a ``ConvBNAct`` with ``act=None``, the projection.

    Shape: [N, C, H, W] -> [N, out_channels of the last unit, oH, oW]; dtype and layout of the input.

    Raises:
        ValueError, TypeError: as ``fused_resnet.functional.residual_chain``.

    Source: arXiv 1512.03385, equations (1) and (2).

    Example:
        >>> block = ResidualChain([ConvBNAct(64, 64, 1), ConvBNAct(64, 64, 3), ConvBNAct(64, 256, 1)],
        ...                       shortcut=ConvBNAct(64, 256, 1, act=None))
    """

    def __init__(self, units: Sequence[ConvBNAct], shortcut: ConvBNAct | str | None = "identity") -> None:
        super().__init__()
        for i, unit in enumerate(units):
            if not isinstance(unit, ConvBNAct):
                raise TypeError(f"units[{i}]: expected a ConvBNAct, got {type(unit).__name__}")
        if not units:
            raise ValueError("units: expected at least one ConvBNAct, got none")
        if not (shortcut in (None, "identity") or isinstance(shortcut, ConvBNAct)):
            raise ValueError(f"shortcut: expected 'identity', None or a ConvBNAct, got {shortcut!r}")
        self.units = nn.ModuleList(units)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        if graphed():
            return self._plain(x)
        units = [u.modules_of_unit() for u in self.units]  # type: ignore[operator]
        shortcut = self.shortcut
        return _run_or_raise(
            ChainModules(units, shortcut.modules_of_unit() if isinstance(shortcut, ConvBNAct) else shortcut), x
        )

    def _plain(self, x: Tensor) -> Tensor:
        """Runs the block by PyTorch's modules."""
        *before, last = self.units
        h = x
        for unit in before:
            h = unit(h)
        out: Tensor = last.bn(last.conv(h))  # type: ignore[operator]
        if self.shortcut is not None:
            out = out + (self.shortcut(x) if isinstance(self.shortcut, ConvBNAct) else x)
        return last.act(out)  # type: ignore[operator]


def _run_or_raise(chain: ChainModules, x: Tensor) -> Tensor:
    if reason := chain.why_not():
        raise RuntimeError(f"this module runs its children as one chain, which can't be done here: {reason}")
    return chain(x)
