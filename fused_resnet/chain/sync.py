"""Statistics that the processes of a group share (SyncBatchNorm): what travels between them, and how it is merged.

    forward    (count, mean, M2) of each process's y are gathered; each merges all of them, by Chan's formula:
               count = sum n_r      mean = sum n_r mean_r / count      M2 = sum M2_r + n_r (mean_r - mean)^2
    backward   dy = A dz + B (y - mu) + C with the sums of dz and dz (y - mu) over all processes, which are added up;
               dgamma and dbeta stay each process's own, as its weights' gradients do: DDP averages them

Everybody merges the same partials in the same order, so all have the same bits and running statistics stay in step.
Units that are ready together share a collective. The count is a tensor: reading it would make a CPU wait for its GPU.
Groups go by their names, as in ``torch.ops._c10d_functional``.

Source: Chan, Golub, LeVeque 1979, for any number of partials; ``torch.nn.SyncBatchNorm``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fused_resnet.backends import Sums
from fused_resnet.reference import all_reduce
from fused_resnet.spec import UnitSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# ---------------------------------------------------------------------------------------------------- groups
def is_group(value: object) -> bool:
    """Whether it is a process group, and this process in it."""
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def name_of(group: ProcessGroup | None) -> str | None:
    """The name by which operators know the group; None where there is nobody to share statistics with."""
    return group.group_name if group is not None and dist.get_world_size(group) > 1 else None


def by_group(units: Mapping[int, UnitSpec]) -> list[tuple[str, list[int]]]:
    """Which of the units share statistics over which group, the groups in the order of the units: everybody's."""
    found: dict[str, list[int]] = {}
    for i, unit in units.items():
        if unit.group is not None:
            found.setdefault(unit.group, []).append(i)
    return list(found.items())


# ---------------------------------------------------------------------------------------------------- statistics
def statistics(own: Sequence[Sequence[Tensor]], y: Tensor, group: str) -> list[list[Tensor]]:
    """The statistics of all processes, from each one's own.

    Args:
        own: (mean, biased variance) of one or more units, [C_i] each. y: of one of them, [N, C, H, W]; all are of its
            N, H and W, and N may be 0.

    Returns:
        [mean, biased variance, count] of each unit; count is [1].

    Raises:
        ValueError: one value per channel in all, on every process alike.
    """
    count = y.numel() // y.shape[1]
    mean, var = own[0] if len(own) == 1 else map(torch.cat, zip(*own, strict=True))
    partials = _gather(torch.cat([mean, var * count, mean.new_full((1,), count)]), group)
    total, mean, m2 = merge(partials[:, -1:], *partials[:, :-1].chunk(2, 1))
    # where one process has more than one value they all have, and nobody waits for this
    if count <= 1 and total.device.type != "meta" and total.item() <= 1:
        raise ValueError(
            f"x: expected more than 1 value per channel over the {len(partials)} processes of the group when training, "
            f"got {int(total)}; input size of the BatchNorm here: {tuple(y.shape)}"
        )
    var = m2 / total
    if len(own) == 1:
        return [[mean, var, total]]
    sizes = [len(m) for m, _ in own]
    # an operator's outputs share no memory
    return [[m.clone(), v.clone(), total.clone()] for m, v in zip(mean.split(sizes), var.split(sizes), strict=True)]


def merge(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, M2) of the union of R sets, from those of each: [R, 1], [R, C], [R, C]."""
    total = count.sum(0)
    # from the first set's mean on: where |mean| is far above the standard deviation, little is rounded away
    delta = mean - mean[0]
    shift = (delta * (count / total)).sum(0)
    return total, mean[0] + shift, (m2 + count * (delta - shift).square()).sum(0)


def means(own: Sequence[Sums], count: Tensor, group: str) -> list[Sums]:
    """The sums of all processes from each one's own, divided by the ``count`` of all: what dz and dz (y - mu) are on
    average. ``own``: of one or more units, [C_i] each."""
    vectors = [v for sums in own for v in sums]
    average = all_reduce(torch.cat(vectors), group) / count
    found = iter(average.split([len(v) for v in vectors]))
    return [Sums(next(found), next(found)) for _ in own]


def _gather(t: Tensor, group: str) -> Tensor:
    """Every process's ``t``, [C], in the order of their ranks: [R, C]."""
    c10d = torch.ops._c10d_functional
    size = dist.distributed_c10d._get_group_size_by_name(group)  # type: ignore[arg-type]
    found: Tensor = c10d.wait_tensor(c10d.all_gather_into_tensor(t, size, group))
    return found.view(size, -1)
