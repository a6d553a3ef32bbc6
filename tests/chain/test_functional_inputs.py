"""The functional API takes the inputs that conv2d and batch_norm take: views, sizes, NaN and infinity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from functional_cases import (
    BOTH,
    LAYOUTS,
    TENSORS,
    Case,
    block,
    fused,
    image,
    outcome,
    plain,
    same,
    unit,
)
from torch import Tensor

from fused_resnet import functional as fr
from fused_resnet.spec import ACTIVATIONS, PoolSpec


# ------------------------------------------------------------------------------------------------------- inputs
def offset(v: Tensor) -> Tensor:
    """The same values, one element off the allocation's start: not aligned to anything but the element."""
    flat = torch.empty(v.numel() + 1, dtype=v.dtype)
    flat[1:] = v.detach().flatten()
    return flat[1:].view(v.shape)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda v: v,
    "nhwc": lambda v: v.contiguous(memory_format=torch.channels_last),
    "sliced_channels": lambda v: torch.cat([v, v + 1], 1)[:, : v.shape[1]],
    "sliced_pixels": lambda v: torch.stack([v, v + 1], -1).flatten(3)[..., ::2],
    "sliced_nhwc": lambda v: torch.cat([v, v], 3).contiguous(memory_format=torch.channels_last)[..., : v.shape[3]],
    "expanded_batch": lambda v: v[:1].expand(v.shape),
    "expanded_channels": lambda v: v[:, :1].expand(v.shape),
    "expanded_pixels": lambda v: v[:, :, :1, :1].expand(v.shape),
    "misaligned": offset,
    "misaligned_nhwc": lambda v: offset(v.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2),
    "transposed": lambda v: v.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_inside": lambda v: v.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@BOTH
@pytest.mark.parametrize("view", INPUTS)
def test_input_views(backend: str, view: str, training: bool) -> None:
    """x, residual and weights of any strides and offset give the values of plain PyTorch, and stay as they are."""
    x, residual = (INPUTS[view](torch.randn(3, 4, 5, 6) * 1.5 + 0.7).detach() for _ in range(2))
    bits = x.clone()
    # equal channels are one channel to a 1x1 convolution, whose gradient before BatchNorm is then all rounding
    kernel = 3 if view == "expanded_channels" else 1
    bottleneck = [unit(4, 3, kernel, training=training), *block(training=training)[1:]]
    for units in ([unit(None, 4, training=training)], [unit(4, 4, training=training)], bottleneck):
        same(Case(x.requires_grad_(), units, residual=residual.requires_grad_()))
    weight = INPUTS[view](torch.randn(4, 4, 3, 3) / 6).detach().requires_grad_()
    same(Case(x, [unit(4, 4, weight=weight, training=training)]))
    assert torch.equal(x, bits)


