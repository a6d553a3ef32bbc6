"""BatchNorm's options and running statistics in fused blocks: those of the plain ones."""

import copy
import pickle
from unittest.mock import patch

import numpy as np
import pytest
import torch
from networks import images, prepared
from torch import nn
from torchvision_shim import torchvision
from watching import rows, rows_of

import fused_resnet as fr

pytestmark = pytest.mark.usefixtures("every_warning")


def variants():
    return {
        "momentum None": {"momentum": None},
        "momentum 0.3": {"momentum": 0.3},
        "not affine": {"affine": False},
        "no running statistics": {"track_running_stats": False},
        "eps": {"eps": 1e-2},
    }


@pytest.mark.parametrize("name", variants())
def test_batch_norm_options(name):
    """Three steps and an evaluation: outputs, statistics and num_batches_tracked as the plain block's."""
    norm = lambda c: nn.BatchNorm2d(c, **variants()[name])  # noqa: E731
    plain = torchvision.models.resnet.BasicBlock(8, 8, norm_layer=norm).double()
    fused = fr.fuse(copy.deepcopy(plain))
    for _ in range(3):
        x = (torch.randn(3, 8, 5, 5) * 2 + 1).double()
        torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
    for (key, a), (_, b) in zip(fused.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


class Numbers(nn.Module):
    """Numbers that a chain takes for constants, as attributes."""

    def __init__(self, number):
        super().__init__()
        self.conv, self.bn, self.slope = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, eps=number), number

    def forward(self, x):
        return nn.functional.leaky_relu(self.bn(self.conv(x)), self.slope)


def test_numbers_that_differ():
    """Between models of one class, and from call to call: each has its own values, and is a chain."""
    x = images(channels_last=False).double()[:, :1].expand(-1, 4, -1, -1)
    model = None
    for number in (0.3, 0.1, 0.2, 0.3):
        plain = prepared(Numbers(number)).double()
        fused = fr.fuse(copy.deepcopy(plain))
        model = model or fr.fuse(copy.deepcopy(plain))
        model.bn.eps = model.slope = number
        model.load_state_dict(plain.state_dict())
        want = plain(x)
        for other in (fused, model):
            with rows() as found:
                torch.testing.assert_close(other(x), want)
            assert found == [[1]]


class Asks(nn.Module):
    """Its forward reads its norm's numbers as they were given."""

    def __init__(self, **numbers):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, **numbers)

    def forward(self, x):
        y = nn.functional.relu(self.bn(self.conv(x)))
        return y + 1 if isinstance(self.bn.momentum, torch.Tensor) else y


def both(plain, fused):
    """A step of both, and an evaluation: the same results and statistics. Returns the chains that ran."""
    x = images(channels_last=False).double()[:, :1].expand(-1, 4, -1, -1)
    with rows() as found:
        for training in (True, False):
            torch.testing.assert_close(fused.train(training)(x), plain.train(training)(x))
    for (key, a), (_, b) in zip(fused.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    return found


NUMBERS = {"numpy 32": np.float32, "numpy 64": np.float64, "tensor": torch.tensor}


@pytest.mark.parametrize(("kind", "name"), [("numpy 32", "momentum"), ("numpy 64", "eps"), ("tensor", "momentum")])
def test_numbers_of_numpy_and_tensors(kind, name):
    """Chains with the values that PyTorch takes, those of each call, however they are edited."""
    make = NUMBERS[kind]
    plain = prepared(Asks(**{name: make(0.25)})).double()
    fused = fr.fuse(copy.deepcopy(plain))
    assert both(plain, fused) == [[1], [1]]
    for value in (0.125, make(0.75)):
        for net in (plain, fused):
            setattr(net.bn, name, copy.copy(value))
        both(plain, fused)  # the call that finds a float replaced by such a number runs plain
        assert both(plain, fused) == [[1], [1]]
        assert type(getattr(fused.bn, name)) is type(value)
    if kind.startswith("tensor"):
        for net in (plain, fused):
            getattr(net.bn, name).mul_(0.25)
        assert both(plain, fused) == [[1], [1]]
    assert type(fr.unfuse(fused).bn) is nn.BatchNorm2d and "_fr" not in " ".join(vars(fused.bn))


def test_numbers_that_two_modules_capture():
    """A block on its own after the network, and edits in between: neither has the other's old value."""
    plain = prepared(nn.Sequential(Asks(momentum=0.3), Asks(eps=0.1))).double()
    fused = fr.fuse(copy.deepcopy(plain))
    both(plain, fused), both(plain[0], fused[0])
    for value in (np.float32(0.5), 0.25):
        for net in (plain, fused):
            net[0].bn.momentum = value
        both(plain, fused), both(plain[0], fused[0])
    assert both(plain[0], fused[0]) == [[1], [1]]


def test_numbers_in_copies_and_files():
    plain = prepared(Asks(momentum=torch.tensor(0.25), eps=np.float64(0.1))).double()
    fused = fr.fuse(copy.deepcopy(plain))
    both(plain, fused)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        twin = copy.deepcopy(plain)
        other.bn.momentum.fill_(0.5), twin.bn.momentum.fill_(0.5)
        assert both(twin, other) == [[1], [1]]
    assert both(plain, fused) == [[1], [1]]


def test_numbers_in_a_patched_forward():
    """What replaces BatchNorm's forward runs, before and after the norm has its class."""
    plain = prepared(Asks(momentum=np.float32(0.25))).double()
    fused = fr.fuse(copy.deepcopy(plain))
    assert both(plain, fused) == [[1], [1]]
    with patch.object(nn.BatchNorm2d, "forward", lambda self, x: x * 2 + self.eps):
        both(plain, fused)
    assert both(plain, fused) == [[1], [1]]


def test_numbers_of_frozen_models():
    plain = prepared(Asks(eps=np.float64(0.25))).double().eval()
    x = images(channels_last=False).double()[:, :1].expand(-1, 4, -1, -1)
    frozen = fr.freeze(plain, x)
    assert all(row.fused for row in fr.explain(frozen).rows)
    for value in (torch.tensor(0.5), 0.125):
        plain.bn.eps = frozen.model.bn.eps = value
        torch.testing.assert_close(frozen(x), plain(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_updates_statistics_once(reentrant):
    block = fr.fuse(nn.Sequential(torchvision.models.resnet.BasicBlock(8, 8)))
    other = copy.deepcopy(block)
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    other(x).sum().backward()
    for (key, a), (_, b) in zip(block.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b), key
    for a, b in zip(block.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_error_leaves_the_module_as_it_was():
    """One value per channel at the second norm, also once other sizes have been captured: PyTorch's error, which leaves
    what it leaves of the plain block's statistics, and no other gradient or mode."""
    plain = nn.Sequential(fr.models.PlainBlock(4, 4, 2))
    block = fr.fuse(copy.deepcopy(plain))
    for sizes in ((), (6, 8, 10)):
        for size in sizes:
            x = torch.randn(3, 4, size, size)
            torch.testing.assert_close(block(x), plain(x))
        x = torch.randn(1, 4, 2, 2)
        for model in (block, plain):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                model(x)
        for (key, a), b in zip(block.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, msg=key)
        assert block.training and all(p.grad is None for p in block.parameters())
    assert rows_of(lambda: block(torch.randn(3, 4, 6, 6))) == [1]
