"""Steps: what a frozen row runs one after the other. A backend may take a recorded row of them as one call."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fused_resnet import reference
from fused_resnet.backends.backend import Backend, Packed
from fused_resnet.backends.primitives import BnAct, BnActMaxPool, ConvBiasAct
from fused_resnet.spec import PoolSpec, ShortcutSpec


class MaxPool(NamedTuple):
    """PyTorch's max-pool."""

    x: Tensor
    pool: PoolSpec

    def run(self) -> Tensor:
        return F.max_pool2d(self.x, *self.pool.window)


class ShortcutInput(NamedTuple):
    """x after a shortcut without parameters."""

    x: Tensor
    shortcut: ShortcutSpec

    def run(self) -> Tensor:
        return reference.shortcut_input(self.x, self.shortcut)


class Step(NamedTuple):
    """A call of a primitive.

    Attributes:
        call: with all its operands. backend: runs it; None: the planner chooses. packed: the weight, as the backend
            packed it. owned: nothing else uses the summand, so its memory may be overwritten. pool: a max-pool that a
            packed convolution does in the same pass.
    """

    call: ConvBiasAct | BnAct | BnActMaxPool
    backend: Backend | None = None
    packed: Packed | None = None
    owned: bool = False
    pool: PoolSpec | None = None


class Recorded(NamedTuple):
    """A step of a recorded row.

    Attributes:
        x, summand: the numbers of the results that it takes. 0 is the row's input, 1 the row's summand; the steps'
            results follow in order.
    """

    step: Step | MaxPool | ShortcutInput
    x: int
    summand: int | None
