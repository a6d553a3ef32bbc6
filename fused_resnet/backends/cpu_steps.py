"""The CPU backend's form of a recorded row: vectors that csrc/cpu/ops/frozen_row.cpp reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends.primitives import BnActMaxPool, ConvBiasAct
from fused_resnet.backends.steps import AnyStep, Average, Excited, MaxPool, Recorded, ShortcutInput, Step
from fused_resnet.backends.values import Norm, vector_dtype
from fused_resnet.spec import Act, ConvSpec, PoolSpec

# In the order of frozen_row.cpp's enum. The first word of a packed weight's kind is one of these.
KINDS = (
    "aten", "onednn", "winograd", "gemm", "depthwise", "grouped", "stem", "bn_act", "bn_act_max_pool", "max_pool",
    "avg_pool", "pad", "excitation", "average",
)  # fmt: skip
# oneDNN's names of the activations that its convolutions can apply: (name, scalars); in the order of frozen_row.cpp's
POST_OPS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "identity": ("none", ()),
    "relu": ("relu", ()),
    "leaky_relu": ("leaky_relu", ("param",)),
    "sigmoid": ("sigmoid", ()),
    "silu": ("swish", ()),
    "relu6": ("hardtanh", (0.0, 6.0)),
    "hardswish": ("hardswish", ()),
}
_POST_OPS = list(POST_OPS)


def vector(numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Numbers as operators take them: a list would be converted one by one in each call."""
    return torch.tensor(numbers, dtype=dtype, device="cpu")


def scalars(act: Act) -> list[float]:
    """The numbers of an activation's post-op."""
    return [act.param if s == "param" else s for s in POST_OPS[act.name][1]]


def needs_pass(act: Act, summand: bool) -> bool:
    """Whether an activation, after a summand, is none of the post-ops of oneDNN's convolutions."""
    return act.name not in POST_OPS or (summand and act.name not in ("identity", "relu"))


def identity(channels: int, dtype: torch.dtype) -> Norm:
    """A norm that changes nothing."""
    one = torch.ones(channels, dtype=vector_dtype(dtype))
    return Norm(one, torch.zeros_like(one), one, one)


def _run(tensors: list[Tensor], ints: Tensor, reals: Tensor, x: Tensor, summand: Tensor | None) -> Tensor:
    return torch.ops.fused_resnet_cpu.frozen_row(x, summand, tensors, ints, reals)


class Writer:
    """Writes steps as frozen_row.cpp reads them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.ints: list[int] = []
        self.reals: list[float] = []
        self.places = [0, 1]  # recorded result -> result of a written step
        self.steps = 0

    def row(self, recorded: Sequence[Recorded]) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The row as a function of its input and its summand."""
        for step, x, summand in recorded:
            self._step(step, self.places[x], -1 if summand is None else self.places[summand])
            self.places.append(self.steps + 1)
        ints = vector([self.steps, *self.ints], torch.int64)
        return partial(_run, self.tensors, ints, vector(self.reals, torch.float64))

    def _step(self, step: AnyStep, x: int, summand: int) -> None:
        if isinstance(step, MaxPool):
            return self._write("max_pool", x, pool=step.pool)
        if isinstance(step, Average):
            return self._write("average", x)
        if isinstance(step, ShortcutInput):
            shortcut = step.shortcut
            if shortcut.pool is not None:
                return self._write("avg_pool", x, pool=shortcut.pool)
            return self._write("pad", x, conv=ConvSpec(stride=shortcut.stride), channels=shortcut.channels)
        if isinstance(step, Excited):
            by = step.by
            tensors = [by.weight.flatten(1), by.bias, by.gate_weight.flatten(1), by.gate_bias]
            return self._write("excitation", x, tensors=tensors, act=by.act, gate=by.gate)
        call = step.call
        if isinstance(call, ConvBiasAct):
            return self._convolution(call, step, x, summand)
        norm = [call.norm.scale, call.norm.shift]
        pool = call.pool if isinstance(call, BnActMaxPool) else None
        return self._write(call.name, x, summand, norm, act=call.act, pool=pool)

    def _convolution(self, call: ConvBiasAct, step: Step, x: int, summand: int) -> None:
        assert call.bias is not None
        act, conv, dtype = call.act, call.conv, call.x.dtype
        if step.packed is None:
            tensors = [call.weight.to(dtype), call.bias.to(dtype)]
            if summand >= 0 or act.name != "identity":
                tensors += identity(call.bias.numel(), dtype)[:2]
            return self._write("aten", x, summand, tensors, conv=conv, act=act)
        kind, tensors = step.packed.kind.split()[0], [step.packed.weight, call.bias]
        if kind != "onednn":
            return self._write(kind, x, summand, tensors, step.owned, conv, act, step.pool)
        tensors[1] = call.bias.to(step.packed.weight.dtype)
        if not needs_pass(act, summand >= 0):
            return self._write(kind, x, summand, tensors, step.owned, conv, act)
        self._write(kind, x, -1, tensors, conv=conv)
        return self._write("bn_act", self.steps + 1, summand, [*identity(call.bias.numel(), dtype)[:2]], act=act)

    def _write(
        self, kind: str, x: int, summand: int = -1, tensors: Sequence[Tensor] = (), owned: bool = False,
        conv: ConvSpec | None = None, act: Act | None = None, pool: PoolSpec | None = None, channels: int = 0,
        gate: Act | None = None,
    ) -> None:  # fmt: skip
        conv, act, gate = conv or ConvSpec(), act or Act("identity"), gate or Act("identity")
        post_op = _POST_OPS.index(act.name) if kind == "onednn" else 0
        numbers = scalars(act) if kind == "onednn" else [gate.param]
        self.ints += [KINDS.index(kind), x, summand, len(self.tensors), len(tensors), owned]
        self.ints += [*conv.stride, *conv.padding, *conv.dilation, conv.groups]
        self.ints += [act.index, channels, post_op, gate.index]
        self.ints.append(pool is not None)
        if pool is not None:
            self.ints += [*pool.kernel, *pool.stride, *pool.padding, pool.ceil_mode, pool.count_include_pad]
        self.ints.append(len(numbers))
        self.reals += [act.param, *numbers]
        self.tensors += tensors
        self.steps += 1
