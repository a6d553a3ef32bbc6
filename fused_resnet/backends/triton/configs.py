"""Kernel configurations of the convolutions: (kind, shape, dtype, device) -> tile, warps, stages, splits.

``choose`` takes the first of ``candidates``; a planner may time the others and impose one by ``use``. Tensors on
no GPU (meta, the interpreter's) get the configurations of ``use_target``, an H200's by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
import triton
from torch import Tensor

from fused_resnet.backends.triton.runtime import cdiv

Kind = Literal["fprop", "dgrad", "wgrad"]


@dataclass(frozen=True)
class Target:
    """A chip, as far as configurations depend on it: "cuda" or "hip", its architecture as Triton names it (80, 90,
    "gfx942"), bytes of shared memory per program, processors."""

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
        """As ``runtime.launch`` takes them."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class Problem:
    """What a configuration depends on: the matrix product m x n x k (wgrad: k output channels by R*S*C columns, summed
    over the pixels), the channels that the k (wgrad: n) axis is made of, and how operands are loaded."""

    kind: Kind
    m: int
    n: int
    k: int
    channels: int
    itemsize: int
    # float32 without tf32: no matrix unit, the sums run on the ordinary ones
    ieee: bool
    # fprop: a prologue is applied; dgrad, wgrad: dy comes from two tensors (not frozen)
    formed: bool


_target: ContextVar[Target | None] = ContextVar("fused_resnet_triton_target", default=None)
_imposed: ContextVar[dict[str, Config] | None] = ContextVar("fused_resnet_triton_config", default=None)
_asked: ContextVar[list[Problem] | None] = ContextVar("fused_resnet_triton_asked", default=None)


@contextmanager
def use_target(name: str) -> Iterator[None]:
    """Within it configurations are those of a chip that isn't here, one of ``TARGETS``."""
    token = _target.set(TARGETS[name])
    try:
        yield
    finally:
        _target.reset(token)


@contextmanager
def use(**imposed: Config) -> Iterator[None]:
    """Within it (this thread) every kernel of a named kind runs with the configuration given: ``use(fprop=...)``."""
    token = _imposed.set((_imposed.get() or {}) | imposed)
    try:
        yield
    finally:
        _imposed.reset(token)


@contextmanager
def asked() -> Iterator[list[Problem]]:
    """The problems for which a configuration is chosen within it (this thread)."""
    problems: list[Problem] = []
    token = _asked.set(problems)
    try:
        yield problems
    finally:
        _asked.reset(token)


def target_of(device: torch.device) -> Target:
    """The chip behind a device."""
    imposed = _target.get()
    if imposed is not None:
        return imposed
    return _device_target(device.index) if device.type == "cuda" else TARGETS["sm_90"]


@lru_cache
def _device_target(index: int | None) -> Target:
    chip = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    if torch.version.hip is not None:
        return Target("hip", chip.gcnArchName.split(":")[0], 64 << 10, chip.multi_processor_count)
    # what a program may have: all of a processor's but the 1 KB that the driver keeps
    shared = getattr(chip, "shared_memory_per_block_optin", TARGETS["sm_80"].shared)
    return Target("cuda", 10 * chip.major + chip.minor, shared, chip.multi_processor_count)


def choose(kind: Kind, m: int, n: int, k: int, channels: int, like: Tensor, *, tf32: bool, formed: bool) -> Config:
    """The configuration for a problem on the device of ``like``, in its dtype (see ``Problem``)."""
    problem = Problem(kind, m, n, k, channels, like.element_size(), like.dtype == torch.float32 and not tf32, formed)
    problems = _asked.get()
    if problems is not None:
        problems.append(problem)
    imposed = (_imposed.get() or {}).get(kind)
    return imposed if imposed is not None else _candidates(problem, target_of(like.device))[0]


def candidates(problem: Problem, target: Target) -> tuple[Config, ...]:
    """A few configurations worth timing, the default first; all fit the chip's shared memory."""
    return _candidates(problem, target)


@lru_cache(maxsize=4096)
def _candidates(problem: Problem, target: Target) -> tuple[Config, ...]:
    found: list[Config] = []
    for config in _tiles(problem, target):
        config = _fit(config, problem, target)
        if problem.kind == "wgrad":
            config = replace(config, splits=_splits(config, problem, target))
        if config not in found:
            found.append(config)
    return tuple(found)


def _tiles(problem: Problem, target: Target) -> list[Config]:
    """Tiles in the order of preference."""
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
        # two tiles that form one operand take all the registers of a gfx942
        few |= problem.kind == "dgrad" and target.backend == "hip"
        found = [narrow, small, wide] if few else [wide, narrow, small]
    return [*found, replace(found[0], block_k=depth)] if problem.channels % depth == 0 else found


def _depth(channels: int, k: int, most: int, lone: bool) -> int:
    """The step of the sum: a divisor of the channels if it can be, so that a step has one tap. ``lone``: it may be the
    only one; of a lone step older compilers serialize the wgmma."""
    for depth in (most, most // 2):
        if channels % depth == 0 and (lone or k > depth):
            return depth
    return max(16, min(most, triton.next_power_of_2(k)))


def _shared(config: Config, problem: Problem) -> int:
    """About the bytes of shared memory: the operands of every stage, and those formed from them."""
    m, n, k = config.block_m, config.block_n, config.block_k
    if problem.kind == "fprop":
        return config.num_stages * (m + n) * k * problem.itemsize
    loads = (2 if problem.formed else 1) * m
    formed = (m + n) * k if problem.kind == "wgrad" else 0
    return (config.num_stages * (loads + n) * k + formed) * problem.itemsize


def _fit(config: Config, problem: Problem, target: Target) -> Config:
    """Fewer stages, then shallower steps, until the shared memory suffices."""
    while _shared(config, problem) > target.shared:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_k > 16:
            config = replace(config, block_k=config.block_k // 2)
        else:
            break
    return config


def _splits(config: Config, problem: Problem, target: Target) -> int:
    """The split of wgrad's sum that should end first: rounds of programs over the processors, each steps/splits long,
    plus what writing and summing the parts costs, in units of one step (about 0.6 us on an H200, where a part's 8 bytes
    per element of dw cost 1.7e-12 s)."""
    tiles = cdiv(problem.m, config.block_m) * cdiv(problem.n, config.block_n)
    steps = cdiv(problem.k, config.block_k)
    part = problem.m * problem.n * 3e-6

    def cost(splits: int) -> float:
        return cdiv(tiles * splits, target.processors) * cdiv(steps, splits) + (splits * part if splits > 1 else 0)

    most = max(1, min(steps, cdiv(4 * target.processors, tiles)))
    return min(range(1, most + 1), key=cost)