@BOTH
def test_strided_vectors(backend: str, training: bool) -> None:
    """gamma, beta, bias and running statistics may be strided, expanded or misaligned; in-place updates reach them."""
    for view in (lambda v: torch.stack([v, v + 1], 1)[:, 0], offset):
        tensors = {n: view(torch.rand(6) + 0.5) for n in TENSORS[1:]}
        case = Case(image(3, 4, 5, 5), [unit(4, 6, training=training, **tensors)])
        got, want = (outcome(way, case, None) for way in (fused, plain))
        for name in want:
            torch.testing.assert_close(got[name], want[name])
    mean, var = torch.zeros(8)[::2], torch.ones(8)[::2]
    x = torch.randn(2, 4, 3, 3)
    fr.bn_act(x, running_mean=mean, running_var=var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    ones = torch.ones(1).expand(4)
    got = fr.bn_act(x, ones, torch.zeros(1).expand(4), torch.zeros(1).expand(4), ones, act=None)
    torch.testing.assert_close(got, x / math.sqrt(1 + 1e-5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 5, 8, 17, 65])
def test_channels(backend: str, channels: int, layout: str) -> None:
    """Channel counts that no vector width divides, training and eval, in a block and in a stem."""
    for training in (True, False):
        x = image(2, channels, 5, 3).detach().contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        same(Case(x, block(channels, 5, training=training), shortcut="identity"))
        same(Case(x, [unit(channels, channels, training=training)], max_pool=PoolSpec.make(3, 2, 1)))
        same(Case(x, [unit(None, channels, training=training)], residual=image(2, channels, 5, 3)))


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_pixel(backend: str, layout: str, training: bool) -> None:
    """1x1 images: the statistics are those of the batch."""
    x = image(5, 4, 1, 1).detach().to(memory_format=LAYOUTS[layout]).requires_grad_()
    same(Case(x, block(training=training), shortcut="identity"))
    same(Case(x, [unit(None, 4, training=training)]))
    same(Case(x, [unit(4, 6, 1, training=training)]))


@pytest.mark.parametrize("shape", [(7, 3, 65, 3), (1, 1, 257, 1), (130, 2, 1, 1), (2, 33, 13, 11), (1, 2, 40, 50)])
def test_odd_sizes(backend: str, shape: tuple[int, ...]) -> None:
    """Sizes around the blocks into which reductions are cut, in both layouts."""
    for fmt in LAYOUTS.values():
        x = image(*shape).detach().contiguous(memory_format=fmt).requires_grad_()
        same(Case(x, [unit(None, shape[1])]))
        # a 1x1 convolution of one channel before BatchNorm has no gradient but for eps: rounding is all there is to see
        kernel = 1 if shape[1] > 1 else 3
        same(Case(x, [unit(shape[1], 3, kernel), unit(3, shape[1], 1)], shortcut="identity"))


@BOTH
@pytest.mark.parametrize("kind", ["conv", "no_conv", "block", "projection", "stem", "residual"])
def test_empty_batch(backend: str, kind: str, training: bool) -> None:
    """A batch of 0 is plain PyTorch's: shapes, zero gradients, statistics as PyTorch leaves them."""
    x = image(0, 4, 6, 6)
    case = {
        "conv": lambda: Case(x, [unit(4, 6, training=training, bias=torch.randn(6).requires_grad_())]),
        "no_conv": lambda: Case(x, [unit(None, 4, training=training)]),
        "block": lambda: Case(x, block(training=training), shortcut="identity"),
        "projection": lambda: Case(
            x,
            [unit(4, 6, stride=2, training=training)],
            shortcut=unit(4, 6, 1, stride=2, act=None, training=training),
        ),
        "stem": lambda: Case(x, [unit(4, 6, training=training)], max_pool=PoolSpec.make(3, 2, 1)),
        "residual": lambda: Case(x, [unit(None, 4, training=training)], residual=image(0, 4, 6, 6)),
    }[kind]()
    got = same(case)
    assert got["out"].shape[0] == 0
    with torch.no_grad():
        assert torch.equal(fused(case.clone()), got["out"])


def test_empty_image(backend: str) -> None:
    """No pixels, without a convolution before: as PyTorch, and the statistics stay finite."""
    case = Case(image(2, 4, 0, 3), [unit(None, 4)])
    got = same(case)
    assert torch.equal(got["0.running_mean"], case.units[0].running_mean)


# ------------------------------------------------------------------------------------------------- NaN and infinity
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@BOTH
def test_nonfinite_goes_where_pytorch_sends_it(backend: str, act: str, value: float, training: bool) -> None:
    """One NaN or infinity in x: every output, statistic and gradient is NaN, infinite or finite as in plain PyTorch.

    Two liberties: an infinity in a mean may come out as NaN (partial means of blocks are merged); and a gradient at a
    NaN may be NaN where ATen's is not (its vector loops and their remainders disagree for hardswish, elu and those
    like it).
    """
    x = torch.randn(2, 4, 5, 5)
    x[1, 2, 3, 3] = value
    for u in (unit(4, 3, act=act, training=training), unit(None, 4, act=act, training=training)):
        for pool in (None, PoolSpec.make(3, 2, 1)) if u.weight is not None else (None,):
            case = Case(x.clone().requires_grad_(), [u], max_pool=pool)
            dout = torch.randn_like(plain(case.clone()))
            got, want = (outcome(way, case, dout) for way in (fused, plain))
            with torch.no_grad():
                got["inference"], want["inference"] = fused(case.clone()), want["out"]
            for name in want:
                g, w = got[name], want[name]
                if name.endswith(("running_mean", "running_var")):
                    assert torch.equal(g.isfinite(), w.isfinite()), f"{name}: {g}, plain {w}"
                    continue
                assert g[w.isnan()].isnan().all(), f"a NaN lost in {name}"
                if not (name.startswith("d ") and act in ("elu", "hardswish", "selu", "celu")):
                    assert w[g.isnan()].isnan().all(), f"a NaN more in {name}"
                assert torch.equal(g[w.isinf()], w[w.isinf()]), f"infinity in {name}"


def test_nan_survives_relu_and_max_pool(backend: str) -> None:
    """No NaN is clipped to 0 or passed over by a maximum, whatever its place in the window."""
    mean, var = torch.zeros(3), torch.ones(3)
    weight = torch.eye(3)[:, :, None, None].clone()
    for layout, place in itertools.product(LAYOUTS.values(), range(9)):
        x = torch.rand(1, 3, 3, 3).contiguous(memory_format=layout)
        x[0, 1, place // 3, place % 3] = math.nan
        want = torch.conv2d(x, weight).amax((2, 3)).isnan()
        for w in (weight, weight.clone().requires_grad_()):  # inference, training graph
            out = fr.conv_bn_act(x, w, torch.ones(3), torch.zeros(3), mean, var, act="relu", max_pool=PoolSpec.make(3))
            assert torch.equal(out.flatten(1).isnan(), want), f"place {place}, gradient {w.requires_grad}"
