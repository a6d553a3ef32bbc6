"""Modules of any class: what of their forward becomes chains, what is refused, and that nobody can tell."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import prepared
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from fused_resnet.convert import FusedModule, FusedSequential, plan_of

pytestmark = pytest.mark.usefixtures("every_warning")


def images(channels: int = 4) -> Tensor:
    return torch.randn(3, channels, 7, 6, dtype=torch.float64) * 1.3 + 0.4


def step(model: nn.Module, x: Any, train: bool = True) -> dict[str, Tensor]:
    """Output, every gradient (x's too) and every buffer of one step."""
    model.train(train).zero_grad()
    leaves = [t.detach().requires_grad_() for t in (x if isinstance(x, list) else [x])]
    # a copy each: some forwards change their input in place
    given = [t.clone() for t in leaves]
    out = model(given if isinstance(x, list) else given[0])
    (out.square().mean() + out.sin().mean()).backward()
    found = {"out": out.detach(), **{f"dx{i}": t.grad for i, t in enumerate(leaves)}}
    found |= {f"given{i}": t.detach() for i, t in enumerate(given)}
    found |= {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in model.named_buffers()}  # type: ignore[return-value]


def assert_same(fused: nn.Module, plain: nn.Module, x: Any) -> None:
    for train in (True, False):
        got, want = step(fused, x, train), step(plain, x, train)
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-7, atol=1e-9, msg=f"{key}, train={train}")


class Layers(nn.Module):
    """Two convolutions with their norms, for the forwards below."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.scale = 1.0


class Functions(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = self.bn2(self.conv2(h))
        h += x
        return F.leaky_relu(h, 0.2)


class Methods(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu_()
        return torch.add(x, self.bn2(self.conv2(h))).sigmoid()


class PreActivation(Layers):
    """He et al., arXiv 1603.05027: norm and activation before the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.relu(self.bn1(x)))
        return self.conv2(self.relu(self.bn2(h))) + x


class LinearMiddle(Layers):
    """A unit without activation before another, on a slice, as in ShuffleNet."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.bn1(self.conv1(x[..., 1:])))))


class NormAddAct(Layers):
    """Somebody else's convolution (the weights are a product) before the norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv1.weight * self.scale, padding=1)
        return F.relu(self.bn1(y) + x)


class Broadcast(Layers):
    """A summand that the add widens, and one that widens the sum."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return self.relu(self.bn1(self.conv1(x)) + pooled) + self.relu(self.bn2(x[:1]) + x)


class UsedTwice(Layers):
    """The first convolution's output has another user: only the rest is a unit."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.relu(self.bn1(y)) + y


