"""freeze: the numbers of model.eval(), for any model and any shape; what it leaves as it was, and says."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from networks import BATCH, blocks, folded, images, narrow, prepared, relative, small
from torch import Tensor, nn
from torchvision_shim import torchvision

import fused_resnet as fr
from fused_resnet.backends import load
from fused_resnet.frozen import forward as frozen_forward
from fused_resnet.models.resnet import BasicBlock, ResNet
from fused_resnet.spec import Act, ChainSpec, ConvSpec, ShortcutSpec, UnitSpec

pytestmark = pytest.mark.usefixtures("one_thread", "every_warning")


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
    with pytest.raises(ValueError, match="^x: expected tensors on meta, where this model is, got one on cpu"):
        loaded(x)


@pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")
def test_a_network_is_one_row():
    model = prepared(fr.models.cifar_resnet(8, shortcut="B", fused=False)).eval()
    frozen = fr.freeze(model, torch.randn(1, 3, 16, 16))
    for batch in (1, 7):
        x = torch.randn(batch, 3, 16, 16) * 1.3 + 0.4
        assert relative(frozen(x), model(x)) < 1e-5
        with torch.profiler.profile() as profile:
            frozen(x)
        (row,) = (event for event in profile.key_averages() if event.key == "fused_resnet_cpu::frozen_row")
        assert row.count == 1


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
    rows = {row.name: row for row in fr.explain(frozen).rows}
    assert rows["layer2.0"].fused and rows["layer2.0"].reason == "a norm without running statistics"
    assert rows["layer2.1"].fused and not rows["layer2.1"].reason


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
    assert chain.spec.units[0].conv is None
    assert chain.spec.shortcut.kind == ("none" if widened else "tensor")
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
    assert relative(compiled(x), frozen(x)) < 1e-5
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
    for image in (x, images(3)[..., :33]):
        assert relative(frozen(image), model(image)) < 1e-5
    rows = {row.name: row for row in fr.explain(frozen).rows}
    assert rows["net.layer1.0"].fused and rows["net.layer2.0"].fused and not rows["net.layer3.0"].fused


def test_calls_of_other_kinds():
    """Each kind of call is captured when it comes first: other arguments, other sizes that a forward asks for."""
    model, x = prepared(Scales()).eval(), torch.randn(2, 4, 8, 8) + 0.4
    frozen = fr.freeze(model, x)
    assert relative(frozen(x), model(x)) < 1e-5
    assert all(row.fused for row in fr.explain(frozen).rows)
    for turns, size in itertools.product((Turns(True), Turns(False)), (8, 6)):
        prepared(turns).eval()
        frozen = fr.freeze(turns, torch.randn(2, 4, size, 8))
        for height in (size, 14 - size, size):
            x = torch.randn(2, 4, height, 8)
            assert relative(frozen(x), turns(x)) < 1e-5


class Several(nn.Module):
    """Two images, a number, and a dict of results; one of them is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, other: Tensor, scale: float = 1.0, *, again: bool = False) -> dict[str, Tensor]:
        h = torch.relu(self.bn(self.conv(x)) + other)
        return {"h": h * scale, "again": torch.relu(self.bn(self.conv(h))) if again else other}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_several_inputs_and_outputs(dtype):
    model = prepared(Several()).eval()
    x, other = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    frozen = fr.freeze(model, x, example_kwargs={"other": other}, dtype=dtype)
    exact = copy.deepcopy(model).double()
    for kwargs in ({}, {"scale": 0.5}, {"again": True}, {"scale": 2.0, "again": True}):
        got, want = frozen(x, other, **kwargs), exact(x.double(), other.double(), **kwargs)
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].dtype == dtype and relative(got[name].double(), want[name]) < (
                0.02 if dtype == torch.bfloat16 else 1e-5
            )


def test_hooks_and_what_a_forward_reads():
    """Hooks of the model are the copy's, and later ones are seen; so are changes of what the forward reads."""
    model, x = prepared(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)).eval(), images()
    model.layer1[0].register_forward_hook(lambda module, args, out: out * 1.5)
    frozen = fr.freeze(model, x)
    assert relative(frozen(x), model(x)) < 1e-5
    for net in (model, frozen.model):
        net.layer2[0].conv2.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    assert relative(frozen(x), model(x)) < 1e-5
    for net in (model, frozen.model):
        net.layer3[0].bn1.eps = 0.5
        net.layer4[0].conv1.padding_mode = "circular"
    assert relative(frozen(x), model(x)) < 1e-5


