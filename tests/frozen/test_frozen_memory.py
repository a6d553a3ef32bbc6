"""The memory of a frozen row's intermediate results: used again by later calls, nobody else's, and given back."""

from __future__ import annotations

import copy
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from networks import prepared
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.backends import load
from fused_resnet.models.resnet import BasicBlock
from fused_resnet.planner import sizes

pytestmark = pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")
C = 32


def unit(into: int, out: int, kernel: int, act: nn.Module | None = None, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(into, out, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), act or nn.ReLU())


def network() -> nn.Module:
    """Products, Winograd, depthwise; its output is small."""
    units = unit(C, C, 1), unit(C, C, 3), unit(C, C, 3, groups=C), unit(C, 1, 1)
    return prepared(nn.Sequential(*units)).eval()


@pytest.fixture(autouse=True)
def packed_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first algorithm that suits, which is one of ours."""
    monkeypatch.setattr(sizes, "faster", lambda *args: sizes.Measured(True, 1.0, 2.0, 0))


def test_later_calls_get_no_new_memory() -> None:
    frozen, x = fr.freeze(network(), torch.randn(4, C, 128, 128)), torch.randn(4, C, 128, 128)
    x = x.contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        frozen(x)
    before, calls = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, 10
    for _ in range(calls):
        frozen(x)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls
    # of three intermediate results of 8 MiB, 2048 pages each, none
    assert faults < 400


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_memory_that_is_not_needed_goes_back() -> None:
    frozen = fr.freeze(network(), torch.randn(1, C, 8, 8))
    large, small = torch.randn(16, C, 160, 160), torch.randn(1, C, 8, 8)
    for _ in range(2):
        frozen(large)
    held = resident_bytes()
    for _ in range(200):
        frozen(small)
    assert held - resident_bytes() > 2 * large.numel() * 4 * 0.8  # two results are there at a time


@pytest.mark.parametrize("closing", ["identity", "projection"])
def test_an_output_stays_as_it_is(closing: str) -> None:
    """Also one that was added to a shortcut in the shortcut's memory."""
    down = nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C)) if closing == "projection" else None
    plain = prepared(nn.Sequential(unit(C, C, 1), BasicBlock(C, C), BasicBlock(C, C, 1, down))).eval()
    frozen, exact = fr.freeze(plain, torch.randn(2, C, 12, 12)), copy.deepcopy(plain).double()
    inputs = [torch.randn(2, C, 12, 12) for _ in range(6)]
    outs = [frozen(x) for x in inputs]
    with torch.no_grad():
        for x, out in zip(inputs, outs, strict=True):
            torch.testing.assert_close(out.double(), exact(x.double()), rtol=1e-5, atol=1e-5)


def test_concurrent_callers_have_memory_of_their_own() -> None:
    nets = [network() for _ in range(2)]
    frozen = [fr.freeze(net, torch.randn(1, C, 24, 24)) for net in nets]
    cases = [(i % 2, torch.randn(1 + i % 3, C, 16 + 8 * (i % 4), 24)) for i in range(24)]

    def serve(case: tuple[int, Tensor]) -> Tensor:
        return [frozen[case[0]](case[1]) for _ in range(3)][-1]

    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        for (net, x), got in zip(cases, pool.map(serve, cases), strict=True):
            want = copy.deepcopy(nets[net]).double()(x.double())
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
