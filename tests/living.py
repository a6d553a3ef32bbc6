"""Networks that live: generated blocks, as source text, and what happens to them between two calls.

A ``Program`` is a network as data: which statements its blocks' forwards run, how the blocks are held and called. An
``Edit`` is one thing that somebody does to a network or to its input. Both come from hypothesis and print as code.
"""

from __future__ import annotations

import copy
import enum
import itertools
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fused_resnet.patterns import original

CHANNELS = 4
GENERATED = "living_generated"  # the module that the blocks are in


class Mode(enum.Enum):
    """An attribute that a forward branches on."""

    A = 1
    B = 2


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


# ------------------------------------------------------------------------------------------------ programs
VALUES = {  # attribute -> the values that it has and may get
    "a_int": (2, 3), "a_float": (0.5, 0.25), "a_bool": (True, False), "a_str": ("relu", "silu"), "a_none": (None, 1.5),
    "a_enum": (Mode.A, Mode.B), "a_tuple": ((0.5, 2), (0.25, 3)), "a_dtype": (torch.float64, torch.float32),
    "a_np": (np.float64(0.5), np.float64(2.0)), "slope": (0.1, 0.3), "limit": (4, 20), "index": (0, 1),
    "count": (1, 2), "key": ("one", "two"), "a_fn": (F.relu, torch.tanh), "order": (("bn2",), ("act", "bn2")),
}  # fmt: skip
SCALES = [
    "self.a_int", "self.a_float", "self.a_list[0]", "self.a_dict['k']", "self.a_tuple[1]", "self.a_ns.scale",
    "self.a_tensor", "float(self.a_np)", "self.a_np", "self.CLS", "SETTINGS['scale']", "SCALE", "cell",
    "len(self.a_set)", "(self.a_none or 1)", "self.scaled()", "self.a_property", "len(self.items)",
    "self.a_buffer", "self.a_parameter", "self.bn0.eps", "(self.bn0.momentum or 1)", "self.a_tensor.item()",
]  # fmt: skip
CONDITIONS = [
    "self.a_bool", "self.a_enum is Mode.A", "self.a_str == 'relu'", "'relu' in self.a_set", "self.a_none is None",
    "self.training", "self.bn0.training", "h.shape[2] > self.limit", "h.shape[0] > 2", "torch.is_grad_enabled()",
    "h.requires_grad", "len(self.a_list) > 1", "isinstance(self.act, nn.ReLU)", "hasattr(self, 'extra')",
    "h.is_contiguous()", "self.a_dict.get('on')", "self.conv0.weight.requires_grad", "torch.is_inference_mode_enabled()",
    "self.a_dtype == torch.float64", "self.CLS > 1", "h.dtype == torch.float64", "self.bn1.affine",
]  # fmt: skip
ACTS = [  # {d} may be written, {v} not
    "{d} = F.relu({v})", "{d} = {v}.relu()", "{d} = torch.relu({v})", "F.relu({d}, inplace=True)", "{d}.relu_()",
    "F.relu_({d})", "{d} = F.relu({d}, True)", "{d} = F.silu({v})", "{d} = F.silu({d}, inplace=True)",
    "{d} = F.hardswish({v})", "{d} = F.leaky_relu({v}, self.slope)", "{d} = F.leaky_relu({d}, 0.2, True)",
    "{d} = F.leaky_relu({v}, negative_slope=0.3)", "{d} = F.elu({v}, alpha=self.slope)", "{d} = F.relu6({v})",
    "{d} = F.hardtanh({v}, 0.0, 6.0)", "{d} = F.hardtanh({v})", "{d} = {v}.sigmoid()", "{d} = torch.sigmoid({v})",
    "{d} = F.sigmoid({v})", "{d} = self.act({v})", "{d} = self.a_fn({v})", "{d} = TABLE[self.a_str]({v})",
    "{d} = F.gelu({v})", "{d} = {v}.clamp(min=0)", "{d} = helper({v})", "{d} = F.leaky_relu_({d})",
    "{d} = F.hardswish({d}, inplace=True)", "{d} = F.elu_({d})", "{d} = F.relu(input={v})", "{d} = self.activate({v})",
]  # fmt: skip
ADDS = [
    "{d} = {d} + {w}", "{d} = {w} + {d}", "{d} += {w}", "{d} = torch.add({d}, {w})", "{d} = {d}.add({w})",
    "{d}.add_({w})", "{w} += {d}\n{d} = {w}", "{d} = torch.add({d}, {w}, alpha=2)", "{d} = {d}.add({w}, alpha=0.5)",
    "{d} = {d} + {w} * {scale}", "{d} = {d} * {scale} + {w}", "{d} = {d} - {w}", "{d} = {d} + {w}.detach()",
    "{d} = {d} + {w}[:1]", "{d} = {d} + {w}.mean((2, 3), keepdim=True)", "{d} = sum([{d}, {w}])",
    "{d} = torch.stack([{d}, {w}]).sum(0)", "{d} = {w}.clone().add_({d})", "{d} = {d} + {w} + x",
    "t = {w}.view_as({w})\nt += {d}\n{d} = t", "t = {w}[:]\nt += {d}\n{d} = F.relu(t)", "{d} = {d} + F.relu({w})",
    "t = {w}.detach()\nt += {d}.detach()\n{d} = {d} + {w}",
]  # fmt: skip
WRITES = [
    "{v}.mul_(0.9)", "{v}[:, :1] += 0.5", "{v}[:, 0] = 0.5", "t = {v}[:, :1]\nt.mul_(1.1)", "{v}.detach().mul_(1.01)",
    "with torch.no_grad():\n    {v}.mul_(0.9)", "{v}.flatten(1)[:, :3].add_(1)", "{v} *= 1.1", "{v}.data.add_(0.1)",
    "torch.mul({v}, 0.9, out={v}.detach())", "{v}.zero_()", "{v}.copy_({w})", "F.dropout({v}, 0.5, False, True)",
    "self.bn{i}.weight.data.mul_(1.1)", "with torch.no_grad():\n    self.conv{i}.weight.mul_(0.9)",
    "self.bn{i}.running_mean.add_(0.1)", "with torch.no_grad():\n    self.bn{i}.bias += 0.1", "F.relu({v}, inplace=True)",
    "{v}.transpose(2, 3).mul_(0.5)", "{v}.unbind(1)[0].mul_(0.5)", "torch._foreach_mul_([{v}, {w}], 0.9)",
    "self.bn{i}.num_batches_tracked.add_(1)", "{v}.add_(self.bn{i}.running_mean.view(1, -1, 1, 1))",
]  # fmt: skip
LAYERS = [
    "{d} = self.bn{i}(self.conv{j}({v}))", "{d} = self.bn{i}({v})", "{d} = self.conv{j}({v})", "{d} = self.seq({v})",
    "for m in self.seq:\n    {d} = m({d})", "{d} = self.parts[self.key]({d})", "{d} = self.items[self.index]({d})",
    "for m in self.items[: self.count]:\n    {d} = m({d})", "for name in self.order:\n    {d} = getattr(self, name)({d})",
    "{d} = self.seq[:2]({v})", "for m in self.parts.values():\n    {d} = m({d})", "{d} = self.seq(input={v})",
    "{d} = self.bn{i}(input={v})", "{d} = F.relu(self.seq[1](self.seq[0]({v})) + {w})",
    "{d} = F.batch_norm({v}, self.bn{i}.running_mean, self.bn{i}.running_var, self.bn{i}.weight, self.bn{i}.bias, "
    "self.bn{i}.training, 0.2, self.bn{i}.eps)",
    "{d} = F.batch_norm(F.conv2d({v}, self.conv2.weight), None, None, training=True)",
    "{d} = F.conv2d({v}, self.conv2.weight, self.conv2.bias)", "{d} = self.se({v}) * {d}", "{d} = self.norms[0]({v})",
    "{d} = self.conv{j}({v}) * {scale}", "{d} = checkpoint(self.seq, {v}, use_reentrant=False)",
    "{d} = self.bn{i}.forward(self.conv{j}.forward({v}))", "{d} = self.affine({v})",
]  # fmt: skip
OTHERS = [
    "s = {d}", "{d} = {v} * {scale}", "{d} = F.dropout({v}, 0.5, self.training)", "{d} = F.dropout({v}, 0.5, False)",
    "{d} = self.drop({v})", "{d} = F.max_pool2d({v}, 3, 1, 1)", "{d} = F.avg_pool2d({v}, 3, 1, 1)", "self.count = 1",
    "{d} = torch.cat([{v}, {w}], 1)[:, ::2]", "{d} = {v}.contiguous()", "{d} = {v}.to(self.a_dtype).to({v}.dtype)",
    "self.seen = {v}.detach().sum()", "{d} = self.down({v})", "self.a_list.append(2)", "{d} = {v}.flip(0)",
    "with torch.no_grad():\n    {d} = self.bn{i}(self.conv{j}({v}))", "kept.append({d})", "{d} = {v}.clone()",
    "with torch.set_grad_enabled(self.a_bool):\n    {d} = self.seq({v})", "{d} = {v}.requires_grad_() * 1",
    "torch._dynamo.graph_break()", "{d} = F.max_pool2d({v}, 3, stride=1, padding=1, dilation=1)",
    "{d} = F.pad({v}[:, :2], (0, 0, 0, 0, 0, 2))", "{d} = {v}.expand(-1, -1, -1, -1)", "{d} = {v}.contiguous(memory_format=torch.channels_last)",
    "{d} = F.max_pool2d(self.bn{i}(self.conv{j}({v})), 3, 1, 1)", "{d}.register_hook(double) if {d}.requires_grad else None",
    "{d} = {v}.detach()", "try:\n    {d} = self.missing({v})\nexcept AttributeError:\n    {d} = {v} * 2",
]  # fmt: skip


