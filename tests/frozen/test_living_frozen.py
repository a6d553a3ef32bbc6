"""``test_living_models.py`` for frozen networks: a file of its own, for another worker."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from edits import Call, Edit, apply
from hypothesis import given, note, settings
from lives import BOUND, LIVES, image, outcome, same
from living import PROGRAMS, Program, World

import fused_resnet as fr
from fused_resnet.frozen import rows as frozen_rows

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")


def _counted(edit: Edit) -> bool:
    """Not a write through ``.data``, which PyTorch counts nowhere (docs/limits.md)."""
    return edit.kind != "layers" or edit.how % 5 != 2


def live_frozen(program: Program, life: list[tuple[Call, list[Edit]]]) -> tuple[int, int]:
    """Freezes a network, calls both, edits both, calls them again; returns how many calls, and how many chains."""
    torch._dynamo.reset()
    world = World(program)
    total = 0
    try:
        plain = world.network().eval()
        copied = copy.deepcopy(plain)
        calls = [replace(call, grad="inference" if call.grad == "inference" else "no_grad", dtype=torch.float64)
                 for call, _ in life]  # fmt: skip
        want = outcome(plain, calls[0], 0)
        torch.manual_seed(0)
        try:
            frozen = fr.freeze(copied, image(calls[0], 0))
        except Exception as error:
            assert type(error) is want.get("raised"), (error, want.get("error"))
            return 0, 0
        assert "raised" not in want and not frozen.differs
        nets: list[Any] = [plain, frozen.model]
        for step, (call, edits) in enumerate(zip(calls, [filter(_counted, edits) for _, edits in life], strict=True)):
            for edit in edits:
                nets = apply(world, nets, edit)
            frozen.model = nets[1]
            want = outcome(nets[0], call, step)
            with patch.object(frozen_rows, "run_chains", wraps=frozen_rows.run_chains) as rows:
                got = outcome(nets[1], call, step, frozen)
            note(f"step {step}: {want.get('error', '')!r}")
            same(got, want, BOUND[torch.float64])
            ran = sum(len(args[1]) for args, _ in rows.call_args_list)
            total += ran
            if step == 0 and "raised" not in want and len(frozen.front().graphs) == 1:
                assert sum(row.chains for row in fr.explain(frozen).rows) == ran
            if "raised" in want:
                nets[1].load_state_dict(nets[0].state_dict())
    finally:
        world.restore()
    return len(life), total


@pytest.mark.slow
@settings(max_examples=settings.default.max_examples // 2)  # of the profile
@given(PROGRAMS, LIVES)
def test_a_frozen_network_lives_as_its_plain_twin_does(program: Program, life: list[tuple[Call, list[Edit]]]) -> None:
    note(program.source)
    live_frozen(program, life)
