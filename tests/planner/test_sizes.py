"""Rows that don't pay run PyTorch's own operators: the same is computed, and nobody can tell."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import prepared
from stages import step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision_shim import torchvision
from watching import rows_of

import fused_resnet as fr
from fused_resnet import planner
from fused_resnet.fusion import choosing
from fused_resnet.planner import sizes
from fused_resnet.planner.sizes import Measured


@pytest.fixture(autouse=True)
def chains_at_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Without what conftest's does: as if it had been measured that rows are faster as chains whose input has 1200
    values, twice as many in the second stage, and others are not."""

    def faster(text: str, n: int, calls: Any, call_s: float, tie: float = sizes.TIE) -> Measured:
        width = max(t.shape[0] for t in calls.given if t.dim() == 1)
        ours = 2e3 * 1200 / math.prod(calls.x.shape) * width / 8
        return Measured(ours <= 2e3, ours, 2e3)

    monkeypatch.setattr(sizes, "faster", faster)
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "plans"))
    planner.forget()
    yield
    planner.forget()


pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Module:
    """Two stages, which are two rows: 8 channels, then 16 at half the size."""
    block, resnet = torchvision.models.resnet.BasicBlock, torchvision.models.resnet
    down = nn.Sequential(resnet.conv1x1(8, 16, 2), nn.BatchNorm2d(16))
    return prepared(nn.Sequential(block(8, 8), block(8, 8), block(8, 16, 2, down), block(16, 16))).double()


def images(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 8, size, size, dtype=dtype) * 1.5 + 0.4


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize(("size", "rows"), [(4, []), (14, [2, 2]), (9, [2])])
def test_what_is_computed_is_plain_whichever_way_a_row_runs(size: int, rows: list[int]) -> None:
    """Neither row, both, the first stage alone: training steps, evaluation, and a checkpoint's two forwards, which
    update statistics once."""
    plain = network()
    fused, x = fr.fuse(copy.deepcopy(plain)), images(size)
    for _ in range(3):  # asked, answered and, where no row pays, not asked any more
        assert rows_of(lambda: same(step(fused, x), step(plain, x))) == rows
    for reentrant in (True, False):
        for _ in range(2):
            got = step(fused, x, lambda h: checkpoint(fused, h, use_reentrant=reentrant))  # noqa: B023
            same(got, step(plain, x))
    assert fused.get_buffer("0.bn1.num_batches_tracked") == 7
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
        assert sum(rows_of(lambda: fused(x))) == sum(rows)


def test_chains_where_they_are_asked_for() -> None:
    """By name, at any size; whatever the dtype, what was measured decides otherwise."""
    model, x = fr.fuse(network()[:2]), images(4)
    for _ in range(2):
        with fr.use_backend("aten"):
            assert rows_of(lambda: model(x)) == [2]
        with sizes.chains_always():
            assert rows_of(lambda: model(x)) == [2]
        assert rows_of(lambda: model(x)) == []
        with torch.autocast("cpu", torch.bfloat16):
            assert rows_of(lambda: model(x)) == []
    assert rows_of(lambda: model.float()(x.float())) == []
    assert rows_of(lambda: model(images(14, torch.float32))) == [2]


class Checkpointed(nn.Module):
    """A block, and one with a checkpoint of its own."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        block = torchvision.models.resnet.BasicBlock
        self.one, self.two, self.reentrant = block(8, 8), block(8, 8), reentrant
        self.checkpointing = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return checkpoint(self.two, h, use_reentrant=self.reentrant) if self.checkpointing else self.two(h)


@pytest.mark.parametrize("size", [4, 14])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_updates_statistics_once(size: int, reentrant: bool) -> None:
    """Also one that comes when its module's own forward has run for some calls."""
    fused = prepared(Checkpointed(reentrant)).double()
    plain = copy.deepcopy(fused)
    plain.checkpointing = False
    fr.fuse(fused)
    for checkpointing in (True, True, True, False, False, True):
        fused.checkpointing = checkpointing
        x = images(size)
        same(step(fused, x), step(plain, x))


def test_a_sync_batchnorm_whose_process_is_alone(tmp_path: Path) -> None:
    """PyTorch's own refuses a CPU there. Before there are processes, with one, and when there are none any more."""
    plain = network()[:2]
    fused = fr.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)))
    same(step(fused, x := images(4)), step(plain, x))
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for size, rows in ((4, []), (4, []), (14, [2])):
            x = images(size)
            assert rows_of(lambda: same(step(fused, x), step(plain, x))) == rows  # noqa: B023
    finally:
        dist.destroy_process_group()
    same(step(fused, x := images(4)), step(plain, x))


def test_a_module_that_changed_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no row of it paid, after some calls."""
    model, x = fr.fuse(network()[:2]), images(4)
    asked = []
    monkeypatch.setattr(choosing, "_AGAIN", 3)
    monkeypatch.setattr(sizes, "faster", lambda text, *_: asked.append(text) or Measured("batch" not in text, 1.0, 1.0))
    for _ in range(2):
        assert rows_of(lambda: model(x)) == []
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    assert [rows_of(lambda: model(x)) for _ in range(4)] == [[], [], [2], [2]]
    assert len(asked) == 2


def test_what_runs_inside_a_modules_own_forward_is_not_asked() -> None:
    """But for it: another model that the same thread calls afterwards, or one whose forward raised."""

    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if wrong:
                raise RuntimeError("wrong")
            return x

    wrong = False
    model, x = fr.fuse(nn.Sequential(*network()[:2], Raises())), images(4)
    for _ in range(3):
        model(x)
    wrong = True
    with pytest.raises(RuntimeError, match="wrong"):
        model(x)
    assert not choosing.thread.inside
    assert rows_of(lambda: fr.fuse(network()[:1])(images(14))) == [1]


@pytest.mark.parametrize(("gain", "rows"), [(1e-5, []), (1e3, [2, 2])])
def test_chains_that_gain_less_than_guards_take(gain: float, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Such calls run plain from the second on, in evaluation and in training, and explain says so."""
    monkeypatch.setattr(sizes, "faster", lambda *args: Measured(True, 1.0, 1.0 + gain))
    fused, plain = fr.fuse(copy.deepcopy(model := network())), model
    x = images(8)
    for mode in (False, True):
        fused.train(mode), plain.train(mode)
        assert [rows_of(lambda: same(step(fused, x), step(plain, x))) for _ in range(3)] == [[2, 2], rows, rows]
    assert ("gain less than dynamo's guards take" in str(fr.explain(fused))) == (rows == [])


def test_guards_that_cannot_be_timed_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "faster", lambda *args: Measured(True, 1.0, 1.0 + 1e-5))
    monkeypatch.setattr("torch._C._dynamo.eval_frame._debug_get_cache_entry_list", lambda code: [])
    model, x = fr.fuse(network()), images(8)
    assert [rows_of(lambda: model(x)) for _ in range(2)] == [[2, 2]] * 2