def _statement(templates: list[str], d: Any = None, w: Any = None) -> st.SearchStrategy[str]:
    names = st.sampled_from(["h", "s", "x"])

    def fill(t: str, d: str, v: str, w: str, i: int, j: int, scale: str) -> str:
        return t.format(d=d, v=v, w=w, i=i, j=j, scale=scale)

    return st.builds(
        fill, st.sampled_from(templates), names if d is None else d, names if d is None else d,
        names if w is None else w, st.integers(0, 2), st.integers(0, 2),
        st.sampled_from(SCALES),
    )  # fmt: skip


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.split("\n"))


ANY = st.one_of(*map(_statement, (ACTS, ADDS, WRITES, LAYERS, OTHERS)))
BRANCH = st.builds(lambda c, a: f"if {c}:\n{_indented(a)}", st.sampled_from(CONDITIONS), ANY)
EXTRA = st.one_of(ANY, BRANCH, _statement(WRITES))
ACT = _statement(ACTS, st.just("h"))
ADD = _statement(ADDS, st.just("h"), st.just("s"))
USUAL_ACT = st.one_of(st.just("h = F.relu(h)"), ACT)
USUAL_ADD = st.one_of(st.just("h += s"), st.just("h = h + s"), ADD)


def _conv(i: int) -> st.SearchStrategy[str]:
    return st.just(f"h = self.conv{i}(h)")


