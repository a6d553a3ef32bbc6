"""What happens to a network between two calls: its attributes, layers, hooks, modes, and how it is called.

An ``Edit`` is one such thing, as data; ``apply`` does it to a network and to its twin.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from living import CHANNELS, VALUES, Base, Entry, World, double, helper
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


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
            lambda: setattr(conv, "weight", nn.Parameter(conv.weight.detach().flip(0))),
            lambda: setattr(m, "bias", None),
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
            conv.weight.data.clamp_(min=0)
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
        patched(
            cls,
            "forward",
            lambda self, *a, **k: double(before(self, *a, **k)) if e.where % 2 else before(self, *a, **k),
        )
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