class ChangesItsInput(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x += self.bn1(self.conv1(x * 1.0))
        return F.relu(x)


class ChangesTheShortcut(Layers):
    """Between the first convolution and the add the shortcut is clipped in place (which autograd wouldn't allow)."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x))
        x.clamp_(min=-0.5)
        return F.relu(h + x)


class ChangesTheInput(Layers):
    """Between a convolution and its norm the convolution's input is changed, by a layer, through a view, ..."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.drop = how, nn.Dropout(0.5)
        self.other = nn.Sequential(nn.ReLU(inplace=True), self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        if self.how == "layer":
            self.other(x)
        elif self.how == "view":
            x.flatten(2).add_(1.0)
        elif self.how == "module's view":
            torch.relu_(self.drop(x))
        elif self.how == "out":
            torch.neg(x * 2, out=x)
        else:
            torch.relu_(self.conv2(x))  # somebody else's
        return self.bn1(y)


class Mode(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x))
        return self.relu(h) if self.training else self.bn2(self.conv2(h))


class Default(Layers):
    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return self.relu(self.bn1(self.conv1(x))) * factor


class Counts(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.relu(self.bn1(self.conv1(x)))


class Sizes(Layers):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError("four channels, please")
        return self.relu(self.bn1(self.conv1(x))).flatten(1)


class Lists(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.more:
            x = layer(x)
        return self.bn1(x)


class Tower(Layers):
    """The same layers on two inputs, as detection heads run them: two updates of the statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x) + self.tower(x * 2)


class Gated(nn.Module):
    """As in RegNet: layers that are no unit between the units of a branch, which is a module of modules."""

    def __init__(self, projected: bool) -> None:
        super().__init__()
        unit = lambda *act: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), *act)  # noqa: E731
        gate = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU())
        self.branch = nn.Sequential(unit(nn.ReLU(inplace=True)), unit(nn.ReLU(inplace=True)), gate, unit())
        self.projection = unit() if projected else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.projection(x) + self.branch(x))


class CallsTwice(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv1(self.relu(self.bn1(h))))


class Concatenates(Layers):
    """A list of tensors, as DenseNet's layers take it."""

    def forward(self, x: Any) -> Tensor:
        x = [x] if isinstance(x, Tensor) else x
        return self.conv1(self.relu(self.bn1(torch.cat(x, 1))))


# class -> (chains, units)
FUSED = {
    Functions: (1, 2), LinearMiddle: (1, 2), Methods: (1, 2), PreActivation: (1, 2), NormAddAct: (1, 1),
    Broadcast: (2, 2), UsedTwice: (1, 1), ChangesItsInput: (1, 1), Mode: (1, 1), Default: (1, 1), Counts: (1, 1),
    Sizes: (1, 1),
}  # fmt: skip


def made(cls: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    plain = prepared(cls()).double()
    return plain, fr.fuse(copy.deepcopy(plain))


@pytest.mark.parametrize("cls", FUSED, ids=lambda cls: cls.__name__)
def test_forward_backward_statistics(cls):
    plain, fused = made(cls)
    plan = plan_of(fused.train())
    assert (len(plan.chains), sum(len(chain.units) for chain in plan.chains)) == FUSED[cls]
    assert isinstance(fused, cls) and list(fused.state_dict()) == list(plain.state_dict())
    for other in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(other) is type(fused)
        assert_same(other, copy.deepcopy(plain), images())
    assert type(fr.unfuse(fused)) is cls and "_fr_plans" not in fused.__dict__


def test_a_shortcut_that_is_changed_on_the_way():
    plain, fused = made(ChangesTheShortcut)
    assert len(plan_of(fused).chains) == 1 and plan_of(fused).chains[0].shortcut is None
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), plain(x.clone()))


@pytest.mark.parametrize("how", ["layer", "view", "module's view", "out", "not at all"])
def test_an_input_that_is_changed_on_the_way(how):
    plain = prepared(ChangesTheInput(how)).double().eval()
    fused = fr.fuse(copy.deepcopy(plain))
    (row,) = fr.explain(fused).rows
    assert row.fused == (how == "not at all")
    assert row.fused or row.reason == "what the chain of bn1 reads is changed in place before its end"
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), plain(x.clone()))


@pytest.mark.parametrize("projected", [False, True])
def test_a_residual_whose_last_unit_is_two_modules_down(projected):
    """RegNet's block: the add and its activation join the last convolution, which the gate before it leaves alone; not
    the shortcut's, whose input the branch's own in-place activation might have changed by the end."""
    plain = prepared(Gated(projected)).double()
    fused = fr.fuse(copy.deepcopy(plain))
    first, last = plan_of(fused).chains
    assert (len(first.units), len(last.units), last.shortcut) == (2, 1, "tensor")
    assert last.units[0].bn == ("branch", "3", "1") and last.units[0].act == ("relu",)
    assert [row.reason for row in fr.explain(fused).rows] == [""] * (2 if projected else 1)
    assert_same(fused, plain, images())


def test_a_fused_model_is_read_as_the_plain_one():
    """A chain through two nn.Sequentials, the inner of which runs its blocks as a row."""
    block, unit = lambda: prepared(Methods()), lambda: [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]  # noqa: E731
    plain = nn.Sequential(*unit(), nn.Sequential(nn.Sequential(*unit()), block(), block())).double()
    fused = fr.fuse(copy.deepcopy(plain))
    assert type(fused[2]) is FusedSequential and len(plan_of(fused).chains[0].units) == 2
    explained, classes = str(fr.explain(fused)), [type(m) for m in fused.modules()]
    assert "plain" not in explained
    assert [type(m) for m in fr.fuse(fused).modules()] == classes and str(fr.explain(fused)) == explained
    assert_same(fused, plain, images())


@pytest.mark.parametrize("cls", [Lists, Tower])
def test_children_with_forwards_of_their_own(cls):
    """Lists are looked through; what a forward calls twice stays a module of its own."""
    plain, fused = made(cls)
    assert all(row.fused for row in fr.explain(fused).rows)
    assert isinstance(fused, FusedModule) == (cls is Lists)
    assert_same(fused, plain, images())


