"""Networks of signals and of volumes: fused and frozen they compute what they did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import prepared
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr

pytestmark = pytest.mark.usefixtures("one_thread")

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
DROPOUT = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
MEAN = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
SIZE = {1: (40,), 2: (12, 10), 3: (6, 8, 10)}
DIMS = pytest.mark.parametrize("dims", [1, 3])


class Block(nn.Module):
    """A block whose shortcut is the identity, a projection, ResNet-D's, or option A."""

    def __init__(self, dims: int, cin: int, cout: int, stride: int = 1, shortcut: str = "identity") -> None:
        super().__init__()
        self.kind, self.stride, self.more = shortcut, stride, cout - cin
        self.conv1, self.bn1 = CONV[dims](cin, cout, 3, stride, 1, bias=False), NORM[dims](cout)
        self.conv2, self.bn2 = CONV[dims](cout, cout, 3, 1, "same"), NORM[dims](cout)
        self.drop = DROPOUT[dims](0.5)
        if shortcut == "projection":
            self.shortcut: nn.Module = nn.Sequential(CONV[dims](cin, cout, 1, stride, bias=False), NORM[dims](cout))
        elif shortcut == "average":
            pool = AVG_POOL[dims](2, stride, ceil_mode=True, count_include_pad=False)
            self.shortcut = nn.Sequential(pool, CONV[dims](cin, cout, 1, bias=False), NORM[dims](cout))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.silu(self.bn1(self.conv1(x)))))
        if self.kind == "pad":
            every, dims = slice(None, None, self.stride), x.dim() - 2
            return F.silu(out + F.pad(x[:, :, *[every] * dims], [0, 0] * dims + [0, self.more]))
        return F.silu(out + (x if self.kind == "identity" else self.shortcut(x)))


def network(dims: int) -> nn.Module:
    """A stem with its max-pool, a block of each kind, a classifier with a BatchNorm1d of vectors."""
    return nn.Sequential(
        CONV[dims](3, 8, 5, 1, 2, bias=False), NORM[dims](8), nn.SiLU(), MAX_POOL[dims](3, 2, 1),
        Block(dims, 8, 8), Block(dims, 8, 12, 2, "projection"), Block(dims, 12, 16, 1, "pad"),
        Block(dims, 16, 16, 2, "average"), MEAN[dims](1), nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6),
    )  # fmt: skip


def images(dims: int, n: int = 3) -> Tensor:
    return torch.randn(n, 3, *SIZE[dims], dtype=torch.float64) * 1.3 + 0.4


def outcome(model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Output, gradients and statistics. ``run``: what calls the model."""
    x = x.detach().requires_grad_()
    out = model(x) if run is None else run(model, x)
    out.sin().sum().backward()
    grads = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "dx": x.grad, **grads, **dict(model.named_buffers())}  # type: ignore[dict-item]


def same(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 1e-8) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=atol, atol=atol, msg=lambda t, n=name: f"{n}: {t}")


@DIMS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_networks(dims: int, layout: str) -> None:
    """Training and evaluation, step after step; all norms but that of vectors are in chains."""
    plain = prepared(network(dims)).double()
    x = images(dims)
    if layout == "channels_last":
        if dims == 1:
            pytest.skip("signals have one layout")
        plain, x = plain.to(memory_format=torch.channels_last_3d), x.to(memory_format=torch.channels_last_3d)
    fused = fr.fuse(copy.deepcopy(plain))
    for mode in (True, True, False):
        same(outcome(fused.train(mode), x), outcome(plain.train(mode), x))
        for m in (plain, fused):
            m.zero_grad()
    rows = {row.name: row for row in fr.explain(fused).rows}
    assert all(row.fused for row in rows.values())
    reasons = {name: row.reason for name, row in rows.items() if row.reason}
    assert reasons == {"(model)": "a norm of vectors, without images"}
    out = [m.float().train()[:8](x.float()) for m in (plain, fused)]  # PyTorch convolves no float64 in channels_last
    assert out[0].stride() == out[1].stride()


@DIMS
def test_frozen_networks(dims: int) -> None:
    """In float64 as near as rounding, in float32 and bfloat16 as near as plain; other sizes, views of the output."""
    plain = prepared(network(dims)).double().eval()
    x = images(dims)
    for portable in (False, True):
        frozen = fr.freeze(plain, x, portable=portable)
        for given in (x, images(dims, 1), x[..., : SIZE[dims][-1] - 3]):
            with torch.no_grad():
                torch.testing.assert_close(frozen(given), plain(given), rtol=1e-10, atol=1e-10)
        assert sum(bool(row.reason) for row in fr.explain(frozen).rows) == 1
    single = copy.deepcopy(plain).float()
    with torch.no_grad():
        want = plain(x)
        # PyTorch averages no volumes in bfloat16
        for dtype in (torch.float32, torch.bfloat16) if dims == 1 else (torch.float32,):
            rounded = copy.deepcopy(plain).to(dtype)
            ours = fr.freeze(single, x.float(), dtype=dtype)(x.float()).double() - want
            theirs = rounded(x.to(dtype)).double() - want
            assert ours.norm() <= 2 * theirs.norm() + 0.25 * torch.finfo(dtype).eps * want.norm()


@pytest.mark.parametrize("dims", CONV)
def test_checkpoints(dims: int) -> None:
    """A checkpoint around the network computes it again, with as many saved tensors, and the same numbers."""
    plain = prepared(network(dims)[:-1]).double()  # a plain norm counts both forwards
    fused = fr.fuse(copy.deepcopy(plain))
    x = images(dims)
    want = outcome(plain, x)
    same(outcome(fused, x, partial(checkpoint, use_reentrant=False)), want)


@DIMS
def test_a_patched_function_is_seen(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolution that the modules look up at each call may be replaced after the capture."""
    plain = prepared(network(dims)).double().eval()
    fused, x, own = fr.fuse(copy.deepcopy(plain)), images(dims), getattr(F, f"conv{dims}d")
    with torch.no_grad():
        fused(x)
        monkeypatch.setattr(F, own.__name__, lambda *args, **kwargs: own(*args, **kwargs) * 2)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-10, atol=1e-10)


