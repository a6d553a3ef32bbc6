"""freeze: the numbers of model.eval(), for any model and any shape; what it leaves as it was, and says."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from networks import BATCH, blocks, images, narrow, prepared, relative, small
from torch import Tensor, nn
from torchvision_shim import torchvision

import fused_resnet as fr
from fused_resnet import frozen_forward
from fused_resnet.backends import load
from fused_resnet.freezing import CalledOtherwise, FrozenRow
from fused_resnet.models.resnet import BasicBlock, ResNet

pytestmark = pytest.mark.usefixtures("every_warning")


# ------------------------------------------------------------------------------------------------ the same numbers
@pytest.mark.parametrize(
    ("name", "by"), [("resnet18", 4), ("resnet50", 4), ("resnext50_32x4d", 2), ("plain18", 4), ("resnet20", 1)]
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_equals_eval(name, by, channels_last, empty_is_nan):
    model = prepared(narrow(getattr(fr.models, name)(fused=False, num_classes=5), by))
    before = copy.deepcopy(model.state_dict())
    x = images(2, channels_last)
    frozen = fr.freeze(model, x)
    with torch.no_grad():
        want = model.eval()(x)
    got = frozen(x)
    assert relative(got, want) < 1e-5 and not got.requires_grad
    assert torch.equal(frozen(x), got), "an input of its own was overwritten"
    other = images(3, channels_last)
    assert relative(frozen(other), model(other)) < 1e-5, "another batch size"
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("shortcut", ["A", "B", "C", None])
def test_shortcuts_in_double(shortcut, portable):
    model = prepared(fr.models.cifar_resnet(8, shortcut=shortcut, fused=False)).double().eval()
    x = (torch.randn(3, 3, 20, 16) * 1.3 + 0.4).double()
    assert relative(fr.freeze(model, x, portable=portable)(x), model(x)) < 1e-12


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype, portable):
    """Not further from float64 than twice the plain 16-bit model; the dtype asked for comes out, the same bits whether
    autocast is on around it or not."""
    model, x = prepared(torchvision.models.resnet18(num_classes=7)).eval(), images(4)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(x.double())
        plain = copy.deepcopy(model).to(dtype)(x.to(dtype))
    frozen = fr.freeze(model, x, dtype=dtype, portable=portable)
    got = frozen(x)
    assert got.dtype == dtype
    assert relative(got, want) <= 2 * relative(plain, want)
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    with torch.autocast("cpu", other):
        assert torch.equal(frozen(x), got)


def test_fused_or_training_model_and_copies():
    model, x = prepared(torchvision.models.resnet18(num_classes=7)), images()
    want = fr.freeze(model, x)(x)
    frozen = fr.freeze(fr.fuse(model).train(), x)
    assert torch.equal(frozen(x), want)
    assert torch.equal(copy.deepcopy(frozen)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), want)
    with torch.inference_mode():
        assert torch.equal(fr.freeze(model, x)(x), want)
    with pytest.raises(RuntimeError, match="frozen for inference"):
        frozen.train()


def test_saved_here_loaded_elsewhere():
    """A frozen model knows the device that torch.load has moved it to."""
    x, buffer = images(), io.BytesIO()
    torch.save(fr.freeze(prepared(torchvision.models.resnet.BasicBlock(3, 3)), x), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, map_location="meta", weights_only=False)
    assert loaded.device == torch.device("meta")
    with pytest.raises(ValueError, match="^x: expected a tensor on meta, where this model is, got one on cpu"):
        loaded(x)


def test_stem_in_parts(monkeypatch):
    """A batch too large for the stem to make at a time: cut, and the same bits."""
    model = prepared(fr.models.cifar_resnet(8, fused=False)).eval()
    x = torch.randn(7, 3, 16, 16) * 1.3 + 0.4
    frozen = fr.freeze(model, x)
    sizes: list[int] = []
    chains = frozen_forward._chains
    monkeypatch.setattr(frozen_forward, "_chains", lambda x, *rest: sizes.append(len(x)) or chains(x, *rest))
    monkeypatch.setattr(frozen_forward, "_STEM_BYTES", 3 * 16 * 16 * 16 * 4 // torch.get_num_threads())
    got = frozen(x)
    assert sizes[:3] == [3, 3, 1] and sizes[-1] == 7, "stem and stages in parts, the last stage whole"
    assert relative(got, model(x)) < 1e-5


@pytest.mark.parametrize("wrap", [lambda block: block, nn.Sequential])
def test_a_block_alone(wrap):
    block = prepared(torchvision.models.resnet.BasicBlock(8, 8)).eval()
    x = torch.randn(3, 8, 9, 7).to(memory_format=torch.channels_last) + 0.5
    frozen, given = fr.freeze(wrap(block), x), x.clone()
    assert len(blocks(frozen)) == 1 and relative(frozen(x), block(x)) < 1e-5
    assert torch.equal(x, given), "the caller's memory was reused"
    assert str(fr.explain(frozen)).endswith("1 of 1 fused")


def test_what_cannot_be_folded_is_left():
    """Norms without running statistics use the batch's in eval mode too."""
    model = prepared(ResNet(BasicBlock, [1, 2, 1, 1], num_classes=3)).eval()
    model.layer2[0].bn1 = nn.BatchNorm2d(128, track_running_stats=False)
    model.layer2[1].bn2.register_forward_hook(lambda *args: None)
    x = images()
    frozen = fr.freeze(model, x)
    assert relative(frozen(x), model(x)) < 1e-5
    left = {row.name: row.reason for row in fr.explain(frozen).rows if not row.fused}
    assert left == {"layer2.0": "a BatchNorm2d without running statistics"}
    (partly,) = (row for row in fr.explain(frozen).rows if row.name == "layer2.1")
    assert partly.fused and partly.reason == "a BatchNorm2d has hooks; the add behind bn2 (BatchNorm2d)"


