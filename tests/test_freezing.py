"""freeze: the numbers of model.eval(), for any shape, from several threads, exported, and as CUDA graphs."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_convert import images, prepared, relative
from torch import Tensor, nn
from torchvision_shim import torchvision

import fused_resnet as fr
from fused_resnet import cuda_graphs, frozen_forward
from fused_resnet.backends import aten, load, warn_once
from fused_resnet.cuda_graphs import Graphs
from fused_resnet.freezing import CalledOtherwise, FrozenChain, FrozenRow
from fused_resnet.models.resnet import BasicBlock, Bottleneck, ResNet
from fused_resnet.spec import Act, ChainSpec, ConvSpec, ShortcutSpec, UnitSpec

BATCH = torch.export.Dim("batch", min=1, max=64)
needs_extension = pytest.mark.skipif(load("cpu")[0] is None, reason=f"packs weights: backend cpu: {load('cpu')[1]}")


@pytest.fixture(autouse=True)
def every_warning() -> None:
    """Warnings that come once per process come once per test."""
    warn_once.cache_clear()


def small() -> nn.Module:
    """Every kind of convolution of a ResNet, in four blocks."""
    return prepared(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, avg_down=True)).eval()


def blocks(frozen: nn.Module) -> list[FrozenChain]:
    return [m for m in frozen.modules() if isinstance(m, FrozenChain)]


# ------------------------------------------------------------------------------------------------ the same numbers
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "plain18", "resnet20"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_equals_eval(name, channels_last, empty_is_nan):
    model = prepared(getattr(fr.models, name)(fused=False, num_classes=5))
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
    """Not further from float64 than twice the plain 16-bit model; the dtype asked for comes out."""
    model, x = prepared(torchvision.models.resnet18(num_classes=7)).eval(), images(4)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(x.double())
        plain = copy.deepcopy(model).to(dtype)(x.to(dtype))
    frozen = fr.freeze(model, x, dtype=dtype, portable=portable)
    assert frozen(x).dtype == dtype
    assert relative(frozen(x), want) <= 2 * relative(plain, want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), frozen(x.to(torch.float32)))


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
    x = torch.randn(3, 8, 9, 7) + 0.5
    frozen = fr.freeze(wrap(block), x)
    assert len(blocks(frozen)) == 1 and relative(frozen(x), block(x)) < 1e-5
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
    assert left == {
        "layer2.0": "a BatchNorm2d without running statistics",
        "layer2.1": "a BatchNorm2d has hooks; the add behind bn2 (BatchNorm2d)",
    }


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
    """Another forward for images of another height."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.conv(x))
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
    turns = prepared(Turns()).eval()
    for size in (8, 6):
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


# ------------------------------------------------------------------------------------------------ other shapes, packing
def test_other_shapes(empty_is_nan):
    model = small()
    frozen = fr.freeze(model, images())
    for shape in ((1, 33, 47), (5, 64, 32), (2, 48, 48), (0, 48, 48)):
        x = torch.randn(shape[0], 3, *shape[1:]) * 1.3 + 0.4
        with torch.no_grad():
            want = model(x)
        assert frozen(x).shape == want.shape
        assert shape[0] == 0 or relative(frozen(x), want) < 1e-5, shape


@needs_extension
def test_packed_weights_are_as_many_as_layouts(monkeypatch):
    """Not as many as shapes; and what is remembered of shapes is bounded too."""
    model = small()
    frozen = fr.freeze(model, images())
    weights = [unit.weight for chain in blocks(frozen) for unit in chain]
    for n in (1, 2, 3):
        for size in range(32, 62, 6):
            frozen(torch.randn(n, 3, size, size))
    for w in weights:
        packs = frozen_forward._packs[w]
        assert 1 <= len(frozen_forward.packed_forms(w)) <= 4
        assert len(packs.found) > 4 or w.shape[1] == 3
    monkeypatch.setattr(frozen_forward, "SHAPES", 2)
    x = images(4)
    assert relative(frozen(x), model(x)) < 1e-5
    assert all(len(frozen_forward._packs[w].found) <= 2 for w in weights)


