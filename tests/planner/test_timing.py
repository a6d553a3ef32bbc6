"""How calls are timed to choose the faster one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import own_plan
from torch import Tensor

from fused_resnet import planner
from fused_resnet.planner import sizes
from fused_resnet.planner.sizes import CHAINS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def chains_at_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Measuring, with a plan of its own."""
    with own_plan(monkeypatch, tmp_path):
        yield


def call_of(ours: Callable[[], Any], plain: Callable[[], Any]) -> sizes.Calls:
    return lambda n: (ours, plain)


def nothing() -> None:
    """Takes no time."""


def busy(s: float) -> None:
    start = time.thread_time()
    while time.thread_time() - start < s:
        pass


def test_the_faster_one_is_chosen_and_a_tie_goes_to_pytorch() -> None:
    def takes(s: float) -> Callable[[], None]:
        return lambda: busy(s)

    found = sizes.faster("quick", 1, call_of(takes(0.002), takes(0.004)), 0.01)
    assert found.pays and found.ours == pytest.approx(2, rel=0.5) and found.plain == pytest.approx(4, rel=0.5)
    assert not sizes.faster("slow", 1, call_of(takes(0.004), takes(0.002)), 0.01).pays
    assert not sizes.faster("same", 1, call_of(takes(0.002), takes(0.00201)), 0.01).pays


def test_a_large_batch_is_measured_on_a_part_of_it() -> None:
    batches: list[int] = []

    def calls(n: int) -> tuple[sizes.Call, sizes.Call]:
        batches.append(n)
        return (lambda: busy(0.001 * n)), (lambda: busy(0.001 * n))

    sizes.faster("large", 4096, calls, 0.01)
    assert batches[0] == 1 and 5 <= batches[1] <= 12 and len(batches) == 2


def test_what_only_pytorch_takes_runs_plain() -> None:
    def refuses() -> None:
        raise ValueError("not mine")

    found = sizes.faster("text", 1, call_of(refuses, nothing), 0.01)
    assert not found.pays and not planner.cache_of(torch.device("cpu")).choices
    assert sizes.faster("other", 1, call_of(nothing, refuses), 0.01) is CHAINS


def test_the_fastest_of_several_is_chosen() -> None:
    """What refuses is none of them. A file keeps which one it was."""

    def refuses() -> None:
        raise ValueError("not mine")

    quick, slow, plain = ((lambda s=s: busy(s)) for s in (0.002, 0.005, 0.004))
    found = sizes.faster("several", 1, lambda n: (refuses, slow, quick, plain), 0.01)
    assert found.pays and found.which == 2 and found.ours == pytest.approx(2, rel=0.5)
    sizes.forget()
    planner.forget()
    assert sizes.faster("several", 1, lambda n: (refuses,) * 4, 0.01) == found


def test_a_slow_candidate_is_not_timed_again() -> None:
    called: list[str] = []

    def takes_ms(name: str, ms: int) -> sizes.Call:
        return lambda: (called.append(name), busy(ms / 1e3))

    ways = (takes_ms("slow", 12), takes_ms("near", 5), takes_ms("quick", 4), takes_ms("plain", 9))
    assert sizes.faster("slow", 1, lambda n: ways, 0.001).which == 2
    assert called.count("slow") < called.count("near") == called.count("quick")


def test_a_cold_call_is_timed_after_other_memory_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(sizes, "_OTHERS", 4 * 1000)
    monkeypatch.setattr(Tensor, "sum", lambda self: events.append(f"read {self.numel()}"))

    def call(name: str, before: str) -> sizes.Call:
        return sizes.Cold(lambda: events.append(name), lambda: events.append(before))

    sizes.faster("cold", 1, lambda n: (call("ours", "as ours"), call("plain", "as plain")), 0.001)
    for name in ("ours", "plain"):
        timed = [events[i - 2 : i] for i, event in enumerate(events) if event == name]
        # a call is made once more before it is timed
        assert len(timed) > 2 and all(before == ["read 1000", f"as {name}"] for before in timed[-2:])


def test_another_call_is_timed_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "sum", lambda self: pytest.fail("read"))
    sizes.faster("warm", 1, call_of(nothing, nothing), 0.001)