def _bn(i: int) -> st.SearchStrategy[str]:
    return st.just(f"h = self.bn{i}(h)")


SHORTCUT = st.sampled_from(["s = s", "s = self.down(s)", "s = self.pad(s)", "s = self.down(x)", "s = self.pool(x)"])
SKELETONS = [
    (_conv(0), _bn(0), USUAL_ACT, _conv(1), _bn(1), SHORTCUT, USUAL_ADD, USUAL_ACT),
    (_conv(0), _bn(0), USUAL_ACT, _conv(1), _bn(1), USUAL_ADD, USUAL_ACT, st.just("s = h"), _conv(2), _bn(2), USUAL_ADD),
    (_bn(0), USUAL_ACT, _conv(0), _bn(1), USUAL_ACT, _conv(1), USUAL_ADD),
    (_conv(0), _bn(0), USUAL_ACT, _conv(1), _bn(1), USUAL_ACT, _conv(2), _bn(2), SHORTCUT, USUAL_ADD, USUAL_ACT),
    (_conv(0), _bn(0), ADD, ACT),
    (st.just("h = self.seq(h)"), st.just("h = self.norms[0](self.conv1(h))"), USUAL_ADD, ACT),
]  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, ...]:
    """A forward's statements: one of the usual blocks with others in between."""
    lines = [draw(slot) for slot in draw(st.sampled_from(SKELETONS))]
    for extra in draw(st.lists(EXTRA, max_size=3)):
        lines.insert(draw(st.integers(0, len(lines))), extra)
    return tuple(lines)


