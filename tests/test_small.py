"""Images so small that chains don't pay: modules run their own forwards, compute the same, and nobody can tell."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_stages import rows_of, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision_shim import torchvision

import fused_resnet as fr
from fused_resnet import small
from fused_resnet.convert import plan_of


@pytest.fixture(autouse=True)
def chains() -> None:
    """Without what conftest's does."""


@pytest.fixture(autouse=True)
def threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains pay from 700 values per call and thread, one thread."""
    monkeypatch.setattr(small, "SMALL", {"training": 700, "evaluation": 700, "frozen": 700})


pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Module:
    """Stages of two blocks: 8 channels, then 16 at half the size."""
    block, resnet = torchvision.models.resnet.BasicBlock, torchvision.models.resnet
    layer = nn.BatchNorm2d
    down = nn.Sequential(resnet.conv1x1(8, 16, 2), layer(16))
    return nn.Sequential(block(8, 8), block(8, 8), block(8, 16, 2, down), block(16, 16))


def images(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 8, size, size, dtype=dtype) * 1.5 + 0.4


@pytest.mark.parametrize(("size", "rows"), [(4, []), (10, [2]), (16, [4])])
def test_blocks_of_small_images_run_their_own_forwards(size: int, rows: list[int]) -> None:
    """2*8*size^2 values in the first stage, half of that in the second: none, the first stage, all as chains."""
    model = fr.fuse(network())
    assert rows_of(lambda: model(images(size))) == rows
    with torch.no_grad():
        model.eval()
        assert sum(rows_of(lambda: model(images(size)))) == sum(rows)


@pytest.mark.parametrize("size", [4, 10, 16])
@pytest.mark.parametrize("train", [True, False])
def test_numbers_are_plain_ones(size: int, train: bool) -> None:
    plain = network().train(train)
    fused, x = fr.fuse(copy.deepcopy(plain)), images(size)
    want, got = step(plain, x), step(fused, x)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_chains_where_they_are_asked_for_or_are_always_faster() -> None:
    """By name, at any size; in 16 bits; in float64."""
    model, x = fr.fuse(network()), images(4)
    with fr.use_backend("aten"):
        assert rows_of(lambda: model(x)) == [4]
    with small.chains_always():
        assert rows_of(lambda: model(x)) == [4]
    with torch.autocast("cpu", torch.bfloat16):
        assert rows_of(lambda: model(x)) == [4]
    assert rows_of(lambda: model.bfloat16()(x.bfloat16())) == [4]
    assert rows_of(lambda: model.double()(x.double())) == [4]


@pytest.mark.parametrize("size", [4, 10, 16])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_updates_statistics_once(size: int, reentrant: bool) -> None:
    """Whichever way a block runs: a step with a checkpoint leaves what a plain step without one does."""
    plain = network()
    fused, x = fr.fuse(copy.deepcopy(plain)), images(size)
    want = step(plain, x)
    got = step(fused, x, lambda h: checkpoint(fused, h, use_reentrant=reentrant))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)
    assert fused.get_buffer("0.bn1.num_batches_tracked") == 1


def test_chains_among_processes_with_a_sync_batchnorm(tmp_path: Path) -> None:
    """Its own forward refuses a CPU there, also where a process is alone."""
    plain = network()
    fused, x = fr.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))), images(4)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert rows_of(lambda: copy.deepcopy(fused)(x)) == [4]
        want, got = step(plain, x), step(fused, x)
    finally:
        dist.destroy_process_group()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_frozen_models_are_frozen_at_any_size() -> None:
    plain, x = network().eval(), images(4)
    frozen = fr.freeze(plain, x)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), plain(x), rtol=1e-4, atol=1e-4)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())


def test_explain_says_from_which_size_on() -> None:
    """The first block has two units with as many values as its input, and three calls: two for them, one of its own."""
    model = fr.fuse(network())
    assert "its own forward below 1050 values" in str(fr.explain(model))
    assert "own forward" not in str(fr.explain(model.double()))


def test_estimate_follows_strides_channels_and_pools() -> None:
    """values: of raw outputs per value of the input and call; out: of the output."""
    stem = fr.fuse(torchvision.models.resnet18())
    assert plan_of(stem).values == pytest.approx(64 / 4 / 3 / 3)
    features = fr.fuse(torchvision.models.mobilenet_v2()).features
    plan = plan_of(features[4].conv)  # 24 -> 144 -> 144 at half the size -> 32
    assert plan.values == pytest.approx((144 + 144 / 4 / 2 + 32 / 4) / 24 / 4)
    assert plan.out == pytest.approx(32 / 4 / 24)
    assert plan_of(features[3]).values == pytest.approx((144 + 144 / 2 + 24) / 24 / 4)
