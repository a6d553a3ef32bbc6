"""A frozen row as one call of the CPU backend: the same steps, the same bits, nobody else's memory."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from networks import folded, images, prepared, small
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.backends import load
from fused_resnet.frozen import forward as frozen_forward
from fused_resnet.frozen import rows as frozen_rows
from fused_resnet.frozen.forward import run_chains
from fused_resnet.models import cifar_resnet
from fused_resnet.planner import sizes
from fused_resnet.spec import Act, ChainSpec, ConvSpec, PoolSpec, ShortcutSpec, UnitSpec

pytestmark = pytest.mark.skipif(load("cpu")[0] is None, reason="the compiled extension is not built")
ACTS = ("relu", "identity", "silu", "leaky_relu", "sigmoid", "relu6", "hardswish", "elu", "mish", "hardtanh")


def unit(act: str, kernel: int, stride: int = 1, groups: int = 1) -> UnitSpec:
    conv = ConvSpec((stride, stride), (kernel // 2, kernel // 2), groups=groups, bias=True)
    return UnitSpec(conv, Act.make(act), batch_stats=False)


def weights(out: int, into: int, kernel: int, dtype: torch.dtype) -> list[Tensor]:
    w = torch.randn(out, into, kernel, kernel) / (into**0.5 * kernel)
    return [w.to(dtype).contiguous(memory_format=torch.channels_last), torch.randn(out)]


def both_ways(x: Tensor, params: list[Tensor], chains: list[ChainSpec], residual: Tensor | None = None) -> None:
    """Compares the row as one call, made and made again, with its units one by one."""
    given, known = (x.clone(), None if residual is None else residual.clone()), {}
    row = folded(params, chains)
    want = run_chains(x, row, residual)
    # float64 runs on PyTorch's convolutions; the pass after them has our activations' rounding
    bound = 1e-12 if x.dtype == torch.float64 else 0
    for _ in range(2):
        torch.testing.assert_close(run_chains(x, row, residual, known), want, rtol=bound, atol=bound)
    assert [row is not None for row in known.values()] == [True]
    assert torch.equal(x, given[0]) and (residual is None or torch.equal(residual, given[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("act", ACTS)
def test_one_call_has_the_bits_of_the_units(act: str, dtype: torch.dtype) -> None:
    # products, Winograd, oneDNN's; a projection; a given summand
    chains = [
        ChainSpec((unit(act, 1), unit(act, 3), unit(act, 1)), ShortcutSpec("tensor")),
        ChainSpec((unit(act, 3, 2), unit(act, 3)), ShortcutSpec("projection", unit("identity", 1, 2))),
        ChainSpec((unit(act, 3, groups=4), unit(act, 3)), ShortcutSpec("identity")),
    ]
    params = [
        *weights(64, 16, 1, dtype), *weights(64, 64, 3, dtype), *weights(96, 64, 1, dtype),
        *weights(64, 96, 3, dtype), *weights(64, 64, 3, dtype), *weights(64, 96, 1, dtype),
        *weights(64, 16, 3, dtype), *weights(64, 64, 3, dtype),
    ]  # fmt: skip
    if dtype == torch.float64:
        params = [p.double() for p in params]
    x = (torch.randn(2, 16, 18, 13) * 1.3 + 0.4).to(dtype)
    both_ways(x, params, chains, (torch.randn(2, 96, 18, 13) - 0.5).to(dtype))


@pytest.mark.parametrize("channels", [32, 20], ids=["stem", "passes"])
def test_pools_and_shortcuts_without_parameters(channels: int) -> None:
    pool = PoolSpec((3, 3), (2, 2), (1, 1))
    average = ShortcutSpec("projection", unit("identity", 1), PoolSpec((2, 2), (2, 2), (0, 0), True, False))
    chains = [
        ChainSpec((unit("relu", 7, 2),), ShortcutSpec("none"), pool),
        ChainSpec((unit("relu", 3, 2), unit("relu", 3)), ShortcutSpec("pad", stride=(2, 2), channels=channels + 8)),
        ChainSpec((unit("relu", 3, 2),), average),
        ChainSpec((UnitSpec(None, Act("silu"), batch_stats=False),), ShortcutSpec("none"), pool),
    ]
    c, f = channels, torch.float32
    params = [
        *weights(c, 3, 7, f), *weights(c, c, 3, f), *weights(c + 8, c, 3, f), *weights(24, c + 8, 3, f),
        *weights(24, c + 8, 1, f), torch.randn(24), torch.randn(24),
    ]  # fmt: skip
    both_ways(torch.randn(2, 3, 70, 67) + 0.4, params, chains)


@pytest.mark.parametrize("build", [small, lambda: prepared(cifar_resnet(8, fused=False)).eval()])
def test_a_network_runs_as_recorded_rows(build: Callable[[], nn.Module], empty_is_nan: None) -> None:
    """Under every mode, with other sizes, after a weight has changed, and in threads."""
    model, x = build(), images()
    frozen = fr.freeze(model, x)
    rows = []
    with patch.object(frozen_rows, "run_chains", lambda *args: rows.append(args[3]) or run_chains(*args)):
        for mode in (torch.no_grad, torch.inference_mode):
            for size in (64, 33):
                with mode():
                    got = frozen(x[..., :size, :size])
                with torch.no_grad():
                    want = model(x[..., :size, :size])
                assert torch.linalg.vector_norm(got - want) < 1e-5 * torch.linalg.vector_norm(want)
    assert rows and all(row is not None for known in rows for row in known.values())
    want, outs = frozen(x), []
    threads = [threading.Thread(target=lambda: outs.append(frozen(x))) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(outs) == 4 and all(torch.equal(out, want) for out in outs)
    with torch.no_grad():
        for net in (model, frozen.model):
            next(p for p in net.parameters() if p.dim() == 4).mul_(-2)
        assert not torch.equal(frozen(x), want)
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [2, 4, 7, 14])
def test_a_frozen_convolution_runs_the_fastest_algorithm(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Every algorithm that suits a convolution may be the one, also where it is not expected to be."""
    plain = prepared(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())).eval()
    x = torch.randn(1, 64, size, size) * 1.5 + 0.4
    with torch.no_grad():
        want = copy.deepcopy(plain).double()(x.double()).float()
    told: list[str] = []
    nhwc = {"memory_format": torch.channels_last}
    geometry = x.contiguous(**nhwc), plain[0].weight.contiguous(**nhwc), [1, 1], [1, 1], [1, 1], 1
    expected = "winograd" if torch.ops.fused_resnet_cpu.winograd_tile(*geometry) else "onednn"
    assert f"packed: {expected}\n" in str(fr.explain(fr.freeze(plain, x)))  # nothing is measured
    for which in range(5):
        monkeypatch.setattr(frozen_forward, "_served", {})
        monkeypatch.setattr(sizes, "faster", lambda *_, which=which: sizes.Measured(True, 1.0, 2.0, which))
        try:
            frozen = fr.freeze(plain, x)
        except IndexError:  # no such algorithm suits
            break
        torch.testing.assert_close(frozen(x), want, rtol=1e-4, atol=1e-4)
        told.append(str(fr.explain(frozen)).partition("packed: ")[2].split("\n")[0].strip())
    assert told == [*(["winograd", "winograd F(2x2)"] if size >= 4 else []), "gemm", "onednn"]