def test_norms_and_convolutions_that_are_called_twice():
    plain, fused = made(CallsTwice)
    (row,) = fr.explain(fused).rows
    assert row.chains == 1 and "bn1 (BatchNorm2d) is called 2 times" in row.reason
    assert plan_of(fused).chains[0].units[0].conv is None
    assert_same(fused, plain, images())


def test_a_list_of_tensors():
    plain, fused = made(Concatenates)
    halves = [images(2), images(2)]
    assert plan_of(fused).takes is list
    assert_same(fused, plain, halves)
    assert_same(fused, plain, images(4))  # a tensor: as it was


# ------------------------------------------------------------------------------------------------ what is refused
class DrawsTorch(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)) if torch.rand(()) < 0.5 else x


class DrawsPython(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)) if random.random() < 0.5 else x


class Remembers(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.bn1(self.conv1(x))
        return self.last


class Collects(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.bn1(self.conv1(x))


class Branches(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)) if x.mean() > 0 else x


class AsksForGradients(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x))
        return h if torch.is_grad_enabled() else h * 2


class NoGrad(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(h))


class Autocast(Layers):
    """For a device that this machine may not have."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return self.bn1(self.conv1(x))


class Checkpoints(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda t: self.bn1(self.conv1(t)), x, use_reentrant=False)


class Offloads(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return self.bn1(self.conv1(x))


class Freezes(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.bn2.eval()
        return self.bn2(self.conv2(x))


KEPT: list[Any] = []


class Keeps(Layers):
    """Where nobody looks for it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x))
        KEPT.append(h)
        return self.relu(h)


class Doubling(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class CallsOtherwise(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Doubling(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))


class IsCalledOtherwise(Functions):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Several(Layers):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)) + y


REFUSED = {
    DrawsTorch: "draws random numbers", DrawsPython: "draws random numbers", Remembers: "sets 'last'",
    Collects: "sets 'seen'", Branches: "can't be traced", AsksForGradients: "gradients are wanted",
    Several: "several inputs", NoGrad: "switches gradients", Autocast: "enters autocast",
    Checkpoints: "enters saved_tensors_hooks", Offloads: "enters saved_tensors_hooks", Freezes: "sets 'training'",
    Keeps: "keeps a value", CallsOtherwise: "the class Doubling of 'conv1' overrides __call__",
    IsCalledOtherwise: "its class overrides __call__",
}  # fmt: skip


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_a_trace_that_would_lie_is_refused(cls):
    model = nn.Sequential(cls(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    before = {k: list(v) if isinstance(v, list) else v for k, v in model[0].__dict__.items()}
    state = torch.get_rng_state()
    fr.fuse(model)
    assert type(model[0]) is cls and isinstance(model[1], FusedModule)
    rows = {row.name: row for row in fr.explain(model).rows}
    assert REFUSED[cls] in rows["0"].reason and not rows["0"].fused
    assert model[0].__dict__ == before and all(m.training for m in model.modules())
    assert cls is DrawsTorch or torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------ what changes later
def test_an_attribute_that_changes():
    plain, fused = made(NormAddAct)
    for model in (plain, fused):
        model.scale = 3.0
    with pytest.warns(UserWarning, match="runs plain: 'scale' of a NormAddAct changed; call fuse again"):
        assert_same(fused, copy.deepcopy(plain), images())
    assert not fr.explain(fused).rows[0].fused
    fr.fuse(fused)
    assert fr.explain(fused).rows[0].fused
    plain.load_state_dict(fused.state_dict())
    assert_same(fused, plain, images())


def test_layers_that_are_replaced():
    """As for small images: no max-pool, a stem of another size; and a shortcut that is gone."""
    plain = prepared(fr.models.resnet18(fused=False, num_classes=3)).double()
    fused = fr.fuse(copy.deepcopy(plain))
    for model in (plain, fused):
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False).double()
        model.maxpool = nn.Identity()
        model.layer1[1].downsample = nn.Sequential(nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)).double()
        model.layer2[0].downsample[0].stride = (2, 2)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with pytest.warns(UserWarning, match="Identity in the place of MaxPool2d"):
        assert_same(fused, plain, x)
    rows = {row.name: row for row in fr.explain(fused).rows}
    assert "a BasicBlock has other children" in rows["layer1.1"].reason and rows["layer2.0"].fused
    assert all(row.fused for row in fr.explain(fr.fuse(fused)).rows)
    assert_same(fused, plain, x)