@dataclass(frozen=True)
class Program:
    """A network: forwards of its blocks, what they take and return, how they are held, and options of layers."""

    blocks: tuple[tuple[str, ...], ...]
    takes: str
    returns: str
    held: str
    entry: str
    option: int
    seed: int

    @property
    def source(self) -> str:
        """The blocks' classes."""
        return "\n".join(_source(f"Block{i}", body, self) for i, body in enumerate(self.blocks))


PROGRAMS = st.builds(
    Program,
    st.one_of(st.tuples(bodies()), st.tuples(bodies(), bodies())),
    st.sampled_from(["x", "x", "skip", "dict", "list"]),
    st.sampled_from(["tensor", "tensor", "tuple", "dict"]),
    st.sampled_from(["list", "sequential", "iterated", "dict", "attributes"]),
    st.sampled_from(["plain", "stem", "projection", "pad", "average"]),
    st.integers(0, 7),
    st.integers(0, 3),
)
_TAKES = {"x": "x", "skip": "x, skip=None", "dict": "inputs", "list": "inputs"}
_OPENING = {
    "x": "s = h = x",
    "skip": "h = x\ns = x if skip is None else skip",
    "dict": "h = x = inputs['x']\ns = inputs.get('s', x)",
    "list": "x, *more = inputs\nh = x\ns = more[0] if more else x",
}
_RETURN = {"tensor": "h", "tuple": "h, s", "dict": "{'out': h, 's': s}"}


def _source(name: str, body: tuple[str, ...], program: Program) -> str:
    lines = "\n".join([_OPENING[program.takes], "kept = []", *body, f"return {_RETURN[program.returns]}"])
    return f"""
def make_{name}():
    cell = 1.5
    def change(value):
        nonlocal cell
        cell = value
    class {name}(Base):
        def forward(self, {_TAKES[program.takes]}):
{_indented(_indented(_indented(lines)))}
    return {name}, change
"""


class Base(nn.Module):
    """What the generated blocks have: attributes of every type, and layers that keep the shape."""

    CLS = 1.25

    def __init__(self, option: int) -> None:
        super().__init__()
        c = CHANNELS
        for name, (value, _) in VALUES.items():
            setattr(self, name, value)
        self.a_list, self.a_dict, self.a_set = [0.5, 2], {"k": 1.5, "on": True}, {"relu", "b"}
        self.a_ns, self.a_tensor = types.SimpleNamespace(scale=0.75), torch.tensor(1.25, dtype=torch.float64)
        self.register_buffer("a_buffer", torch.tensor(0.75))
        self.a_parameter = nn.Parameter(torch.tensor(1.25))
        self.conv0 = nn.Conv2d(c, c, 3, padding=1, bias=bool(option & 1), groups=2 if option & 2 else 1)
        self.conv1 = nn.Conv2d(c, c, 3, padding="same", dilation=2 if option & 2 else 1)
        if option == 3:
            self.conv1 = nn.Conv2d(c, c, 3, padding=1, padding_mode="circular")
        self.conv2 = nn.Conv2d(c, c, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(c)
        self.bn1 = nn.BatchNorm2d(c, momentum=None if option == 4 else 0.3)
        self.bn2 = nn.BatchNorm2d(c, eps=1e-2, affine=option != 5, track_running_stats=option != 6)
        self.act = nn.ReLU(inplace=bool(option & 4))
        self.drop = nn.Dropout(0.3, inplace=bool(option & 1))
        self.seq = nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.SiLU(inplace=bool(option & 2)))
        self.parts = nn.ModuleDict({"one": nn.BatchNorm2d(c), "two": nn.LeakyReLU(0.2)})
        self.items = nn.ModuleList([nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(c)])
        self.down = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(c, c, 1), nn.BatchNorm2d(c))
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1), nn.Sigmoid())

    @property
    def a_property(self) -> float:
        return self.a_float + 1

    def scaled(self) -> float:
        return self.a_int * 0.5

    def activate(self, h: Tensor) -> Tensor:
        return F.relu(h) if self.a_bool else F.silu(h)

    def affine(self, h: Tensor) -> Tensor:
        scale = (self.bn0.running_var + self.bn0.eps).rsqrt().view(1, -1, 1, 1)
        return h * scale + self.bn0.running_mean.view(1, -1, 1, 1)

    def pad(self, h: Tensor) -> Tensor:
        return F.pad(h[:, :2, ::1, ::1], (0, 0, 0, 0, 0, 2))


