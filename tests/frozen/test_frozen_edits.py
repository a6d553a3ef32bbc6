"""Whatever changes in a frozen network between two calls is seen, also where dynamo skips the guards of its modules."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import small
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

import fused_resnet as fr
from fused_resnet.fusion import front, tags

CHANNELS = 8


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class Negative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -torch.relu(-x)


class Block(nn.Module):
    """Reads attributes of many types."""

    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), Plain()
        self.table, self.numbers, self.function = {"a": {"k": 1.0}}, [1.0], torch.relu

    def helper(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        h = self.helper(self.function(self.act(self.bn(self.conv(x)))))
        return h * self.scale * self.table["a"]["k"] * self.numbers[0] + x


class Net(nn.Module):
    """``listed``: one of its blocks is in a list, where no module is registered."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()
        self.listed = [Block()] if listed else []

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        return self.listed[0](h) if self.listed else h


def changed(block: Block, name: str, value: Any) -> None:
    setattr(block, name, value)


def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


EDITS: dict[str, Callable[[Any], Any]] = {
    "class": lambda net: changed(net.a.act, "__class__", Negative),
    "dict": lambda net: changed(net.a, "__dict__", dict(net.a.__dict__, scale=5.0)),
    "attribute": lambda net: changed(net.a, "scale", 7.0),
    "method": lambda net: changed(net.a, "helper", lambda x: x * 2),
    "function": lambda net: changed(net.a, "function", torch.sigmoid),
    "item of a dictionary in a dictionary": lambda net: net.a.table["a"].update(k=3.0),
    "dictionary in a dictionary": lambda net: net.a.table.update(a={"k": 4.0}),
    "dictionary": lambda net: changed(net.a, "table", {"a": {"k": 9.0}}),
    "item of a list": lambda net: net.a.numbers.__setitem__(0, 4.0),
    "child": lambda net: changed(net.a, "act", Negative()),
    "child in _modules": lambda net: net.a._modules.update(act=Negative()),
    "_modules": lambda net: changed(net.a, "_modules", dict(net.a._modules, act=Negative())),
    "eps": lambda net: changed(net.b.bn, "eps", 0.5),
    "mode": lambda net: net.b.bn.train(),
    "hook": lambda net: net.a.register_forward_hook(hook),
    "hook in the dictionary": lambda net: net.a.act._forward_hooks.update({99: hook}),
    "data": lambda net: changed(net.a.bn.weight, "data", net.a.bn.weight.data * 2),
    "strides": lambda net: changed(net.a.conv.weight, "data", net.a.conv.weight.data.transpose(2, 3)),
    "parameter": lambda net: changed(net.a.bn, "weight", nn.Parameter(torch.full((CHANNELS,), -2.0))),
    "_parameters": lambda net: changed(net.a.bn, "_parameters", dict(net.a.bn._parameters, bias=torch.ones(CHANNELS))),
    "buffer": lambda net: net.b.bn.running_mean.add_(1),
    "geometry": lambda net: [changed(net.a.conv, "padding", (2, 2)), changed(net.a.conv, "dilation", (2, 2))],
}
LISTED: dict[str, Callable[[Any], Any]] = {
    "class in a list": lambda net: changed(net.listed[0].act, "__class__", Negative),
    "list": lambda net: net.listed.__setitem__(0, net.a),
}


@pytest.mark.parametrize("edit", [*EDITS, *LISTED])
def test_an_edit_is_seen(edit: str) -> None:
    x, plain = torch.randn(2, CHANNELS, 9, 8), Net(edit in LISTED).eval()
    frozen = fr.freeze(plain, x)
    with torch.no_grad():
        for _ in range(3):  # captured, and guards checked twice
            before = frozen(x)
        for net in (plain, frozen.model):
            (EDITS | LISTED)[edit](net)
        for _ in range(3):
            want, got = plain(x), frozen(x)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(want, before, atol=1e-3)


def test_an_edit_of_what_was_edited_is_seen() -> None:
    """Equal children and dictionaries in the old ones' place, which guards let pass, and then other ones."""
    x, plain = torch.randn(2, CHANNELS, 9, 8), Net(False).eval()
    frozen = fr.freeze(plain, x)
    with torch.no_grad():
        for k in range(6):
            for net in (plain, frozen.model):
                net.a.act, net.a.table = Plain(), {"a": {"k": 1.0}}
                net.a._forward_hooks = type(net.a._forward_hooks)()
            torch.testing.assert_close(frozen(x), plain(x), rtol=1e-4, atol=1e-4)
            gc.collect()
            for net in (plain, frozen.model):
                net.a.table["a"] = {"k": float(k)}
                net.a.act.__class__ = Negative if k % 2 else Plain
            torch.testing.assert_close(frozen(x), plain(x), rtol=1e-4, atol=1e-4)


def roots(frozen: nn.Module) -> int:
    """The number of modules whose guards dynamo may skip."""
    function = inspect.unwrap(next(iter(frozen.front().captured.values())))
    entries = _debug_get_cache_entry_list(function.__code__)
    return sum(str(entry.guard_manager).count("tag_safe=(True, True)") for entry in entries)


@pytest.mark.skipif(not tags.AVAILABLE, reason="PyTorch's tags need 2.13")
def test_which_guards_are_skipped() -> None:
    x = torch.randn(2, CHANNELS, 9, 8)
    assert roots(fr.freeze(Net(False).eval(), x)) > 0
    assert roots(fr.freeze(Net(True).eval(), x)) == 0, "a module that Watched does not find"


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_the_users_option_stays(listed: bool, value: bool) -> None:
    name = "use_recursive_dict_tags_for_guards"
    with torch._dynamo.config.patch(name, value):
        fr.freeze(Net(listed).eval(), torch.randn(2, CHANNELS, 9, 8))
        assert getattr(torch._dynamo.config, name) is value


@pytest.mark.skipif(not tags.AVAILABLE, reason="PyTorch's tags need 2.13")
def test_modules_that_change_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their guards are checked in full after a while; nothing is kept any more."""
    monkeypatch.setattr(front, "_MAX_WATCHED", 5)
    x, plain = torch.randn(2, CHANNELS, 9, 8), Net(False).eval()
    frozen = fr.freeze(plain, x)
    with torch.no_grad():
        for k in range(12):
            frozen.model.a.called = k
            torch.testing.assert_close(frozen(x), plain(x), rtol=1e-4, atol=1e-4)
    assert frozen.front().changeable and not frozen.front().watched and roots(frozen) == 0
    assert len(frozen.front().graphs) <= 4


def test_the_model_goes_with_its_front() -> None:
    frozen = fr.freeze(small(), torch.randn(1, 3, 32, 32))
    frozen(torch.randn(1, 3, 32, 32))
    gone = [weakref.ref(m) for m in frozen.model.modules()]
    del frozen
    for _ in range(2):
        gc.collect()
    assert not any(ref() is not None for ref in gone)
