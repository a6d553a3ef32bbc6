"""A thread serves a model while another fuses, freezes, explains and compiles models, the same one among them: neither
notices the other. Longer: ``pytest tests/fusion/test_beside.py --beside-seconds 60``.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from networks import images, tiny
from torch import Tensor, nn

import fused_resnet as fr

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--beside-seconds"))


def beside(serve: Callable[[], Tensor], want: Tensor, main: Callable[[], None], seconds: float) -> tuple[int, int]:
    """``main`` again and again while a thread serves; how often each ran."""
    stop, seen = threading.Event(), Counter[str]()

    def loop() -> None:
        torch.set_num_threads(1)
        while not stop.is_set():
            try:
                torch.testing.assert_close(serve(), want)
                seen["right"] += 1
            except BaseException as error:  # whatever it is, it is told
                seen[f"{type(error).__name__}: {error}"[:300]] += 1

    thread, calls = threading.Thread(target=loop), 0
    thread.start()
    try:
        end = time.monotonic() + seconds
        while calls < 2 or time.monotonic() < end:
            main()
            calls += 1
    finally:
        stop.set()
        thread.join()
    assert set(seen) == {"right"}, seen
    return seen["right"], calls


def served(model: nn.Module, x: Tensor, autocast: bool = False) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out: Tensor = model(x)
            return out

    return call


def work(x: Tensor) -> None:
    """All that the package does with a model, and the same of PyTorch's compiler."""
    fused = fr.fuse(tiny(1)).train()
    fused(x).sum().backward()
    assert all(row.fused for row in fr.explain(fused).rows)
    fr.freeze(fused, x)
    assert any(row.fused for row in fr.explain(tiny(1), x).rows)
    torch.compile(tiny(1), backend="fused_resnet")(x)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_plain_model(autocast: bool, seconds: float) -> None:
    model, x = tiny(), images()
    call = served(model, x, autocast)
    served_calls, calls = beside(call, call(), lambda: work(x), seconds)
    assert served_calls > calls


def test_a_frozen_model_and_its_successor(seconds: float) -> None:
    model, x = tiny(), images()
    frozen = fr.freeze(model, x)

    def succeed() -> None:
        torch.testing.assert_close(fr.freeze(model, x)(x), frozen(x))
        work(x)

    beside(served(frozen, x), served(model, x)(), succeed, seconds)


def test_a_fused_model_that_is_looked_at(seconds: float) -> None:
    """Explained, copied, frozen and called: its own statistics and modes stay as they were."""
    model, x = tiny(), images()
    want, before = served(model, x)(), copy.deepcopy(model.state_dict())
    fr.fuse(model)

    def look() -> None:
        assert all(row.fused for row in fr.explain(model, x).rows)
        copy.deepcopy(model).train()(x)
        fr.freeze(model, x)
        work(x)

    beside(served(model, x), want, look, seconds)
    assert not any(m.training for m in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_first_calls_of_other_models(seconds: float) -> None:
    """Both threads capture: the thread that serves has a new model each time."""
    model, x = tiny(), images()
    want = served(model, x)()
    beside(lambda: served(fr.fuse(copy.deepcopy(model)), x)(), want, lambda: work(x), seconds)
