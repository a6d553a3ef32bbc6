"""Generated networks, edited between calls: a fused one goes on doing what its plain twin does.

Longer hunts: ``pytest tests/fusion/test_living_models.py --hypothesis-profile=hunt`` (profiles: tests/conftest.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from edits import Call, Edit, apply
from hypothesis import given, note
from lives import BOUND, LIVES, outcome, same
from living import PROGRAMS, Program, World
from torch import Tensor

import fused_resnet as fr
from fused_resnet.chain import call as chain_call

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many chains ran in each row, but for those that a checkpoint runs again."""
    chains: list[int] = []
    row = chain_call.run_row

    def run(*args: Any) -> Tensor:
        chains.append(0 if chain_call.in_backward() else len(args[1]))
        return row(*args)

    with patch.object(chain_call, "run_row", run):
        yield chains


def live(program: Program, life: list[tuple[Call, list[Edit]]]) -> tuple[int, int]:
    """Calls a network and its fused twin, edits both, calls them again; returns how many calls, and how many chains."""
    torch._dynamo.reset()
    world = World(program)
    total = 0
    try:
        plain = world.network()
        nets: list[Any] = [plain, fr.fuse(copy.deepcopy(plain))]
        for step, (call, edits) in enumerate(life):
            for edit in edits:
                nets = apply(world, nets, edit)
            if call.dtype != torch.float64:
                nets = [net.to(call.dtype) for net in nets]
            want = outcome(nets[0], call, step)
            with counted() as chains:
                got = outcome(nets[1], call, step)
            note(f"step {step}: {want.get('error', '')!r}")
            same(got, want, BOUND[call.dtype])
            ran = sum(chains)
            total += ran
            if step == 0 and "raised" not in want:
                said = sum(row.chains for row in fr.explain(nets[1]).rows)
                # behind a graph break one graph may serve several modules, and names the first of them
                fronts = [front for m in nets[1].modules() for front in m.__dict__.get("_fr_fronts", {}).values()]
                whole = [len(front.graphs) for front in fronts]
                assert said == ran if whole == [1] else said <= ran, (said, ran, str(fr.explain(nets[1])))
            # on from the same numbers; a checkpoint's second run updates statistics again in plain norms alone
            if call.dtype != torch.float64 or "raised" in want or "checkpoint(" in program.source:
                nets = [net.double() for net in nets]
                for net in nets:
                    net.zero_grad()
                nets[1].load_state_dict(nets[0].state_dict())
    finally:
        world.restore()
    return len(life), total


@pytest.mark.slow
@given(PROGRAMS, LIVES)
def test_a_fused_network_lives_as_its_plain_twin_does(program: Program, life: list[tuple[Call, list[Edit]]]) -> None:
    note(program.source)
    live(program, life)