@needs_extension
def test_weights_packed_for_another_shape_serve():
    """oneDNN reorders what it finds in another layout."""
    from fused_resnet.backends import cpu

    conv, weight, bias = ConvSpec((1, 1), (0, 0)), torch.randn(48, 96, 1, 1), torch.randn(48)
    forms = [cpu.prepack(weight, conv, torch.randn(n, 96, s, s)) for n, s in ((1, 7), (8, 40), (3, 13))]
    x = torch.randn(2, 96, 21, 21).to(memory_format=torch.channels_last)
    want = aten.conv_bias_act(x, weight, bias, conv, Act(), None)
    for form in forms:
        assert relative(cpu.conv_bias_act(x, form, bias, conv, Act(), None), want) < 1e-5
        again = cpu.prepack(weight, conv, torch.randn(1, 96, 7, 7), forms)
        assert any(again is other for other in forms)


def test_new_values_are_packed_again():
    """load_state_dict, in-place changes and ``.data`` are seen; a dtype that was not frozen is an error."""
    x = images()
    one, other = fr.freeze(small(), x), fr.freeze(small(), x)
    want = other(x)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), want)
    unit = blocks(one)[1][1]
    unit.weight.mul_(2)
    doubled = one(x)
    assert relative(doubled, want) > 1e-3
    unit.weight.data = unit.weight.data / 2
    assert torch.equal(one(x), want)
    assert torch.equal(one.to("cpu")(x), want)
    with pytest.raises(RuntimeError, match="^dtype: frozen for torch.float32, got torch.float16"):
        one.half()
    assert torch.equal(one(x), want)


@needs_extension
def test_packed_weights_die_with_the_model():
    gc.collect()  # of earlier tests
    before = len(frozen_forward._packs)
    frozen = fr.freeze(small(), images())
    assert len(frozen_forward._packs) > before
    del frozen
    gc.collect()
    assert len(frozen_forward._packs) <= before


def test_threads(monkeypatch):
    """Eight threads that begin at once, nothing packed: the bits of single calls, each weight packed once a shape."""
    model = small()
    inputs = [torch.randn(n, 3, s, s) * 1.3 + 0.4 for n, s in ((1, 40), (2, 40), (4, 33), (3, 56))]
    frozen = fr.freeze(model, inputs[0])
    want = [frozen(x) for x in inputs]
    fresh = copy.deepcopy(frozen)
    packed: list[Any] = []
    cpu: Any = load("cpu")[0]
    if cpu is not None:
        prepack = cpu.prepack
        record = lambda w, conv, x, known: packed.append((id(w), x.shape)) or prepack(w, conv, x, known)  # noqa: E731
        monkeypatch.setattr(cpu, "prepack", record)
    wrong: list[Any] = []

    def serve(seed: int) -> None:
        order = random.Random(seed).choices(range(len(inputs)), k=10)
        try:
            wrong.extend(i for i in order if not torch.equal(fresh(inputs[i]), want[i]))
        except Exception as error:
            wrong.append(error)

    threads = [Thread(target=serve, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(packed) == len(set(packed)) and (cpu is None or packed)


# ------------------------------------------------------------------------------------------------ export
LOAD = """
import sys, torch
sys.modules["fused_resnet"] = None  # an import of it is an error
x, want = torch.load("data.pt")
portable = torch.export.load("portable.pt2").module()
for i, w in zip(x, want["portable"]):
    assert torch.allclose(portable(i), w, rtol=1e-5, atol=1e-5), "portable"
del sys.modules["fused_resnet"]
import fused_resnet
fused_resnet.small.SMALL["frozen"] = 0  # as in conftest.py
own = torch.export.load("own.pt2").module()
for i, w in zip(x, want["own"]):
    assert torch.equal(own(i), w), "own"
assert "torchvision" not in sys.modules
"""


def test_export_loads_in_another_process(tmp_path: Path):
    """Saved with a dynamic batch, loaded where nothing knows the model: ours with fused_resnet, portable without."""
    block = torchvision.models.resnet.BasicBlock
    model = prepared(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5)).eval()
    x = [images(n) for n in (2, 1, 5)]
    want = {}
    for name in ("own", "portable"):
        frozen = fr.freeze(model, x[0], portable=name == "portable")
        program = torch.export.export(frozen, (x[0],), dynamic_shapes=({0: BATCH},))
        namespaces = {str(n.target).split(".")[0] for n in program.graph.nodes if n.op == "call_function"}
        assert namespaces == ({"aten"} if name == "portable" else {"aten", "fused_resnet"})
        torch.export.save(program, tmp_path / f"{name}.pt2")
        want[name] = [frozen(i) for i in x]
        assert all(relative(w, model(i)) < 1e-5 for i, w in zip(x, want[name], strict=True))
    torch.save((x, want), tmp_path / "data.pt")
    root = str(Path(fr.__file__).parents[1])
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{LOAD}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.parametrize("portable", [False, True])
def test_export_with_dynamic_images(portable):
    model = prepared(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3, avg_down=True)).eval()
    frozen = fr.freeze(model, images(), portable=portable)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(frozen, (images(),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)).module()
    for shape in ((3, 3, 48, 64), (2, 3, 63, 49)):
        x = torch.randn(shape) * 1.3 + 0.4
        assert relative(program(x), model(x)) < 1e-5


