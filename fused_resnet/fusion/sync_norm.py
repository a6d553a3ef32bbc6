"""A batch norm whose statistics are shared by processes, as one call of a captured graph."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from fused_resnet import functional


def group_named(name: str) -> Any:
    """The process group with a name."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    group: str,
) -> Tensor:
    """``torch.nn.SyncBatchNorm`` in training, on any device. ``group``: the name of the process group.

    Source: ``torch.nn.SyncBatchNorm``.
    """
    return functional.bn_act(
        input, weight, bias, running_mean, running_var, act=None, training=True, momentum=momentum, eps=eps,
        process_group=group_named(group),
    )  # fmt: skip