class Entry(nn.Module):
    """Before the blocks: a stem, or a block that makes the image smaller."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, c = kind, CHANNELS
        self.conv1, self.bn1 = nn.Conv2d(3, c, 3, 1 if kind == "plain" else 2, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)
        pool = [nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)] if kind == "average" else []
        self.down = nn.Sequential(*pool, nn.Conv2d(3, c, 1, 1 if pool else 2, bias=False), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "plain":
            return self.conv1(x)
        h = F.relu(self.bn1(self.conv1(x)))
        if self.kind == "stem":
            return F.max_pool2d(h, 3, 1, 1)
        h = self.bn2(self.conv2(h))
        pad = self.kind == "pad"
        return F.relu(h + (F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, CHANNELS - 3)) if pad else self.down(x)))


class Net(nn.Module):
    """The network of a program."""

    def __init__(self, program: Program, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.program = program
        self.entry = Entry(program.entry)
        if program.held in ("sequential", "iterated"):
            self.blocks: Any = nn.Sequential(*blocks)
        elif program.held == "dict":
            self.blocks = nn.ModuleDict({f"b{i}": b for i, b in enumerate(blocks)})
        elif program.held == "list":
            self.blocks = nn.ModuleList(blocks)
        else:
            self.blocks = None
            for i, b in enumerate(blocks):
                self.add_module(f"block{i}", b)
        self.bn = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        program = self.program
        h, out = self.entry(x), None
        if program.held == "sequential" and (program.takes, program.returns) in (("x", "tensor"), ("skip", "tensor")):
            out = h = self.blocks(h)
        else:
            for block in self._blocks():
                if program.takes == "dict":
                    out = block({"x": h})
                elif program.takes == "list":
                    out = block([h, h])
                elif program.takes == "skip":
                    out = block(h, skip=F.relu(h))
                else:
                    out = block(x=h)
                h = out[0] if isinstance(out, tuple) else out["out"] if isinstance(out, dict) else out
        return out, self.bn(h)

    def _blocks(self) -> Any:
        held = self.program.held
        if held == "attributes":
            return [self.block0, self.block1] if hasattr(self, "block1") else [self.block0]
        return self.blocks.values() if held == "dict" else self.blocks


def helper(h: Tensor) -> Tensor:
    return F.relu(h)


def double(value: Tensor) -> Tensor:
    return value * 2


def namespace() -> dict[str, Any]:
    """The globals of generated code."""
    from torch.utils.checkpoint import checkpoint

    return {
        "torch": torch, "F": F, "nn": nn, "Base": Base, "Mode": Mode, "SETTINGS": {"scale": 1.25}, "SCALE": 0.75,
        "TABLE": {"relu": F.relu, "silu": F.silu}, "helper": helper, "double": double, "checkpoint": checkpoint,
    }  # fmt: skip


_numbers = itertools.count()


@dataclass
class World:
    """What a network and its twin share: classes, globals, closures; and what is to be undone in the end."""

    program: Program
    names: dict[str, Any] = field(init=False)
    classes: list[Any] = field(default_factory=list)
    changes: list[Callable[[float], None]] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        module = sys.modules[GENERATED] = types.ModuleType(GENERATED)  # pickle and dynamo look there
        self.names = vars(module)
        self.names.update(namespace())
        exec(compile(self.program.source, f"<living {next(_numbers)}>", "exec"), self.names)
        for i in range(len(self.program.blocks)):
            cls, change = self.names[f"make_Block{i}"]()
            cls.__qualname__ = cls.__name__
            self.names[cls.__name__] = cls
            self.classes.append(cls)
            self.changes.append(change)

    def network(self) -> Net:
        """In float64; means, variances and gammas that hide nothing."""
        torch.manual_seed(self.program.seed)
        net = Net(self.program, [cls(self.program.option) for cls in self.classes])
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                if m.affine:
                    nn.init.uniform_(m.weight, -1.5, 1.5)
                    nn.init.normal_(m.bias, 0.2, 0.5)
                if m.track_running_stats:
                    nn.init.normal_(m.running_mean, 0.3, 0.5)
                    nn.init.uniform_(m.running_var, 0.5, 2)
        return net.double()

    def restore(self) -> None:
        while self.undo:
            self.undo.pop()()


# ------------------------------------------------------------------------------------------------ edits
@dataclass(frozen=True)
class Edit:
    """One thing that happens to a network: which, and numbers that choose where and how."""

    kind: str
    where: int = 0
    how: int = 0


@dataclass(frozen=True)
class Call:
    """How the network is called."""

    batch: int = 2
    size: tuple[int, int] = (9, 8)
    layout: str = "contiguous"
    grad: str = "grad"
    wants: bool = True
    dtype: torch.dtype = torch.float64


CALLS = st.builds(
    Call,
    st.sampled_from([2, 2, 2, 3, 1]),
    st.sampled_from([(9, 8), (9, 8), (9, 8), (6, 5), (3, 3), (1, 1)]),
    st.sampled_from(["contiguous", "contiguous", "channels_last", "strided"]),
    st.sampled_from(["grad", "grad", "grad", "no_grad", "inference"]),
    st.sampled_from([True, True, False]),
    st.sampled_from([torch.float64] * 8 + [torch.float32]),
)


def _hooked(module: nn.Module, args: Any, out: Any) -> Any:
    return out * 1.5 if isinstance(out, Tensor) else None


def _watched(module: nn.Module, args: Any, out: Any) -> None:
    module.watched = getattr(module, "watched", 0) + 1


def _pre_hooked(module: nn.Module, args: Any) -> Any:
    return tuple(a * 1.5 if isinstance(a, Tensor) else a for a in args)


def _backward_hooked(module: nn.Module, grads: Any, outs: Any) -> Any:
    return tuple(g * 0.5 if g is not None else None for g in grads)


def _pre_backward_hooked(module: nn.Module, outs: Any) -> Any:
    return tuple(g * 0.5 if g is not None else None for g in outs)


def _on_all(function: Callable[[Any, World, Edit], Any]) -> Callable[..., Any]:
    return function


class Edits:
    """kind -> what is done to a network; returns the network that lives on, or None: the same."""

    @staticmethod
    def _of(net: nn.Module, kind: Any, where: int) -> Any:
        found = [m for m in net.modules() if isinstance(m, kind)]
        return found[where % len(found)] if found else None

    @staticmethod
    def _name(net: nn.Module, kind: Any, where: int) -> str:
        found = [n for n, m in net.named_modules() if n and isinstance(m, kind)]
        return found[where % len(found)] if found else ""

    @classmethod
    def attribute(cls, net: Any, e: Edit) -> None:
        name = list(VALUES)[e.how % len(VALUES)]
        block = cls._of(net, Base, e.where)
        value = VALUES[name][getattr(block, name) == VALUES[name][0]]
        setattr(block, name, value)

    @classmethod
    def in_place(cls, net: Any, e: Edit) -> None:
        block = cls._of(net, Base, e.where)
        [
            lambda: block.a_list.__setitem__(0, block.a_list[0] + 1), lambda: block.a_list.append(3),
            lambda: block.a_dict.update(k=block.a_dict["k"] + 1), lambda: block.a_dict.pop("on", None),
            lambda: block.a_set.discard("relu"), lambda: block.a_set.add("relu"),
            lambda: setattr(block.a_ns, "scale", block.a_ns.scale + 1), lambda: block.a_tensor.add_(1),
            lambda: setattr(block, "a_tensor", block.a_tensor + 1), lambda: setattr(block, "extra", 1),
            lambda: block.a_buffer.add_(1), lambda: block.a_parameter.data.mul_(2),
            lambda: setattr(block, "a_np", block.a_np + 1),
        ][e.how % 13]()  # fmt: skip

    @classmethod
    def replace(cls, net: Any, e: Edit) -> None:
        kind = [nn.BatchNorm2d, nn.Conv2d, nn.ReLU][e.how % 3]
        name = cls._name(net, kind, e.where)
        if not name:
            return
        old = net.get_submodule(name)
        torch.manual_seed(e.where)
        new: nn.Module
        if isinstance(old, nn.BatchNorm2d):
            c = old.num_features
            news: list[Callable[[], nn.Module]] = [
                lambda: nn.BatchNorm2d(c, eps=0.1), nn.Identity, lambda: nn.BatchNorm2d(c, affine=False),
                lambda: nn.GroupNorm(2, c), lambda: nn.BatchNorm2d(c, track_running_stats=False),
                lambda: nn.InstanceNorm2d(c, affine=True),
            ]  # fmt: skip
            new = news[e.how // 3 % 6]()
        elif isinstance(old, nn.Conv2d):
            new = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=True)
        else:
            new = [nn.SiLU(), nn.ReLU(True), nn.GELU(), nn.Identity()][e.how // 3 % 4]
        net.set_submodule(name, new.double().train(old.training))

    @classmethod
    def hook(cls, net: Any, e: Edit) -> None:
        m = cls._of(net, (nn.BatchNorm2d, nn.Conv2d, nn.ReLU, nn.Sequential, Base, Entry), e.where)
        handle = [
            lambda: m.register_forward_hook(_hooked), lambda: m.register_forward_pre_hook(_pre_hooked),
            lambda: m.register_full_backward_hook(_backward_hooked), lambda: m.register_forward_hook(_watched),
            lambda: m.register_full_backward_pre_hook(_pre_backward_hooked),
        ][e.how % 5]()  # fmt: skip
        net.__dict__.setdefault("handles", []).append(handle)

    @classmethod
    def unhook(cls, net: Any, e: Edit) -> None:
        handles = net.__dict__.get("handles", [])
        if handles:
            handles.pop().remove()

    @classmethod
    def patch(cls, net: Any, e: Edit) -> None:
        m = cls._of(net, (nn.BatchNorm2d, nn.Conv2d, nn.ReLU, Base, Entry), e.where)
        if "forward" in m.__dict__:
            del m.forward
            return
        before = m.forward

        def patched(*args: Any, **kwargs: Any) -> Any:
            out = before(*args, **kwargs)
            return out * 2 if isinstance(out, Tensor) else out

        m.forward = patched

    @classmethod
    def mode(cls, net: Any, e: Edit) -> None:
        m = cls._of(net, nn.Module, e.where) if e.how % 2 else net
        m.train(not m.training)

    @classmethod
    def requires_grad(cls, net: Any, e: Edit) -> None:
        parameters = list(net.parameters())
        for p in parameters if e.how % 4 == 0 else parameters[e.where % len(parameters) :][:1]:
            p.requires_grad_(not p.requires_grad)

    @classmethod
    def norm(cls, net: Any, e: Edit) -> None:
        m = cls._of(net, nn.BatchNorm2d, e.where)
        if m is None:
            return
        name, value = [
            ("momentum", None), ("momentum", 0.7), ("eps", 0.05), ("eps", np.float64(1e-3)), ("momentum", 1),
            ("track_running_stats", False), ("momentum", 0.0), ("eps", 0), ("momentum", torch.tensor(0.2)),
        ][e.how % 9]  # fmt: skip
        setattr(m, name, value)

    @classmethod
    def tensors(cls, net: Any, e: Edit) -> None:
        m = cls._of(net, nn.BatchNorm2d, e.where)
        conv = cls._of(net, nn.Conv2d, e.where)
        if m is None or m.weight is None or m.running_mean is None or conv is None:
            return
        [
            lambda: m.reset_running_stats(), lambda: m.running_mean.add_(1), lambda: setattr(m, "weight", None),
            lambda: setattr(m, "weight", nn.Parameter(m.weight.detach() * 2)), lambda: m.weight.data.neg_(),
            lambda: setattr(conv, "weight", nn.Parameter(conv.weight.detach().flip(0))), lambda: setattr(m, "bias", None),
            lambda: setattr(m.weight, "data", m.weight.data + 1), lambda: setattr(m, "running_mean", None),
            lambda: setattr(m, "running_var", m.running_var * 2), lambda: m.num_batches_tracked.add_(3),
            lambda: setattr(m, "num_batches_tracked", None), lambda: setattr(conv, "stride", (1, 1)),
            lambda: setattr(conv, "bias", None), lambda: setattr(conv, "dilation", (1, 1)),
            lambda: setattr(m, "num_features", 5), lambda: setattr(m, "weight", nn.Parameter(m.weight[:2].detach())),
        ][e.how % 17]()  # fmt: skip

    @classmethod
    def layers(cls, net: Any, e: Edit) -> None:
        """Changes that reach layers by PyTorch's own means."""
        conv = cls._of(net, nn.Conv2d, e.where)
        if e.how % 5 == 0:
            if parametrize.is_parametrized(conv):
                parametrize.remove_parametrizations(conv, "weight")
            else:
                parametrize.register_parametrization(conv, "weight", Halved())
        elif e.how % 5 == 1:
            net.to(memory_format=torch.channels_last)
        elif e.how % 5 == 2:
            nn.utils.prune.random_unstructured(conv, "weight", 0.3) if False else conv.weight.data.clamp_(min=0)
        elif e.how % 5 == 3:
            seq = cls._of(net, nn.Sequential, e.where)
            seq.append(nn.BatchNorm2d(CHANNELS).double().train(net.training))
        else:
            items = [m for m in net.modules() if isinstance(m, nn.ModuleList)]
            items[e.where % len(items)].insert(0, nn.BatchNorm2d(CHANNELS).double().train(net.training))

    @classmethod
    def share(cls, net: Any, e: Edit) -> None:
        """One layer in two places."""
        kind = [nn.BatchNorm2d, nn.Conv2d][e.how % 2]
        block = cls._of(net, Base, e.where)
        names = ["bn0", "bn1", "bn2"] if kind is nn.BatchNorm2d else ["conv0", "conv1"]
        setattr(block, names[e.where % len(names)], getattr(block, names[(e.where + 1) % len(names)]))

    @classmethod
    def step(cls, net: Any, e: Edit) -> None:
        with torch.no_grad():
            for p in net.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=1e-3)

    @classmethod
    def copied(cls, net: Any, e: Edit) -> Any:
        return copy.deepcopy(net)

    @classmethod
    def pickled(cls, net: Any, e: Edit) -> Any:
        return pickle.loads(pickle.dumps(net))

    @classmethod
    def loaded(cls, net: Any, e: Edit) -> None:
        state = {k: v * 0.5 + 0.25 if v.is_floating_point() else v + 2 for k, v in net.state_dict().items()}
        net.load_state_dict(state, assign=e.how % 2 == 1)


