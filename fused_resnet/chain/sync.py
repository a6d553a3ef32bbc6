"""Statistics that the processes of a group share (SyncBatchNorm): their communication and merging.

    forward    gather (count, mean, M2) of each process's y; every process merges all of them by Chan's formula:
               count = sum n_r      mean = sum n_r mean_r / count      M2 = sum M2_r + n_r (mean_r - mean)^2
    backward   dy = A dz + B (y - mu) + C, with the sums of dz and dz (y - mu) added up over all processes;
               dgamma and dbeta stay each process's own, like its weights' gradients: DDP averages them

All processes merge the same partials in the same order, so they get the same bits and their running statistics stay
equal. Units that are ready together share a collective. The count is a tensor, because reading it would make the CPU
wait for the GPU. Groups are identified by their names, as in ``torch.ops._c10d_functional``.

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
    """Whether it is a process group that contains this process."""
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def name_of(group: ProcessGroup | None) -> str | None:
    """The name by which operators know the group; None if this process is alone in it."""
    return group.group_name if group is not None and dist.get_world_size(group) > 1 else None


def by_group(units: Mapping[int, UnitSpec]) -> list[tuple[str, list[int]]]:
    """The units that share statistics, by group. Groups are in the order of the units, the same in all processes."""
    found: dict[str, list[int]] = {}
    for i, unit in units.items():
        if unit.group is not None:
            found.setdefault(unit.group, []).append(i)
    return list(found.items())


# ---------------------------------------------------------------------------------------------------- statistics
def statistics(own: Sequence[Sequence[Tensor]], y: Tensor, group: str) -> list[list[Tensor]]:
    """Merges every process's own statistics into those of all processes.

    Args:
        own: (mean, biased variance) of one or more units, [C_i] each. y: the y of one of them, [N, C, H, W]; all have
            its N, H and W. N may be 0.

    Returns:
        [mean, biased variance, count] of each unit; count is [1].

    Raises:
        ValueError: there is one value per channel over all processes. Every process raises it.
    """
    count = y.numel() // y.shape[1]
    mean, var = own[0] if len(own) == 1 else map(torch.cat, zip(*own, strict=True))
    partials = _gather(torch.cat([mean, var * count, mean.new_full((1,), count)]), group)
    total, mean, m2 = merge(partials[:, -1:], *partials[:, :-1].chunk(2, 1))
    # if a process has more than one value, so does the group: then nothing waits for a GPU here
    if count <= 1 and total.device.type != "meta" and total.item() <= 1:
        raise ValueError(
            f"x: expected more than 1 value per channel over the {len(partials)} processes of the group when training, "
            f"got {int(total)}; input size of the BatchNorm here: {tuple(y.shape)}"
        )
    var = m2 / total
    if len(own) == 1:
        return [[mean, var, total]]
    sizes = [len(m) for m, _ in own]
    # an operator's outputs must not share memory
    return [[m.clone(), v.clone(), total.clone()] for m, v in zip(mean.split(sizes), var.split(sizes), strict=True)]


def merge(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, M2) of the union of R sets, from each set's: [R, 1], [R, C], [R, C]."""
    total = count.sum(0)
    # relative to the first set's mean, so that little precision is lost if |mean| is far above the standard deviation
    delta = mean - mean[0]
    shift = (delta * (count / total)).sum(0)
    return total, mean[0] + shift, (m2 + count * (delta - shift).square()).sum(0)


def means(own: Sequence[Sums], count: Tensor, group: str) -> list[Sums]:
    """The sums over all processes divided by the total ``count``: the means of dz and dz (y - mu).

    ``own``: this process's sums for one or more units, [C_i] each.
    """
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
