"""The launcher: a compiled kernel is started again for arguments like those it was compiled for, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from fused_resnet.backends.triton import runtime  # noqa: E402


class Kernel:
    """Stands for a jit function: compiles per launch, and says what was compiled and what started."""

    arg_names = ("x_ptr", "m", "p", "C", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return run


class Compiled:
    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.started.append((grid, *args))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(runtime, "_compiled", {})
    return Kernel()


def start(kernel: Kernel, x: Any, m: int = 32, p: float = 0.5, device: int = 0, **changes: Any) -> None:
    constants = {"BLOCK": 16, "C": 64, "num_warps": 4, "enable_fp_fusion": True} | changes
    runtime._start(kernel, device, (7,), (x, m, p), constants)


def test_the_same_again_starts_what_was_compiled(kernel: Kernel) -> None:
    x, y = torch.zeros(64), torch.zeros(128)
    start(kernel, x)
    start(kernel, y, m=48, p=0.25)
    assert len(kernel.compiled) == 1
    # the grid filled up to three, the constants in the kernel's order, options left out
    (found,) = kernel.compiled[0].started
    assert found[0] == (7, 1, 1) and found[1] is y and found[2:] == (48, 0.25, 64, 16)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(64, dtype=torch.bfloat16)},
        {"x": torch.zeros(65)[1:]},
        {"x": None},
        {"x": torch.empty(2**31, device="meta")},
        {"m": 33},
        {"m": 1},
        {"m": 2**32},
        {"device": 1},
        {"C": 65},
        {"num_warps": 8},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_triton_specialises_on_is_compiled_anew(kernel: Kernel, other: dict[str, Any]) -> None:
    start(kernel, torch.zeros(64))
    start(kernel, **({"x": torch.zeros(64)} | other))
    assert len(kernel.compiled) == 2 and not kernel.compiled[0].started


def test_every_launch_of_a_network_names_all_constants() -> None:
    """A launch that leaves a parameter to its default could not be started a second time."""
    from fused_resnet import models
    from fused_resnet.traffic import network_traffic

    seen = set()

    def check(k: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        seen.add(k)
        missing = [name for name in k.arg_names[len(args) :] if name not in constants]
        assert not missing, f"{k}: {missing}"

    with runtime.observe(check):
        for training in (True, False):
            network_traffic(models.resnet18().to(memory_format=torch.channels_last), 2, 64, training=training)
    assert len(seen) >= 8


def test_the_launcher_costs_the_host_little(kernel: Kernel) -> None:
    """Our part of a launch, without the driver's: a few microseconds."""
    import timeit

    x = torch.zeros(64)
    start(kernel, x)
    args, constants = (x, 32, 0.5, x, x, x, None, x, 64), {f"C{i}": i for i in range(20)}
    fake = Kernel()
    fake.arg_names = tuple(f"a{i}" for i in range(9)) + tuple(constants)  # type: ignore[assignment]
    best = min(timeit.repeat(lambda: runtime._start(fake, 0, (7,), args, constants), number=200, repeat=20)) / 200
    assert best < 15e-6, f"{best * 1e6:.1f} us"