def test_compile_in_one_graph():
    frozen = fr.freeze(small(), images())
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    for n in (2, 3):
        x = images(n)
        assert torch.equal(compiled(x), frozen(x))


def test_operator_keeps_its_word():
    """Schema, shapes, strides and aliases of fused_resnet::frozen, for a stem, option A and a pooled projection."""
    unit = UnitSpec(ConvSpec((1, 1), (1, 1), bias=True), batch_stats=False)
    strided = UnitSpec(ConvSpec((2, 2), (1, 1), bias=True), batch_stats=False)
    chains = [
        ChainSpec((strided,)),
        ChainSpec((strided, unit), ShortcutSpec("pad", stride=(2, 2), channels=24)),
        ChainSpec((unit,), ShortcutSpec("identity")),
    ]
    shapes = [(16, 3), (24, 16), (24, 24), (24, 24)]
    params = [t for k, c in shapes for t in (torch.randn(k, c, 3, 3) / 4, torch.randn(k))]
    x = torch.randn(2, 3, 19, 14) + 0.5
    args = (x, params, [chain.encode() for chain in chains])
    torch.library.opcheck(torch.ops.fused_resnet.frozen, args, test_utils=("test_schema", "test_faketensor"))
    got = torch.ops.fused_resnet.frozen(*args)
    assert relative(got, frozen_forward.plain_chains(x, params, chains)) < 1e-5


@pytest.mark.parametrize("shape", [(2, 24, 19, 14), (2, 24, 1, 1), (24, 1, 1)])
@pytest.mark.parametrize("act", ["relu", "identity"])
def test_operator_with_a_summand(shape, act):
    """``fused_resnet::frozen`` with a norm alone in front, on a slice, and somebody else's summand."""
    units = (
        UnitSpec(None, Act("silu"), batch_stats=False),
        UnitSpec(ConvSpec((1, 1), (1, 1), bias=True), Act(act), batch_stats=False),
    )
    chains = [ChainSpec(units, ShortcutSpec("tensor"))]
    params = [torch.randn(16), torch.randn(16), torch.randn(24, 16, 3, 3) / 4, torch.randn(24)]
    x, residual = torch.randn(2, 20, 19, 14)[:, 2:18] + 0.5, torch.randn(shape) * 1.3 + 0.4
    args = (x, params, [chain.encode() for chain in chains], residual)
    torch.library.opcheck(torch.ops.fused_resnet.frozen, args, test_utils=("test_schema", "test_faketensor"))
    h = torch.nn.functional.silu(x * params[0][:, None, None] + params[1][:, None, None])
    want = torch.nn.functional.conv2d(h, params[2], params[3], padding=1) + residual
    want = want.relu() if act == "relu" else want
    for run in (torch.ops.fused_resnet.frozen(*args), frozen_forward.plain_chains(x, params, chains, residual)):
        assert relative(run, want) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler: no g++ on this machine")
