"""Generated networks, edited between calls: a fused one goes on doing what its plain twin does.

Longer hunts: ``pytest tests/test_living_models.py --hypothesis-profile=hunt`` (profiles: tests/conftest.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from edits import CALLS, EDITS, Call, Edit, apply
from hypothesis import given, note, settings
from hypothesis import strategies as st
from living import PROGRAMS, Program, World
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fused_resnet as fr
from fused_resnet.chain import call as chain_call

# in float32 a norm of equal values multiplies rounding by 300
BOUND = {torch.float64: 1e-9, torch.float32: 1e-2}
GRAD = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
# What a backward may be refused for is which tensors were kept for it, and a chain keeps others.
IN_PLACE = "modified by an inplace operation"


@pytest.fixture(autouse=True)
def quiet(one_thread: None) -> Iterator[None]:
    yield
    torch._dynamo.reset()


def image(call: Call, seed: int) -> Tensor:
    torch.manual_seed(seed)
    n, (h, w) = call.batch, call.size
    x = torch.randn(n, 3, h, w, dtype=call.dtype) * 1.3 + 0.4
    if call.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif call.layout == "strided":
        x = torch.cat([x, x], 3)[..., ::2]
    return x.requires_grad_(call.wants and call.grad != "inference")


def tensors(value: Any) -> list[Any]:
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]


def outcome(net: nn.Module, call: Call, seed: int, run: nn.Module | None = None) -> dict[str, Any]:
    """All that a call, and a step, leave behind; ``run``: what is called instead of the network."""
    x = image(call, seed)
    net.zero_grad()
    found: dict[str, Any] = {}
    torch.manual_seed(seed)
    try:
        with GRAD[call.grad]():
            out = (run or net)(x)
        outs = tensors(out)
        found["form"] = str(pytree.tree_structure(out)), [(o.shape, o.dtype, o.requires_grad) for o in outs]
        found |= {f"out {i}": o.detach().clone() for i, o in enumerate(outs)}
    except Exception as error:
        return {"raised": type(error), "error": error}
    found |= {f"state {n}": v.clone() for n, v in net.state_dict().items()}
    found |= {f"watched {n}": m.watched for n, m in net.named_modules() if hasattr(m, "watched")}
    found |= {f"seen {n}": m.seen for n, m in net.named_modules() if hasattr(m, "seen")}
    found["input"] = x.detach().clone()
    wanted = [o for o in outs if o.requires_grad]
    if wanted:
        try:
            sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in wanted).backward()  # type: ignore[union-attr]
        except Exception as error:
            return found | {"raised": type(error), "error": error}
        found |= {f"grad {n}": p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        if x.grad is not None:
            found["grad input"] = x.grad
    return found


def same(got: dict[str, Any], want: dict[str, Any], bound: float) -> None:
    if IN_PLACE in str(want.get("error")) and "raised" not in got:
        got = {k: v for k, v in got.items() if not k.startswith("grad")} | {k: want[k] for k in ("raised", "error")}
    assert got.get("raised") == want.get("raised"), (got.get("error"), want.get("error"))
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    for key, value in want.items():
        if not isinstance(value, Tensor):
            assert key == "error" or got[key] == value, (key, got[key], value)
        elif value.numel():
            assert got[key].shape == value.shape and got[key].dtype == value.dtype, key
            scale = max(1.0, torch.nan_to_num(value.double(), 0, 0, 0).abs().max().item())
            limits = {"rtol": bound, "atol": bound * scale, "equal_nan": True}
            torch.testing.assert_close(got[key], value, **limits, msg=lambda text, key=key: f"{key}: {text}")


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


def lives(calls: int) -> st.SearchStrategy[list[tuple[Call, list[Edit]]]]:
    """One call, and so many others with edits in front of each."""
    edits = st.lists(EDITS, min_size=1, max_size=2)
    return st.builds(
        lambda first, more: [(first, []), *more],
        CALLS,
        st.lists(st.tuples(CALLS, edits), min_size=calls, max_size=calls),
    )


LIVES = st.one_of(*[lives(1)] * 11, lives(3))


@pytest.mark.slow
@settings(max_examples=200)
@given(PROGRAMS, LIVES)
def test_a_fused_network_lives_as_its_plain_twin_does(program: Program, life: list[tuple[Call, list[Edit]]]) -> None:
    note(program.source)
    live(program, life)
