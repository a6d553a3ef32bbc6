"""Steps: what a frozen row runs one after the other. A backend may take a recorded row of them as one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import reference
from fused_resnet.backends.backend import Backend, Packed
from fused_resnet.backends.primitives import BnAct, BnActMaxPool, ConvBiasAct
from fused_resnet.spec import Act, PoolSpec, ShortcutSpec

# The dtypes of the images whose averages and excitations are steps of a row.
AVERAGED = (torch.float32, torch.bfloat16)


class MaxPool(NamedTuple):
    """PyTorch's max-pool."""

    x: Tensor
    pool: PoolSpec

    def run(self) -> Tensor:
        return F.max_pool2d(self.x, *self.pool.window)


class Average(NamedTuple):
    """The mean of each channel of x [N, C, H, W]: [N, C, 1, 1]."""

    x: Tensor

    def run(self) -> Tensor:
        return self.x.mean((2, 3), keepdim=True)


class ShortcutInput(NamedTuple):
    """x after a shortcut without parameters."""

    x: Tensor
    shortcut: ShortcutSpec

    def run(self) -> Tensor:
        return reference.shortcut_input(self.x, self.shortcut)


class Excitation(NamedTuple):
    """The tensors, in float32, and the activations of a squeeze-and-excitation.

    Attributes:
        weight, bias: [S, C, 1, 1] and [S]. act: after them. gate_weight, gate_bias: [C, S, 1, 1] and [C]. gate: after
            these.

    Source: Hu et al., Squeeze-and-Excitation Networks (arXiv 1709.01507), equations 2 to 4.
    """

    weight: Tensor
    bias: Tensor
    act: Act
    gate_weight: Tensor
    gate_bias: Tensor
    gate: Act


class Excited(NamedTuple):
    """x [N, C, H, W] times one factor per image and channel. Nothing else uses x, so its memory may be reused."""

    x: Tensor
    by: Excitation

    def run(self) -> Tensor:
        by = self.by
        mean = Average(self.x.to(by.weight.dtype)).run()
        hidden = reference.act(torch.conv2d(mean, by.weight, by.bias), by.act)
        factor = reference.act(torch.conv2d(hidden, by.gate_weight, by.gate_bias), by.gate)
        return (self.x * factor).to(self.x.dtype)


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


AnyStep = Step | MaxPool | Average | ShortcutInput | Excited


class Recorded(NamedTuple):
    """A step of a recorded row.

    Attributes:
        x, summand: the numbers of the results that it takes. 0 is the row's input, 1 the row's summand; the steps'
            results follow in order.
    """

    step: AnyStep
    x: int
    summand: int | None