class Stateful(nn.Module):
    """Another result at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.calls = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.relu(self.bn(self.conv(x))) * self.calls


def test_a_forward_that_counts():
    model, x = prepared(Stateful()).eval(), images()
    frozen = fr.freeze(model, x)
    calls = frozen.model.calls
    for i in range(1, 4):
        assert relative(frozen(x), torch.relu(model.bn(model.conv(x))) * (calls + i)) < 1e-5


class WrittenView(nn.Module):
    """A view of a unit's output is changed, which is one in PyTorch's default layout alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.bn2 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.conv(x))
        h.flatten(1)[:, :3].add_(1)
        return self.bn2(h)


def test_a_view_that_is_changed():
    model, x = prepared(WrittenView()).eval(), images().contiguous()
    frozen = fr.freeze(model, x)
    assert not frozen.differs and relative(frozen(x), model(x)) < 1e-5


class Asking(Stateful):
    """Another result where its weight learns."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x))) * (2 if self.conv.weight.requires_grad else 3)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("learns", [True, False])
def test_a_forward_that_asks_what_learns(learns: bool, dtype: torch.dtype, bound: float) -> None:
    model, x = prepared(Asking()).eval().requires_grad_(learns), images()
    frozen = fr.freeze(model, x, dtype=dtype)
    assert not frozen.differs and fr.explain(frozen).rows[0].fused
    assert relative(frozen(x), model(x)) < bound and not frozen(x).requires_grad
    assert frozen.model.conv.weight.requires_grad == learns
    assert not any(p.requires_grad for p in fr.freeze(prepared(Stateful()), x).parameters())


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


@pytest.mark.parametrize("shape", [(2, 24, 19, 14), (2, 24, 1, 1), (24, 1, 1)])
@pytest.mark.parametrize("act", ["relu", "identity"])
def test_chains_with_a_summand(shape, act):
    """A norm alone in front, on a slice, and somebody else's summand, which the add may widen."""
    units = (
        UnitSpec(None, Act("silu"), batch_stats=False),
        UnitSpec(ConvSpec((1, 1), (1, 1), bias=True), Act(act), batch_stats=False),
    )
    chains = [ChainSpec(units, ShortcutSpec("tensor"))]
    params = [torch.randn(16), torch.randn(16), torch.randn(24, 16, 3, 3) / 4, torch.randn(24)]
    x, residual = torch.randn(2, 20, 19, 14)[:, 2:18] + 0.5, torch.randn(shape) * 1.3 + 0.4
    h = torch.nn.functional.silu(x * params[0][:, None, None] + params[1][:, None, None])
    want = torch.nn.functional.conv2d(h, params[2], params[3], padding=1) + residual
    want = want.relu() if act == "relu" else want
    for run in (frozen_forward.run_chains, frozen_forward.plain_chains):
        assert relative(run(x, folded(params, chains), residual), want) < 1e-5


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
    assert "computed in torch.float32, on cpu" in repr(frozen)


def test_bad_arguments():
    model, x = small(), images()
    for example in ((), (torch.zeros(1, 3, 8, 8, dtype=torch.int64),), ("image",)):
        with pytest.raises(ValueError, match="^example: expected arguments with a floating-point tensor"):
            fr.freeze(model, *example)
    with pytest.raises(TypeError, match="^dtype: expected a floating-point"):
        fr.freeze(model, x, dtype=torch.int8)
    with pytest.raises(ValueError, match="^cuda_graph: expected an example on a CUDA device, got one on cpu"):
        fr.freeze(model, x, cuda_graph=True)
    with pytest.raises(TypeError, match="^cuda_graph: expected a bool, got 1"):
        fr.freeze(model, x, cuda_graph=1)
    with pytest.raises(TypeError, match="^portable: expected a bool, got 'yes'"):
        fr.freeze(model, x, portable="yes")
    frozen = fr.freeze(model, x)
    with pytest.raises(ValueError, match="^x: expected tensors on cpu, where this model is, got one on meta"):
        frozen(x.to("meta"))
    for bad in (torch.zeros(1, 3, 8, 8, dtype=torch.int64), torch.zeros(2, 4, 48, 48), "image"):
        raised = []
        for net in (frozen.model, frozen):
            with pytest.raises(Exception) as error:
                net(bad)
            raised.append((error.type, str(error.value)))
        assert raised[0] == raised[1]


class CopiesItself(nn.Module):
    """Its copies are in training mode and in the default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def __deepcopy__(self, memo: object) -> CopiesItself:
        new = CopiesItself()
        new.load_state_dict(self.state_dict())
        return new

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def test_a_model_that_copies_itself() -> None:
    model = CopiesItself()
    nn.init.normal_(model.bn.weight)
    model.bn.running_mean.normal_()
    model.double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64) + 0.5
    torch.testing.assert_close(fr.freeze(model, x)(x), model(x))
