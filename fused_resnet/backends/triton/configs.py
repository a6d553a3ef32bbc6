"""Kernel configurations of the convolutions: (kind, shape, dtype, device) -> tile, warps, stages, splits.

``choose`` takes the first of ``candidates``. A planner may time the others and impose one by ``use``. Tensors that are
not on a GPU (meta, the interpreter's) get the configurations of ``use_target``, by default those of an H200.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
import triton
from torch import Tensor

from fused_resnet.backends.triton.runtime import cdiv
from fused_resnet.base.scoped import scoped

Kind = Literal["fprop", "dgrad", "wgrad"]


@dataclass(frozen=True)
class Target:
    """The properties of a chip on which configurations depend.

    "cuda" or "hip", its architecture as Triton names it (80, 90, "gfx942"), bytes of shared memory per program,
    processors.
    """

    backend: str
    arch: int | str
    shared: int
    processors: int


TARGETS = {
    "sm_80": Target("cuda", 80, 163 << 10, 108),
    "sm_90": Target("cuda", 90, 227 << 10, 132),
    "gfx942": Target("hip", "gfx942", 64 << 10, 304),
}


@dataclass(frozen=True)
class Config:
    """A product [block_m, block_k] x [block_k, block_n] per step. ``splits`` (wgrad): parts of the sum."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1

    def constants(self) -> dict[str, int]:
        """The constants of ``runtime.launch``."""
        tile = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return tile | {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Problem:
    """The properties of a convolution on which its configuration depends.

    The matrix product m x n x k (wgrad: k output channels by R*S*C columns, summed over the pixels), the channels of
    which the k axis (wgrad: the n axis) is made, and the way in which operands are loaded.
    """

    kind: Kind
    m: int
    n: int
    k: int
    channels: int
    itemsize: int
    # float32 without tf32: the sums run on the ordinary units, not on the matrix unit
    ieee: bool
    # fprop: a prologue is applied; dgrad, wgrad: dy is formed from two tensors (BatchNorm not frozen)
    formed: bool


_target: ContextVar[Target | None] = ContextVar("fused_resnet_triton_target", default=None)
_imposed: ContextVar[dict[str, Config] | None] = ContextVar("fused_resnet_triton_config", default=None)
_asked: ContextVar[list[Problem] | None] = ContextVar("fused_resnet_triton_asked", default=None)


def use_target(name: str) -> AbstractContextManager[Target]:
    """Within this context configurations are those of one of ``TARGETS``, chips that need not be here."""
    return scoped(_target, TARGETS[name])


def use(**imposed: Config) -> AbstractContextManager[dict[str, Config]]:
    """Within this context (and thread) kernels of a named kind run with the given configuration: ``use(fprop=...)``."""
    return scoped(_imposed, (_imposed.get() or {}) | imposed)


def asked() -> AbstractContextManager[list[Problem]]:
    """Records the problems for which a configuration is chosen within this context (and thread)."""
    return scoped(_asked, [])


def target_of(device: torch.device) -> Target:
    """The chip behind a device."""
    return _target.get() or (_device_target(device.index) if device.type == "cuda" else TARGETS["sm_90"])


@lru_cache
def _device_target(index: int | None) -> Target:
    chip = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    if torch.version.hip is not None:
        return Target("hip", chip.gcnArchName.split(":")[0], 64 << 10, chip.multi_processor_count)
    # a program may use all of a processor's except the 1 KB that the driver reserves
    shared = getattr(chip, "shared_memory_per_block_optin", TARGETS["sm_80"].shared)
    return Target("cuda", 10 * chip.major + chip.minor, shared, chip.multi_processor_count)


def choose(kind: Kind, m: int, n: int, k: int, channels: int, like: Tensor, *, tf32: bool, formed: bool) -> Config:
    """The configuration for a problem on the device of ``like``, in its dtype (see ``Problem``)."""
    problem = Problem(kind, m, n, k, channels, like.element_size(), like.dtype == torch.float32 and not tf32, formed)
    if (problems := _asked.get()) is not None:
        problems.append(problem)
    return (_imposed.get() or {}).get(kind) or candidates(problem, target_of(like.device))[0]


@lru_cache(maxsize=4096)
def candidates(problem: Problem, target: Target) -> tuple[Config, ...]:
    """A few configurations worth timing, the default first. All fit into the chip's shared memory."""
    found: list[Config] = []
    for config in _tiles(problem, target):
        config = _fit(config, problem, target)
        if problem.kind == "wgrad":
            config = replace(config, splits=_splits(config, problem, target))
        if config not in found:
            found.append(config)
    return tuple(found)


def _tiles(problem: Problem, target: Target) -> list[Config]:
    """Tiles in order of preference."""
    if problem.ieee:
        return [Config(64, 64, 16, 4, 2), Config(64, 32, 16, 4, 2), Config(128, 64, 16, 8, 2)]
    depth = 32 if problem.itemsize == 4 or target.backend == "hip" else 64
    stages = 2 if target.backend == "hip" else 3
    wide = Config(128, 128, depth, 8, stages)
    narrow = Config(128, 64, depth, 8, stages)
    small = Config(64, 64, depth, 4, stages)
    tall = Config(256, 64, depth, 8, stages)
    if problem.kind == "wgrad":
        flat = Config(64, 128, depth, 8, stages)
        if problem.m <= 64:
            return [flat, small] if problem.n > 64 else [small]
        return [wide, flat, narrow] if problem.n > 64 else [narrow, small]
    chosen = _depth(problem.channels, problem.k, depth, lone=target.arch != 90 and problem.kind == "fprop")
    wide, narrow, small, tall = (replace(c, block_k=chosen) for c in (wide, narrow, small, tall))
    if problem.n <= 64:
        found = [narrow, tall, small]
    else:
        few = cdiv(problem.m, 128) * cdiv(problem.n, 128) < target.processors
        # two tiles that form one operand use all registers of a gfx942
        few |= problem.kind == "dgrad" and target.backend == "hip"
        found = [narrow, small, wide] if few else [wide, narrow, small]
    return [*found, replace(found[0], block_k=depth)] if problem.channels % depth == 0 else found


def _depth(channels: int, k: int, most: int, lone: bool) -> int:
    """The step of the sum. It divides the channels if possible, so that a step has one tap.

    ``lone``: the sum may have a single step. Older compilers serialize the wgmma of a single step.
    """
    for depth in (most, most // 2):
        if channels % depth == 0 and (lone or k > depth):
            return depth
    return max(16, min(most, triton.next_power_of_2(k)))


def _shared(config: Config, problem: Problem) -> int:
    """The approximate bytes of shared memory: the operands of every stage, and the operands formed from them."""
    m, n, k = config.block_m, config.block_n, config.block_k
    if problem.kind == "fprop":
        return config.num_stages * (m + n) * k * problem.itemsize
    loads = (2 if problem.formed else 1) * m
    formed = (m + n) * k if problem.kind == "wgrad" else 0
    return (config.num_stages * (loads + n) * k + formed) * problem.itemsize


def _fit(config: Config, problem: Problem, target: Target) -> Config:
    """Reduces the stages, then the depth of a step, until the shared memory suffices."""
    while _shared(config, problem) > target.shared:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_k > 16:
            config = replace(config, block_k=config.block_k // 2)
        else:
            break
    return config


def _splits(config: Config, problem: Problem, target: Target) -> int:
    """The split of wgrad's sum that is predicted to end first.

    The predicted time is the rounds of programs over the processors, each steps/splits long, plus the cost of writing
    and summing the parts, in units of one step. A step takes about 0.6 us on an H200, where a part's 8 bytes per
    element of dw cost 1.7e-12 s.
    """
    tiles = cdiv(problem.m, config.block_m) * cdiv(problem.n, config.block_n)
    steps = cdiv(problem.k, config.block_k)
    part = problem.m * problem.n * 3e-6

    def cost(splits: int) -> float:
        return cdiv(tiles * splits, target.processors) * cdiv(steps, splits) + (splits * part if splits > 1 else 0)

    most = max(1, min(steps, cdiv(4 * target.processors, tiles)))
    return min(range(1, most + 1), key=cost)
