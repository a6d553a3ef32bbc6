"""Signals [N, C, L] run as images [N, C, 1, L]: a convolution of one dimension is one of two with a kernel of height 1.

All but the weights and the geometry stays as it is. The weights are views, x is copied to channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar, overload

import torch
from torch import Tensor

from fused_resnet.base.arguments import integers
from fused_resnet.chain import checks
from fused_resnet.chain.units import Chain, Unit
from fused_resnet.spec import PoolSpec

T = TypeVar("T")


@overload
def image(t: Tensor) -> Tensor: ...
@overload
def image(t: Tensor | None) -> Tensor | None: ...
def image(t: Tensor | None) -> Tensor | None:
    """[N, C, L] as [N, C, 1, L]. A tensor of other dimensions stays as it is: its chain reports it."""
    return t.unsqueeze(2) if isinstance(t, Tensor) and t.dim() == 3 else t


@overload
def input(t: Tensor) -> Tensor: ...
@overload
def input(t: Tensor | None) -> Tensor | None: ...
def input(t: Tensor | None) -> Tensor | None:
    """A signal as an image in channels_last, the layout that the kernels are for: signals have no such layout."""
    made = image(t)
    if made is None or t is made:
        return made
    return made.contiguous(memory_format=torch.channels_last)


def output(t: Tensor) -> Tensor:
    """The inverse of ``input``: [N, C, L], dense."""
    return t.squeeze(2).contiguous()


def unit(u: Unit) -> Unit:
    """A unit of a signal as that of an image.

    Raises:
        TypeError, ValueError: its weight is none of a signal's convolution.
    """
    if u.weight is None:
        return u
    checks.check_tensor("weight", u.weight)
    checks.check_dims(u, 1)
    padding = u.padding if isinstance(u.padding, str) else sizes(u.padding, "padding", 0)
    stride, dilation = sizes(u.stride, "stride", 1), sizes(u.dilation, "dilation", 1)
    return replace(u, weight=image(u.weight), stride=stride, padding=padding, dilation=dilation)


def sizes(value: int | Sequence[int], name: str, same: int) -> tuple[int, ...]:
    """An integer of a signal's convolution as (height, width). ``same``: the height that changes nothing."""
    return same, *integers(value, name, same, 1)


def pool(p: PoolSpec | None) -> PoolSpec | None:
    """A window of a signal as that of an image."""
    if not isinstance(p, PoolSpec) or len(p.kernel) != 1:
        return p
    return replace(p, kernel=(1, *p.kernel), stride=(1, *p.stride), padding=(0, *p.padding))


def chain(c: Chain) -> Chain:
    """A chain of a signal as that of an image."""
    shortcut = unit(c.shortcut) if isinstance(c.shortcut, Unit) else c.shortcut
    stride = sizes(c.shortcut_stride, "shortcut_stride", 1)
    return replace(c, units=[unit(u) for u in c.units], shortcut=shortcut, shortcut_stride=stride,
                   shortcut_pool=pool(c.shortcut_pool))  # fmt: skip