class Viewed(nn.Module):
    """A forward that needs a contiguous output of its chain."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.conv, self.bn = CONV[dims](3, 4, 3), NORM[dims](4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.conv(x)))
        return h.view(h.shape[0], -1).cumsum(1)


@DIMS
def test_views_of_outputs(dims: int) -> None:
    model = prepared(Viewed(dims)).double()
    x = images(dims)
    same(outcome(fr.fuse(copy.deepcopy(model)).train(), x), outcome(copy.deepcopy(model).train(), x))
    with torch.no_grad():
        torch.testing.assert_close(fr.freeze(model, x)(x), model.eval()(x))


def test_an_mlp_is_not_fused() -> None:
    """Norms of vectors are nobody's: a network of them is left as it is, with the reason."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    with pytest.warns(UserWarning, match="nothing in this Sequential could be fused"):
        fused = fr.fuse(model)
    assert type(fused) is nn.Sequential


def _flat_depth(c: int) -> nn.Module:
    """Convolutions in space and in time, as in R(2+1)D."""
    return nn.Sequential(
        nn.Conv3d(3, c, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False), nn.BatchNorm3d(c), nn.ReLU(),
        nn.Conv3d(c, c, (3, 1, 1), (2, 1, 1), (1, 0, 0), bias=False), nn.BatchNorm3d(c), nn.ReLU(),
        nn.Conv3d(c, c, 3, 1, 1, groups=2), nn.BatchNorm3d(c),
    )  # fmt: skip


def _sync(c: int) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(_flat_depth(c))


def _frozen_statistics(c: int) -> nn.Module:
    class Affine(nn.Module):
        """scale*x + shift, as frozen norms of libraries compute it."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.rand(c) + 0.5)
            self.register_buffer("shift", torch.randn(c))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.view(1, -1, 1, 1, 1) + self.shift.view(1, -1, 1, 1, 1)

    return nn.Sequential(nn.Conv3d(3, c, 3, bias=False), Affine(), nn.ReLU())


@pytest.mark.parametrize("make", [_flat_depth, _sync, _frozen_statistics])
def test_other_volumes(make: Callable[[int], nn.Module]) -> None:
    plain = prepared(make(8)).double()
    fused = fr.fuse(copy.deepcopy(plain)) if make is not _frozen_statistics else None
    x = images(3)
    if fused is not None:
        if make is _sync:  # PyTorch's own refuses a CPU's tensors in training
            plain.eval(), fused.eval()
        same(outcome(fused, x), outcome(plain, x))
        assert all(row.fused for row in fr.explain(fused).rows)
    with torch.no_grad():
        torch.testing.assert_close(fr.freeze(plain, x)(x), plain.eval()(x), rtol=1e-10, atol=1e-10)
