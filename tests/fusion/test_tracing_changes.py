"""Modules that change between the calls of their fused forwards: attributes, layers, modes, hooks."""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from networks import prepared
from torch import Tensor, nn
from traced import Layers, Lists, NormAddAct, assert_same, chains_of, images, made
from watching import rows

import fused_resnet as fr
from fused_resnet.fusion import front

pytestmark = pytest.mark.usefixtures("every_warning")


def test_an_attribute_that_changes():
    plain, fused = made(NormAddAct)
    for model in (plain, fused):
        model.scale = 3.0
    assert_same(fused, plain, images())
    for model in (plain, fused):
        model.scale = 0.5
    assert_same(fused, plain, images())
    assert chains_of(fused, images()) == [[1]]


def test_layers_that_are_replaced():
    """As for small images: no max-pool, a stem of another size; and a shortcut that is gone."""
    plain = prepared(fr.models.resnet18(fused=False, num_classes=3)).double()
    fused = fr.fuse(copy.deepcopy(plain))
    with torch.no_grad():
        fused.eval()(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    for model in (plain, fused):
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False).double()
        model.maxpool = nn.Identity()
        model.layer1[1].downsample = nn.Sequential(nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)).double()
        model.layer2[0].downsample[0].stride = (2, 2)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_same(fused, plain, x)
    assert all(row.fused for row in fr.explain(fused).rows)
    assert sum(map(sum, chains_of(fused, x))) == 21


class Passing(Layers):
    """An Identity on the way, as timm keeps one where a network may drop."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.drop(self.conv1(x))))


def test_an_identity_that_is_replaced():
    plain, fused = made(Passing)
    assert_same(fused, plain, images())
    seen: list[int] = []
    handle = fused.drop.register_forward_hook(lambda *a: seen.append(1))
    assert_same(fused, plain, images())
    assert seen == [1, 1]
    handle.remove()
    plain.drop, fused.drop = nn.Tanh(), nn.Tanh()
    assert_same(fused, plain, images())


class PartByMode(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x))
        return self.relu(h) if self.training else h


class AroundIt(Layers):
    """A chain reaches into the part, whose forward depends on its own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.part = PartByMode()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.part(x))))


def test_a_part_in_another_mode():
    plain, fused = made(AroundIt)
    assert_same(fused, plain, images())
    x = images()
    for model in (plain, fused):
        model.train().part.eval()
    with rows() as found:
        torch.testing.assert_close(fused(x), plain(x))
    assert found == [[2]]


def test_hooks_on_a_module_that_is_part_of_a_plan():
    plain, fused = made(Lists)
    seen: list[int] = []
    handle = fused.more[1].register_forward_hook(lambda *a: seen.append(1))
    assert_same(fused, plain, images())
    assert seen == [1, 1]
    handle.remove()
    for model in (plain, fused):
        torch.manual_seed(0)
        model.more.append(nn.Sequential(nn.Conv2d(4, 4, 1)).double())
    assert_same(fused, plain, images())
    assert seen == [1, 1]


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What dynamo logs."""
    texts: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler, logger = Keeps(), logging.getLogger("torch._dynamo.convert_frame")
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)


class Tables(nn.Module):
    """What its forward reads is another at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.key, self.table = "0", {str(i): float(i) for i in range(5)}

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))) * self.table[self.key]


def test_past_the_limit_of_recompilations(monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    """A module runs plain then; dynamo's warning names the guard that failed last, and ``explain`` how often."""
    monkeypatch.setitem(front._OPTIONS, "recompile_limit", 3)
    plain = prepared(Tables()).double()
    fused, x = fr.fuse(copy.deepcopy(plain)), images()
    for key in plain.table:
        plain.key = fused.key = key
        torch.testing.assert_close(fused(x), plain(x))
    (warning,) = (text for text in logged if "recompile_limit" in text)
    assert "self.key == '2'" in warning
    assert "captured: (model), 3 graphs, 5 calls, 2 of them without a graph" in str(fr.explain(fused))


OPTIONS = [
    "torch._inductor.freezing", "torch._dynamo.prepare_freezing", "torch._dynamo.install_free_tensors",
    "torch._dynamo.assume_static_by_default", "torch._dynamo.error_on_recompile",
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_the_user_sets_for_other_compilations(option: str) -> None:
    """Fused and frozen modules are captured with the options that the package needs, and the user's options stay."""
    module, _, name = option.rpartition(".")
    config = importlib.import_module(f"{module}.config")
    plain = prepared(nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))).double().eval()
    value = not getattr(config, name)
    with config.patch({name: value}), torch.no_grad():
        fused, frozen = fr.fuse(copy.deepcopy(plain)), fr.freeze(plain, images())
        for x in (images(), images()[:1], images()[..., :5]):
            torch.testing.assert_close(fused(x), plain(x))
            torch.testing.assert_close(frozen(x), plain(x))
            assert getattr(config, name) is value
    for net in (fused, frozen):
        assert [row.chains for row in fr.explain(net).rows] == [1], fr.explain(net)
        assert "without a graph" not in str(fr.explain(net))
