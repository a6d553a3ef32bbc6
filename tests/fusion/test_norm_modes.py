"""BatchNorm's options and running statistics in fused blocks: those of the plain ones."""

import copy

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