@pytest.mark.parametrize("portable", [False, True])
def test_aot_inductor(portable, tmp_path: Path):
    import torch._inductor

    model = prepared(nn.Sequential(torchvision.models.resnet.BasicBlock(8, 8), nn.AdaptiveAvgPool2d(1))).eval()
    x = torch.randn(2, 8, 12, 12) * 1.3 + 0.4
    frozen = fr.freeze(model, x, portable=portable)
    program = torch.export.export(frozen, (x,), dynamic_shapes=({0: BATCH},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for n in (2, 1, 5):
        x = torch.randn(n, 8, 12, 12) * 1.3 + 0.4
        assert relative(compiled(x), model(x)) < 1e-5


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


# ------------------------------------------------------------------------------------------------ CUDA graphs
class StandIns:
    """CUDA's streams, events and graphs for a CPU: a graph replays the function into what it wrote when recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
        self.log: list[str] = []
        self.fails = False
        said = lambda what: lambda *args: self.log.append(what)  # noqa: E731
        stream = SimpleNamespace(wait_stream=said("wait_stream"), wait_event=said("wait_event"))
        self.graphs = Graphs()

        class Graph:
            def replay(graph) -> None:
                self.log.append("replay")
                made = next(g for g in self.graphs._graphs.values() if g.graph is graph)
                made.out.copy_(function(made.x))

        class Recording(nullcontext):
            def __exit__(record, *error: Any) -> None:
                if self.fails:
                    raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(cuda_graphs, "_can_record", lambda x: True)
        for name, value in {
            "CUDAGraph": Graph,
            "Event": lambda: SimpleNamespace(record=said("record")),
            "Stream": lambda device: stream,
            "current_stream": lambda: stream,
            "device": lambda device: nullcontext(),
            "graph": lambda *args, **kwargs: Recording(),
            "graph_pool_handle": object,
            "stream": lambda other: nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_graphs_are_bounded_and_their_results_copies(monkeypatch):
    calls: list[tuple[int, ...]] = []

    def function(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return x.amax((2, 3)) * 2

    stand_ins = StandIns(monkeypatch, function)
    graphs = stand_ins.graphs
    x = torch.randn(2, 3, 4, 4)
    first = graphs(function, x)
    assert stand_ins.log[-3:] == ["wait_event", "replay", "record"], (
        "a call waits for the one before, and says when done"
    )
    assert len(calls) == 2 + 1 + 1, "warmed up, recorded, replayed"
    kept = first.clone()
    assert torch.equal(graphs(function, x + 1), function(x + 1))
    assert torch.equal(first, kept), "a later call must not write into an earlier result"
    with pytest.warns(UserWarning, match="others run without"):
        for n in range(3, 3 + cuda_graphs.SHAPES):
            x = torch.randn(n, 3, 4, 4)
            assert torch.equal(graphs(function, x), function(x))
    assert len(graphs._graphs) == cuda_graphs.SHAPES and f"{cuda_graphs.SHAPES} input shapes" in repr(graphs)
    assert len(copy.deepcopy(graphs)._graphs) == len(pickle.loads(pickle.dumps(graphs))._graphs) == 0


def test_what_cannot_be_recorded_runs_without(monkeypatch):
    function = lambda x: x * 2  # noqa: E731
    stand_ins = StandIns(monkeypatch, function)
    stand_ins.fails = True
    x = torch.randn(2, 3, 4, 4)
    with pytest.warns(
        UserWarning, match="^cuda_graph: this model can't be recorded .*not permitted when stream is capt"
    ):
        assert torch.equal(stand_ins.graphs(function, x), x * 2)
    assert torch.equal(stand_ins.graphs(function, x), x * 2)
    assert "not permitted" in repr(stand_ins.graphs) and "replay" not in stand_ins.log


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph_equals_eager(dtype):
    """Several shapes, a second call in between, results that stay, and threads on streams of their own."""
    model = prepared(torchvision.models.resnet18(num_classes=7)).eval().cuda()
    inputs = [images(n).cuda() for n in (2, 5, 1)]
    eager = fr.freeze(model, inputs[0], dtype=dtype)
    graphed = fr.freeze(model, inputs[0], dtype=dtype, cuda_graph=True)
    want = [eager(x) for x in inputs]
    got = [graphed(x) for x in inputs]
    assert graphed.graphs is not None and graphed.graphs.refused is None and "3 input shapes" in repr(graphed)
    wrong: list[int] = [i for i in range(3) if not torch.equal(got[i], want[i])]

    def serve(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in random.Random(seed).choices(range(3), k=20):
                if not torch.equal(graphed(inputs[i]), want[i]):
                    wrong.append(i)

    torch.cuda.synchronize()
    threads = [Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.gpu
def test_cuda_graph_of_what_asks_the_device():
    """A module that waits for a number from the device can't be recorded; later models can."""

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item()

    x = images().cuda()
    block = torchvision.models.resnet.BasicBlock(3, 3).cuda().eval()
    with pytest.warns(UserWarning, match="can't be recorded"):
        frozen = fr.freeze(nn.Sequential(block, Asks()), x, cuda_graph=True)
    torch.testing.assert_close(frozen(x), Asks()(block(x)), rtol=1e-2, atol=1e-2)
    assert "no CUDA graph" in repr(frozen)
    again = fr.freeze(nn.Sequential(block), x, cuda_graph=True)
    assert again.graphs is not None and again.graphs.refused is None
