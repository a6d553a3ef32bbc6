"""Generated networks: which statements the blocks' forwards run, how the blocks are held and called.

A ``Program`` comes from hypothesis and prints as code; a ``World`` makes a network of it.
"""

from __future__ import annotations

import enum
import itertools
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

CHANNELS = 4
GENERATED = "living_generated"  # the module that the blocks are in


class Mode(enum.Enum):
    """An attribute that a forward branches on."""

    A = 1
    B = 2


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
    "h.is_contiguous()", "self.a_dict.get('on')", "self.conv0.weight.requires_grad",
    "torch.is_inference_mode_enabled()",
    "self.a_dtype == torch.float64", "self.CLS > 1", "h.dtype == torch.float64", "self.bn1.affine",
]  # fmt: skip
ACTS = [  # {d} may be written, {v} not
    "{d} = F.relu({v})", "{d} = {v}.relu()", "{d} = torch.relu({v})", "F.relu({d}, inplace=True)", "{d}.relu_()",
    "F.relu_({d})", "{d} = F.relu({d}, True)", "{d} = F.silu({v})", "{d} = F.silu({d}, inplace=True)",
    "{d} = F.hardswish({v})", "{d} = F.leaky_relu({v}, self.slope)", "{d} = F.leaky_relu({d}, 0.2, True)",
    "{d} = F.leaky_relu({v}, negative_slope=0.3)", "{d} = F.elu({v}, alpha=self.slope)", "{d} = F.relu6({v})",
    "{d} = F.hardtanh({v}, 0.0, 6.0)", "{d} = F.hardtanh({v})", "{d} = {v}.sigmoid()", "{d} = torch.sigmoid({v})",
    "{d} = F.sigmoid({v})", "{d} = self.act({v})", "{d} = self.a_fn({v})", "{d} = TABLE[self.a_str]({v})",
    "{d} = F.gelu({v})", "{d} = F.softsign({v})", "{d} = F.mish({v})", "{d} = F.celu({v}, 0.5)",
    "{d} = F.softplus({v}, threshold=10)", "{d}.tanh_()", "{d} = F.hardsigmoid({v})", "{d} = {v}.clamp(min=0)",
    "{d} = helper({v})", "{d} = F.leaky_relu_({d})",
    "{d} = F.hardswish({d}, inplace=True)", "{d} = F.elu_({d})", "{d} = F.relu(input={v})", "{d} = self.activate({v})",
]  # fmt: skip
# No statement makes all values of an image equal: two norms behind it multiply rounding by 1e5, in plain PyTorch too.
ADDS = [
    "{d} = {d} + {w}", "{d} = {w} + {d}", "{d} += {w}", "{d} = torch.add({d}, {w})", "{d} = {d}.add({w})",
    "{d}.add_({w})", "{w} += {d}\n{d} = {w}", "{d} = torch.add({d}, {w}, alpha=2)", "{d} = {d}.add({w}, alpha=0.5)",
    "{d} = {d} + {w} * {scale}", "{d} = {d} * {scale} + {w}", "{d} = {d} - {w} * 0.5", "{d} = {d} + {w}.detach()",
    "{d} = {d} + {w}[:1]", "{d} = {d} + {w}.mean((2, 3), keepdim=True)", "{d} = sum([{d}, {w}])",
    "{d} = torch.stack([{d}, {w}]).sum(0)", "{d} = {w}.clone().add_({d})", "{d} = {d} + {w} + x",
    "t = {w}.view_as({w})\nt += {d}\n{d} = t", "t = {w}[:]\nt += {d}\n{d} = F.relu(t)", "{d} = {d} + F.relu({w})",
    "t = {w}.detach()\nt += {d}.detach()\n{d} = {d} + {w}",
]  # fmt: skip
# Not through .data: autograd doesn't see it, and gradients depend on what is kept for them.
WRITES = [
    "{v}.mul_(0.9)", "{v}[:, :1] += 0.5", "{v}[:, 0] = 0.5", "t = {v}[:, :1]\nt.mul_(1.1)", "{v}.detach().mul_(1.01)",
    "with torch.no_grad():\n    {v}.mul_(0.9)", "{v}.flatten(1)[:, :3].add_(1)", "{v} *= 1.1",
    "torch.mul({v}, 0.9, out={v}.detach())", "{v}[:, :2].zero_()", "{v}.copy_({w})", "F.dropout({v}, 0.5, False, True)",
    "with torch.no_grad():\n    self.conv{i}.weight.mul_(0.9)",
    "self.bn{i}.running_mean.add_(0.1)", "with torch.no_grad():\n    self.bn{i}.bias += 0.1",
    "F.relu({v}, inplace=True)",
    "{v}.transpose(2, 3).mul_(0.5)", "{v}.unbind(1)[0].mul_(0.5)", "torch._foreach_mul_([{v}, {w}], 0.9)",
    "self.bn{i}.num_batches_tracked.add_(1)", "{v}.add_(self.bn{i}.running_mean.view(1, -1, 1, 1))",
]  # fmt: skip
LAYERS = [
    "{d} = self.bn{i}(self.conv{j}({v}))", "{d} = self.bn{i}({v})", "{d} = self.conv{j}({v})", "{d} = self.seq({v})",
    "for m in self.seq:\n    {d} = m({d})", "{d} = self.parts[self.key]({d})", "{d} = self.items[self.index]({d})",
    "for m in self.items[: self.count]:\n    {d} = m({d})",
    "for name in self.order:\n    {d} = getattr(self, name)({d})",
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
    "{d} = F.pad({v}[:, :2], (0, 0, 0, 0, 0, 2))", "{d} = {v}.expand(-1, -1, -1, -1)",
    "{d} = {v}.contiguous(memory_format=torch.channels_last)",
    "{d} = F.max_pool2d(self.bn{i}(self.conv{j}({v})), 3, 1, 1)",
    "{d}.register_hook(double) if {d}.requires_grad else None",
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
    (_conv(0), _bn(0), USUAL_ACT, _conv(1), _bn(1), USUAL_ADD, USUAL_ACT, st.just("s = h"), _conv(2), _bn(2),
     USUAL_ADD),
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
    st.sampled_from(["plain"] * 12 + ["stem", "projection", "pad", "average"]),
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
        # pickle and dynamo look for a module of that name, and dynamo remembers the one that it found
        self.names = vars(sys.modules.setdefault(GENERATED, types.ModuleType(GENERATED)))
        self.names.clear()
        self.names.update(namespace(), __name__=GENERATED)
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