class Gated(nn.Module):
    """A norm before the first convolution, of a slice, and a summand that no chain makes: an image, or one value per
    channel, which the add widens."""

    def __init__(self, widened: bool) -> None:
        super().__init__()
        self.bn1, self.conv, self.bn2 = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.side, self.widened = nn.Conv2d(16, 12, 1), widened

    def forward(self, x: Tensor) -> Tensor:
        side = torch.tanh(self.side(x))
        if self.widened:
            side = side.mean((2, 3), keepdim=True)
        return torch.relu(self.bn2(self.conv(torch.relu(self.bn1(x[:, 3:11])))) + side)


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("portable", [False, True])
def test_norm_without_a_convolution_and_a_summand_of_others(portable, widened, empty_is_nan):
    model = prepared(Gated(widened)).eval()
    x = torch.randn(4, 16, 13, 9) * 1.3 + 0.4
    frozen = fr.freeze(model, x, portable=portable)
    (chain,) = blocks(frozen)
    assert chain.spec.units[0].conv is None and chain.spec.shortcut.kind == "tensor"
    with torch.no_grad():
        want = model(x)
        assert relative(frozen(x), want) < 1e-5
        assert torch.equal(frozen(x), frozen(x.clone())), "the summand was overwritten"
        exact = fr.freeze(copy.deepcopy(model).double(), x.double(), portable=portable)
        assert relative(exact(x.double()), copy.deepcopy(model).double()(x.double())) < 1e-12
        half = fr.freeze(model, x, dtype=torch.bfloat16, portable=portable)(x)
        plain = copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16 and relative(half, want) <= 2 * relative(plain, want)
    program = torch.export.export(frozen, (x,), dynamic_shapes=({0: BATCH},)).module()
    assert all(relative(program(part), model(part)) < 1e-5 for part in (x[:1], x[:3]))
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), frozen(x))
    (row,) = fr.explain(frozen).rows
    assert list(row.backends) == ["bn_act 1", "conv 2 3x3"] and row.chains == 1


class Extractor(nn.Module):
    """Calls the children of a network whose own forward nobody calls: all, or the stages behind a stem of its own."""

    def __init__(self, own_stem: bool) -> None:
        super().__init__()
        self.net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
        self.own = nn.Conv2d(3, 64, 3, 4, 1) if own_stem else None

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        stem = net.maxpool(net.relu(net.bn1(net.conv1(x)))) if self.own is None else self.own(x)
        first = net.layer1(stem)
        return first.mean((2, 3)) + net.layer2(first).flatten(2).mean(2)[:, :64]


