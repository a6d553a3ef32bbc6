"""Which chains a forward runs, what it keeps for the backward, and which work the backward asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import fused_resnet.chain.backward
import fused_resnet.chain.operators
from fused_resnet.backends import Call, ConvBackward
from fused_resnet.chain import call as chain_call


@contextmanager
def rows() -> Iterator[list[list[int]]]:
    """The units of each chain of each row that runs, projections included."""
    found: list[list[int]] = []
    real = chain_call.run_row

    def row(x: Tensor, chains: Any, *rest: Any) -> Tensor:
        found.append([len(chain.everyone) for chain in chains])
        return real(x, chains, *rest)

    with patch.object(chain_call, "run_row", row):
        yield found


def rows_of(call: Callable[[], Any]) -> list[int]:
    """How many chains each row has that a call runs."""
    with rows() as found:
        call()
    return [len(chains) for chains in found]


@contextmanager
def saved_tensors() -> Iterator[dict[int, Tensor]]:
    """Everything that autograd saves, by storage."""
    found: dict[int, Tensor] = {}

    def pack(v: Tensor) -> Tensor:
        found[v.untyped_storage().data_ptr()] = v
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        yield found


def composed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are composed of primitives on every backend, so that a test can watch those."""
    monkeypatch.setattr(fused_resnet.chain.operators, "run_whole", lambda call: None)


class Calls:
    """Which convolution gradients a backward pass asked the backend for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.conv_backward: list[tuple[bool, bool]] = []
        real = fused_resnet.chain.backward.run

        def run(call: Call[Any]) -> Any:
            if isinstance(call, ConvBackward):
                self.conv_backward.append((call.need_input, call.need_weight))
            return real(call)

        composed(monkeypatch)
        monkeypatch.setattr(fused_resnet.chain.backward, "run", run)