KINDS = [name for name in vars(Edits) if not name.startswith("_")]


def _shared(world: World, e: Edit) -> None:
    """Edits of what the network and its twin share."""
    number = e.where % len(world.classes)
    cls = world.classes[number]
    how = e.how % 8

    def patched(owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        world.undo.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)

    if how == 0:
        world.names["SCALE"] += 1
    elif how == 1:
        world.names["SETTINGS"]["scale"] += 1
    elif how == 2:
        world.changes[number](2.5 + e.where)
    elif how == 3:
        cls.CLS += 1
    elif how == 4:
        world.names["helper"] = F.silu if world.names["helper"] is helper else helper
    elif how == 5:
        before = cls.forward
        patched(cls, "forward", lambda self, *a, **k: double(before(self, *a, **k)) if e.where % 2 else before(self, *a, **k))
    elif how == 6:
        patched(*[(cls, "scaled", lambda self: 3.0), (cls, "activate", lambda self, h: h * 0.5)][e.where % 2])
    else:
        owner, name, value = [
            (nn.ReLU, "forward", lambda self, x: x * 0.5), (F, "relu", F.silu), (F, "silu", F.relu),
            (nn.BatchNorm2d, "forward", lambda self, x: x * 2), (F, "leaky_relu", lambda x, *a: x),
            (nn.Conv2d, "forward", lambda self, x: x * 2), (F, "batch_norm", lambda x, *a, **k: x + 1),
            (F, "gelu", F.relu), (F, "elu_", F.relu),
        ][e.where % 9]  # fmt: skip
        patched(owner, name, value)


def apply(world: World, nets: list[Any], e: Edit) -> list[Any]:
    """The networks after an edit; the same exception is raised by all of them, or none."""
    if e.kind == "shared":
        _shared(world, e)
        return nets
    results: list[Any] = []
    for net in nets:
        try:
            results.append(getattr(Edits, e.kind)(net, e) or net)
        except Exception as error:
            results.append(error)
    raised = {type(r) for r in results if isinstance(r, Exception)}
    assert not raised or all(type(r) in raised for r in results) and len(raised) == 1, (e, results)
    return nets if raised else results


EDITS = st.builds(
    Edit, st.sampled_from([*KINDS, "shared", "shared", "attribute", "in_place"]), st.integers(0, 11), st.integers(0, 20)
)
__all__ = ["CALLS", "EDITS", "PROGRAMS", "Call", "Edit", "Program", "World", "apply", "original"]
