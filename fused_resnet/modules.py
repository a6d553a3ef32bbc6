"""Chains of nn.Modules. The BatchNorm2d children hold the running statistics, under PyTorch's names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fused_resnet.base.arguments import integers
from fused_resnet.chain.call import in_backward, run
from fused_resnet.chain.units import Chain, Unit
from fused_resnet.fusion.inspection import graphed, shared_by
from fused_resnet.fusion.patterns import act_of_module, module_of_act, norm_kind, original, same_as
from fused_resnet.spec import Act

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _run(x: Tensor, units: Sequence[ConvBNAct], shortcut: ConvBNAct | str | None) -> Tensor:
    """Runs the modules as one chain. They are read in each call, so that changes are seen.

    Raises:
        RuntimeError: a chain can't run the modules as they are now.
    """
    everyone = [*units, *([shortcut] if isinstance(shortcut, ConvBNAct) else [])]
    reason = "global module hooks are registered" if nn_module._has_any_global_hook() else None
    if reason := reason or next(filter(None, (m._why_not() for m in everyone)), None):
        raise RuntimeError(f"this module runs its children as one chain, which can't be done here: {reason}")
    made = [m._unit() for m in everyone]
    out = run(x, [Chain(made[: len(units)], made[-1] if isinstance(shortcut, ConvBNAct) else shortcut)])
    for m in everyone:
        m._count_batch()
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
            k, d = integers(kernel_size, "kernel_size", 1), integers(dilation, "dilation", 1)
            padding = (d[0] * (k[0] - 1) // 2, d[1] * (k[1] - 1) // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum)
        self.act = module_of_act(Act.make(act))

    def forward(self, x: Tensor) -> Tensor:
        if graphed():
            return self.act(self.bn(self.conv(x)))
        return _run(x, [self], None)

    def _why_not(self) -> str | None:
        """The reason why a chain can't run the children as they are now, or None."""
        conv, bn, act = self.conv, self.bn, self.act
        for m in (conv, bn, act):
            if any(getattr(m, hooks) for hooks in _HOOKS):
                return f"a {type(m).__name__} has hooks"
            if "forward" in m.__dict__:
                return f"the forward of a {type(m).__name__} was replaced"
        if same_as(type(conv)) is not nn.Conv2d:
            return f"{type(conv).__name__} in the place of Conv2d"
        if conv.padding_mode != "zeros":
            return f"padding_mode {conv.padding_mode!r}"
        dilation = integers(conv.dilation, "dilation", 1)
        if conv.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(dilation, conv.weight.shape[2:])):
            return "padding 'same' with an even kernel"
        kind = norm_kind(original(bn))
        if kind is None:
            return f"{type(bn).__name__} in the place of BatchNorm2d"
        if kind[1] and (type(bn.drop) is not nn.Identity or (act is not bn.act and type(bn.act) is not nn.Identity)):
            return f"a {type(bn).__name__} that drops, or whose activation changed"
        if act_of_module(act) is None:
            return f"activation {act}"
        known = (t.shape[0] for t in (bn.weight, bn.running_mean) if t is not None)
        if conv.out_channels != (channels := next(known, 0) or bn.num_features):
            return f"{type(bn).__name__}({channels}) after a convolution with {conv.out_channels} channels"
        return None

    @property
    def _frozen(self) -> bool:
        """Whether the norm never uses a batch's statistics, in any mode."""
        kind = norm_kind(original(self.bn))
        return kind is not None and kind[0]

    def _unit(self) -> Unit:
        """The tensors and hyper-parameters as they are now, for the functional API."""
        conv, bn, frozen = self.conv, self.bn, self._frozen
        training = bn.training and not frozen
        averaging = training and bn.track_running_stats
        momentum = bn.momentum if not frozen else 0.0
        if momentum is None:
            counted = bn.num_batches_tracked if averaging else None
            momentum = 0.0 if counted is None else 1.0 / float(counted + 1)
        used = averaging or not training
        return Unit(
            weight=conv.weight,
            bn_weight=bn.weight,
            bn_bias=bn.bias,
            running_mean=bn.running_mean if used else None,
            running_var=bn.running_var if used else None,
            bias=conv.bias,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            act=act_of_module(self.act),
            eps=bn.eps,
            momentum=momentum,
            training=training or bn.running_mean is None,
            process_group=shared_by(bn) if training else None,
        )

    def _count_batch(self) -> None:
        """Counts num_batches_tracked, after the chain has run."""
        bn = self.bn
        if self._frozen or not (bn.training and bn.track_running_stats):
            return
        if bn.num_batches_tracked is not None and not in_backward():
            bn.num_batches_tracked.add_(1)


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
        return _run(x, list(self.units), self.shortcut)  # type: ignore[arg-type]

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