class Passing(Layers):
    """An Identity on the way, as timm keeps one where a network may drop."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.drop(self.conv1(x))))


def test_an_identity_that_is_replaced():
    plain, fused = made(Passing)
    assert_same(fused, plain, images())
    seen: list[int] = []
    handle = fused.drop.register_forward_hook(lambda *a: seen.append(1))
    with pytest.warns(UserWarning, match="'drop' is no plain Identity any more"):
        assert_same(fused, plain, images())
    assert seen == [1, 1]
    handle.remove()
    plain.drop, fused.drop = nn.Tanh(), nn.Tanh()
    assert_same(fused, plain, images())


class PartByMode(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x))
        return self.relu(h) if self.training else h


class AroundIt(Layers):
    """A chain reaches into the part, whose forward depends on its own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.part = PartByMode()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.part(x))))


def test_a_part_in_another_mode():
    plain, fused = made(AroundIt)
    assert plan_of(fused).modal and len(plan_of(fused).chains[0].units) == 2
    assert_same(fused, plain, images())
    x = images()
    for model in (plain, fused):
        model.train().part.eval()
    with pytest.warns(UserWarning, match="a PartByMode is in another mode"):
        torch.testing.assert_close(fused(x), plain(x))


def test_hooks_on_a_module_that_is_part_of_a_plan():
    plain, fused = made(Lists)
    seen: list[int] = []
    handle = fused.more[1].register_forward_hook(lambda *a: seen.append(1))
    with pytest.warns(UserWarning, match="runs plain: a Sequential has hooks"):
        assert_same(fused, copy.deepcopy(plain), images())
    assert seen == [1, 1]
    handle.remove()
    fused.more.append(nn.Sequential(nn.Conv2d(4, 4, 1)).double())
    with pytest.warns(UserWarning, match="ModuleList has other children"):
        fused(images())


def test_other_arguments_and_sizes():
    plain, fused = made(Default)
    x = images()
    torch.testing.assert_close(fused(x, 3.0), plain(x, 3.0))
    torch.testing.assert_close(fused(x=x, factor=0.5), plain(x=x, factor=0.5))
    _, fused = made(Sizes)
    with pytest.raises(ValueError, match="four channels, please"):
        fused(images(3))


def test_slices_of_a_fused_sequential():
    plain = prepared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))).double()
    fused = fr.fuse(copy.deepcopy(plain))
    x = images()
    assert isinstance(fused, FusedModule)
    torch.testing.assert_close(fused[:2](x), plain[:2](x))
    torch.testing.assert_close(fused.eval()[1:](x), plain.eval()[1:](x))


def test_sync_batchnorm_of_what_is_no_image():
    """convert_sync_batchnorm makes one class of BatchNorm1d and BatchNorm2d: alone, nothing tells which it was."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    plain = convert(prepared(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))).double()
    fused = fr.fuse(copy.deepcopy(plain))
    assert_same(fused, plain, torch.randn(5, 4, dtype=torch.float64) * 1.3 + 0.4)
    (row,) = fr.explain(fused).rows
    assert not row.fused and row.reason == "a SyncBatchNorm without a convolution, which may get other than images"
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
    behind = fr.fuse(convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())))
    assert all(row.fused for row in fr.explain(behind).rows)


@pytest.mark.parametrize("cls", [Functions, LinearMiddle, PreActivation, NormAddAct, Broadcast, Lists, Sizes, Counts])
def test_freeze(cls):
    plain, _ = made(cls)
    x = images().float()
    frozen = fr.freeze(plain.float(), x)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
        other = images().float()[:2]
        torch.testing.assert_close(frozen(other), plain(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [Functions, Lists, Mode, Sizes])
def test_compile_fullgraph(cls):
    _, fused = made(cls)
    other = copy.deepcopy(fused)
    x = images()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), other(x))
    for (key, a), (_, b) in zip(fused.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


def test_running_statistics_take_an_eps_of_zero():
    """As F.batch_norm: an error in training alone."""
    plain = prepared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, eps=0.0), nn.ReLU())).double()
    fused, x = fr.fuse(copy.deepcopy(plain)), images()
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-7, atol=1e-9)
    for model in (plain, fused):
        with pytest.raises(ValueError, match="eps.*positive"):
            model.train()(x)
