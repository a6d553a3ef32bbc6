"""Lives of generated networks: calls with edits between them, and all that a call leaves behind."""

from __future__ import annotations

from typing import Any

import torch
from edits import CALLS, EDITS, Call, Edit
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# in float32 a norm of equal values multiplies rounding by 300
BOUND = {torch.float64: 1e-9, torch.float32: 1e-2}
GRAD = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
# What a backward may be refused for is which tensors were kept for it, and a chain keeps others.
IN_PLACE = "modified by an inplace operation"


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


def lives(calls: int) -> st.SearchStrategy[list[tuple[Call, list[Edit]]]]:
    """One call, and so many others with edits in front of each."""
    edits = st.lists(EDITS, min_size=1, max_size=2)
    return st.builds(
        lambda first, more: [(first, []), *more],
        CALLS,
        st.lists(st.tuples(CALLS, edits), min_size=calls, max_size=calls),
    )


LIVES = st.one_of(lives(1), lives(3))
