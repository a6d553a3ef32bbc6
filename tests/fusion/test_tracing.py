"""Modules of any class: what of their forward becomes chains, what doesn't, and that nobody can tell."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import prepared
from torch import Tensor, nn
from traced import Layers, Lists, NormAddAct, assert_same, chains_of, images, made
from watching import rows

import fused_resnet as fr
from fused_resnet.fusion.swap import FusedModule

pytestmark = pytest.mark.usefixtures("every_warning")


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
        gate = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Softsign())
        self.branch = nn.Sequential(unit(nn.ReLU(inplace=True)), unit(nn.ReLU(inplace=True)), gate, unit())
        self.projection = unit() if projected else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.projection(x) + self.branch(x))


class Headed(Layers):
    def forward_features(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean((2, 3))


class CallsForward(nn.Module):
    """As in HRNet."""

    def __init__(self) -> None:
        super().__init__()
        unit = lambda: [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]  # noqa: E731
        self.stem, self.branch = nn.Sequential(*unit(), *unit()), nn.Sequential(*unit(), *unit()[:2])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stem:
            x = layer(x)
        return F.relu(self.branch.forward(x) + x)


class CallsTwice(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv1(self.relu(self.bn1(h))))


class Concatenates(Layers):
    """A list of tensors, as DenseNet's layers take it."""

    def forward(self, x: Any) -> Tensor:
        x = [x] if isinstance(x, Tensor) else x
        return self.conv1(self.relu(self.bn1(torch.cat(x, 1))))


# class -> the units of each chain, row by row
FUSED: dict[type[nn.Module], list[list[int]]] = {
    Functions: [[2]], LinearMiddle: [[2]], Methods: [[2]], PreActivation: [[2]], NormAddAct: [[1]],
    Broadcast: [[1], [1]], UsedTwice: [[1]], ChangesItsInput: [[1]], Mode: [[1]], Default: [[1]], Counts: [[1]],
    Sizes: [[1]],
}  # fmt: skip


@pytest.mark.parametrize("cls", FUSED, ids=lambda cls: cls.__name__)
def test_forward_backward_statistics(cls):
    plain, fused = made(cls)
    assert chains_of(fused, images()) == FUSED[cls]
    assert isinstance(fused, cls) and list(fused.state_dict()) == list(plain.state_dict())
    for other in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(other) is type(fused)
        assert_same(other, copy.deepcopy(plain), images())
    assert type(fr.unfuse(fused)) is cls and not any(name.startswith("_fr") for name in fused.__dict__)


def test_a_shortcut_that_is_changed_on_the_way():
    plain, fused = made(ChangesTheShortcut)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), plain(x.clone()))
    (row,) = fr.explain(fused).rows
    assert row.fused
    for model in (fused, plain):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model(x.clone()).sum().backward()


@pytest.mark.parametrize("how", ["layer", "view", "module's view", "out", "not at all"])
def test_an_input_that_is_changed_on_the_way(how):
    plain = prepared(ChangesTheInput(how)).double().eval()
    fused = fr.fuse(copy.deepcopy(plain))
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), plain(x.clone()))
    (row,) = fr.explain(fused).rows
    assert row.fused == (how == "not at all")
    assert row.fused or "a tensor that it reads is changed in place before its last operator" in row.reason


@pytest.mark.parametrize("projected", [False, True])
def test_a_residual_whose_last_unit_is_two_modules_down(projected):
    """RegNet's block: the add and its activation join the last convolution, which the gate before it leaves alone; not
    the shortcut's, whose input the branch's own in-place activation might have changed by the end."""
    plain = prepared(Gated(projected)).double()
    fused = fr.fuse(copy.deepcopy(plain))
    assert_same(fused, plain, images())
    assert chains_of(fused, images()) == ([[1], [2], [1]] if projected else [[2], [1]])
    assert all(row.fused and not row.reason for row in fr.explain(fused).rows)


def test_a_fused_model_is_read_as_the_plain_one():
    """A row through two nn.Sequentials; fused again nothing changes."""
    block, unit = lambda: prepared(Methods()), lambda: [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]  # noqa: E731
    plain = nn.Sequential(*unit(), nn.Sequential(nn.Sequential(*unit()), block(), block())).double()
    fused = fr.fuse(copy.deepcopy(plain))
    assert_same(fused, plain, images())
    explained, classes = str(fr.explain(fused)), [type(m) for m in fused.modules()]
    assert "plain" not in explained
    assert [type(m) for m in fr.fuse(fused).modules()] == classes and str(fr.explain(fused)) == explained
    assert chains_of(fused, images()) == chains_of(plain := fr.fuse(plain), images()) == [[2, 2, 2]]


def test_a_network_whose_features_are_one_chain():
    """Its ``forward_features`` runs the chain; what its forward does behind that stays, frozen too."""
    plain = prepared(Headed()).double()
    fused = fr.fuse(copy.deepcopy(plain))
    assert_same(fused, plain, images())
    with rows() as found:
        fused(images())
        fused.forward_features(images())
    assert found == [[2], [2]]
    fused.load_state_dict(plain.state_dict())
    with torch.no_grad():
        frozen = fr.freeze(plain, x := images())
        torch.testing.assert_close(frozen(x), plain.eval()(x))


def test_children_of_a_child_that_is_not_called_itself():
    """Called by hand, or by the child's ``forward`` without its hooks: part of the caller's chains."""
    plain = prepared(CallsForward()).double()
    fused = fr.fuse(copy.deepcopy(plain))
    assert_same(fused, plain, images())
    assert chains_of(fused, images()) == [[2, 2]]
    with torch.no_grad():
        frozen = fr.freeze(plain, x := images())
        torch.testing.assert_close(frozen(x), plain.eval()(x))
    for model in (plain, fused):
        model.branch.append(nn.Softsign())
    assert_same(fused, plain, images())


@pytest.mark.parametrize("cls", [Lists, Tower])
def test_children_with_forwards_of_their_own(cls):
    """Lists are looked through; what a forward calls twice stays a module of its own."""
    plain, fused = made(cls)
    assert_same(fused, plain, images())
    assert isinstance(fused, FusedModule)
    assert chains_of(fused, images()) == ([[2], [1]] if cls is Lists else [[1], [1]])


def test_norms_and_convolutions_that_are_called_twice():
    plain, fused = made(CallsTwice)
    assert_same(fused, plain, images())
    assert sum(map(sum, chains_of(fused, images()))) == 3


def test_a_list_of_tensors():
    plain, fused = made(Concatenates)
    halves = [images(2), images(2)]
    assert_same(fused, plain, halves)
    assert chains_of(fused, halves) == [[1]]
    assert_same(fused, plain, images(4))  # a tensor: as it was


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
    assert not row.fused and row.reason == "a norm of vectors, without images"
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
    behind = fr.fuse(convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())))
    behind(images().float())
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