class Scaled(nn.Module):
    """A block with an argument, which its parent gives or not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, factor: float | None = None) -> Tensor:
        if factor is not None:
            x = x * factor
        return torch.relu(self.bn(self.conv(x)))


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.scaled = Scaled(), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.plain(x), 0.5)


class Turns(nn.Module):
    """Another forward for images of another height; its chain may be a norm and an activation alone."""

    def __init__(self, convolves: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1) if convolves else None, nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(x if self.conv is None else self.conv(x))
        return torch.relu(h) if x.shape[2] == 8 else torch.tanh(h)


@pytest.mark.parametrize("own_stem", [False, True])
def test_network_whose_children_are_called_by_another(own_stem):
    model, x = prepared(Extractor(own_stem)).eval(), images()
    frozen = fr.freeze(model, x)
    assert relative(frozen(x), model(x)) < 1e-5
    other = images(3)[..., :33]
    assert relative(frozen(other), model(other)) < 1e-5
    rows = {row.name: row for row in fr.explain(frozen).rows}
    assert rows["net.layer1.0"].fused and "called otherwise" in rows["net"].reason


def test_calls_that_chains_are_not_for():
    """Seen with the example they leave a module as it was; later they are an error, never other numbers."""
    model, x = prepared(Scales()).eval(), torch.randn(2, 4, 8, 8) + 0.4
    frozen = fr.freeze(model, x)
    assert relative(frozen(x), model(x)) < 1e-5
    rows = {row.name: row for row in fr.explain(frozen).rows}
    assert rows["plain"].fused and "called otherwise" in rows["scaled"].reason
    for turns, size in itertools.product((Turns(True), Turns(False)), (8, 6)):
        prepared(turns).eval()
        x = torch.randn(2, 4, size, 8)
        frozen = fr.freeze(turns, x)
        assert relative(frozen(x), turns(x)) < 1e-5
        x = torch.randn(2, 4, 14 - size, 8)
        assert fr.explain(frozen).rows[0].fused is (size == 8)
        if size == 8:
            with pytest.raises(CalledOtherwise, match=r"^\(model\): expected the calls that it got"):
                frozen(x)
        else:
            assert relative(frozen(x), turns(x)) < 1e-5


# ------------------------------------------------------------------------------------------------ other shapes
def test_other_shapes(empty_is_nan):
    model = small()
    frozen = fr.freeze(model, images())
    for shape in ((1, 33, 47), (5, 64, 32), (2, 48, 48), (0, 48, 48)):
        x = torch.randn(shape[0], 3, *shape[1:]) * 1.3 + 0.4
        with torch.no_grad():
            want = model(x)
        assert frozen(x).shape == want.shape
        assert shape[0] == 0 or relative(frozen(x), want) < 1e-5, shape


# ------------------------------------------------------------------------------------------------ what it says
def test_explain_and_repr():
    frozen = fr.freeze(small(), images())
    rows = {row.name: row for row in fr.explain(frozen).rows}
    assert list(rows) == ["(model)", "layer1.0", "layer2.0", "layer3.0", "layer4.0"] and all(
        r.fused for r in rows.values()
    )
    assert list(rows["layer2.0"].backends) == ["conv 1 1x1", "conv 2 3x3", "conv 3 1x1", "conv shortcut 1x1"]
    if load("cpu")[0] is not None:
        assert all("cpu, packed: " in served for row in rows.values() for served in row.backends.values())
    with fr.use_backend("aten"):
        assert fr.explain(frozen).rows[1].backends["conv 1 1x1"].startswith("aten")
    assert "PyTorch's own" in str(fr.explain(fr.freeze(small(), images(), portable=True)))
    assert "computed in torch.float32, on cpu" in repr(frozen) and "64 -> 64, 3x3, stride 1, relu" in repr(frozen)
    assert isinstance(frozen.model.conv1, FrozenRow) and "layer2.0, Bottleneck, shortcut: projection" in repr(frozen)


def test_bad_arguments():
    model, x = small(), images()
    with pytest.raises(ValueError, match="^example: expected a floating-point tensor"):
        fr.freeze(model, torch.zeros(3, 4))
    with pytest.raises(TypeError, match="^dtype: expected a floating-point"):
        fr.freeze(model, x, dtype=torch.int8)
    with pytest.raises(ValueError, match="^cuda_graph: expected an example on a CUDA device, got one on cpu"):
        fr.freeze(model, x, cuda_graph=True)
    with pytest.raises(TypeError, match="^cuda_graph: expected a bool, got 1"):
        fr.freeze(model, x, cuda_graph=1)
    with pytest.raises(TypeError, match="^portable: expected a bool, got 'yes'"):
        fr.freeze(model, x, portable="yes")
    frozen = fr.freeze(model, x)
    with pytest.raises(ValueError, match="^x: expected a floating-point tensor"):
        frozen(torch.zeros(1, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="^x: expected a tensor on cpu, where this model is, got one on meta"):
        frozen(x.to("meta"))
    with pytest.raises(ValueError, match=r"^x: expected 3 channels, got shape \(2, 4, 48, 48\)"):
        frozen(torch.zeros(2, 4, 48, 48))
