"""Finds the classifier's head after a row: the mean of each channel and a linear layer."""

from __future__ import annotations

import torch
from torch import fx

from fused_resnet.backends.steps import AVERAGED
from fused_resnet.fusion.matches import HeadMatch
from fused_resnet.fusion.table import arguments, averages, kind_of, only_user, value_of
from fused_resnet.fusion.units import through_dropouts

# Calls that make [N, C] of [N, C, 1, 1], by the shape of their result.
_FLATTENS = (torch.flatten, "flatten", torch.reshape, "reshape", "view")


def head_of(end: fx.Node) -> HeadMatch | None:
    """The head that alone uses a value on the CPU: linear(flatten(mean of value)), dropouts in between."""
    value, mean = value_of(end), only_user(end)
    if value is None or mean is None or value.dtype not in AVERAGED or not value.is_cpu or not averages(mean, end):
        return None
    nodes = [mean]
    flat = only_user(mean)
    if flat is not None and flat.target in _FLATTENS and flat.args[:1] == (mean,):
        nodes.append(flat)
    means = value_of(nodes[-1])
    if means is None or means.dim() != 2 or means.shape[1] != value.shape[1]:
        return None
    last, passed = through_dropouts(nodes[-1])
    linear = only_user(last)
    given = arguments(linear) if linear is not None and kind_of(linear) == "linear" else None
    if linear is None or given is None or given["input"] is not last:
        return None
    tensors = [t for t in (given["weight"], given["bias"]) if t is not None]
    if not all((v := value_of(t)) is not None and v.dtype == value.dtype for t in tensors):
        return None
    return HeadMatch([*nodes, *passed, linear], given["weight"], given["bias"])
