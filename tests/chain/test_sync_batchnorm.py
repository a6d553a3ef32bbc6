"""SyncBatchNorm over two and three processes: every case of sync_chains.py and sync_modules.py; and what one can see
of it without any."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import sync_chains
import sync_modules
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.chain import sync
from fused_resnet.spec import Act, ChainSpec, ConvSpec, RowSpec, ShortcutSpec, UnitSpec

if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

CASES = sync_chains.CASES | sync_modules.CASES
# Seconds for all cases of one number of processes, which capture some 40 networks; a hang is killed then.
LIMIT = 900


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, list[str]]]:
    """The processes of one number run once, when the first test asks for them."""
    found: dict[int, dict[str, list[str]]] = {}

    def of(world: int) -> dict[str, list[str]]:
        if world not in found:
            folder = tmp_path_factory.mktemp(f"world{world}")
            found[world] = processes.launch(Path(sync_modules.__file__), world, folder, LIMIT)
        return found[world]

    return of


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.full)])
def test_several_processes(world: int, case: str, verdicts: Callable[[int], dict[str, list[str]]]) -> None:
    """The case holds in every process; one that was not reached fails with the processes' last words."""
    found = verdicts(world)
    assert found.get(case, found["(log)"]) == ["ok"] * world, "\n".join(found.get(case, found["(log)"]))


# ---------------------------------------------------------------------------------------------------- one process
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_partials_merge_into_the_statistics_of_all(dtype: torch.dtype) -> None:
    """Chan's formula for any number of sets, empty ones among them, also where |mean| is far above the deviation."""
    for offset in (0.0, 3e3):
        sizes = [3, 0, 40, 1, 17]
        y = (torch.randn(sum(sizes), 6, dtype=torch.float64) * 1.5 + torch.arange(6) + offset).to(dtype)
        sets = y.split(sizes)
        count = torch.tensor([[float(n)] for n in sizes], dtype=dtype)
        mean = torch.stack([s.mean(0) if len(s) else s.new_zeros(6) for s in sets])
        m2 = torch.stack([(s - m).square().sum(0) for s, m in zip(sets, mean, strict=True)])
        total, joint_mean, joint_m2 = sync.merge(count, mean, m2)
        wide = y.double()
        rtol = 1e-12 if dtype == torch.float64 else 2e-6
        assert total.item() == sum(sizes)
        torch.testing.assert_close(joint_mean.double(), wide.mean(0), rtol=rtol, atol=rtol)
        # a mean of 3e3 is known to half of 2**-12 in float32
        torch.testing.assert_close(
            joint_m2.double(), wide.var(0, correction=0) * sum(sizes), rtol=rtol + (rtol * offset / 3), atol=0
        )


def test_without_a_process_group_it_is_batch_norm() -> None:
    """A SyncBatchNorm outside any process group is plain BatchNorm, on a CPU too, and fused; explain says so."""
    plain = fr.models.cifar_resnet(8, fused=False).double()
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fr.fuse(fr.models.cifar_resnet(8, fused=False).double()))
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(3, 3, 8, 8).double() + 0.4
    for train in (True, False):
        torch.testing.assert_close(fused.train(train)(x), plain.train(train)(x))
    for (name, got), want in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, want, msg=name)
    assert all(row.fused for row in fr.explain(fused).rows)
    assert {row.statistics for row in fr.explain(fused).rows} == {"statistics of this process alone: no process group"}
    assert {row.statistics for row in fr.explain(plain, x).rows} == {""}
    with torch.no_grad():
        torch.testing.assert_close(fr.freeze(fused, x)(x), plain.eval()(x))


def test_a_shared_norm_is_updated_twice() -> None:
    """A SyncBatchNorm that two blocks share, outside any process group, does what a BatchNorm2d does there."""
    plain = fr.models.cifar_resnet(14, fused=False).double()
    plain.layer1[0].bn1 = plain.layer1[1].bn1 = nn.BatchNorm2d(16).double()
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fr.fuse(copy.deepcopy(plain)))
    sync = nn.SyncBatchNorm(16).double()
    fused.layer1[0].bn1 = fused.layer1[1].bn1 = sync
    x = torch.randn(3, 3, 8, 8).double() + 0.4
    for _ in range(2):
        torch.testing.assert_close(fused(x), plain(x))
    assert sync.num_batches_tracked == 4
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(sync, name), getattr(plain.layer1[0].bn1, name), msg=name)


def test_spec_keeps_the_group() -> None:
    unit = UnitSpec(ConvSpec(), Act(), group="some group")
    row = RowSpec.decode(RowSpec((ChainSpec((unit,), ShortcutSpec()),)).encode())
    assert row.chains[0].units[0].group == "some group"
    assert row.chains[0].n_saved == 7  # y, scale, shift, mean, 1/std, variance, count
    with pytest.raises(ValueError, match="process_group: expected None with running statistics, got 'some group'"):
        UnitSpec(None, Act(), batch_stats=False, group="some group")
