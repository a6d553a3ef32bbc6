"""The networks: torchvision's state_dict key for key, the paper's counts, shortcuts A, B and C, and every refusal."""

import itertools
import pickle
import sys
import types
from enum import Enum

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet import models
from fused_resnet.models import BasicBlock, Bottleneck, CifarResNet, PlainBlock, ResNet, ZeroPadShortcut

IN_TORCHVISION = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
IN_TORCHVISION += ["wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d"]


@pytest.fixture
def torchvision():
    from torchvision_shim import torchvision

    return torchvision


def shapes(model):
    return [(key, tuple(value.shape), value.dtype) for key, value in model.state_dict().items()]


def convs_and_norms(model):
    """Every convolution and norm outside the shortcuts, in order."""
    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    return [repr(m) for name, m in modules if "downsample" not in name]


def count(model):
    return sum(p.numel() for p in model.parameters())


def meta(name, **kwargs):
    with torch.device("meta"):
        return getattr(models, name)(fused=False, **kwargs)


@pytest.mark.parametrize("name", IN_TORCHVISION)
def test_state_dict_and_modules_are_torchvisions(torchvision, name):
    ours = meta(name)
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
    assert shapes(ours) == shapes(theirs)
    assert repr(ours) == repr(theirs)
    for attribute in ("inplanes", "dilation", "groups", "base_width"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_outputs_are_torchvisions_bit_for_bit(torchvision, name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=10)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    ours = getattr(models, name)(fused=False, num_classes=10, weights=theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
        assert torch.equal(ours.train()(x), theirs.train()(x))
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_same_seed_gives_torchvisions_initial_weights(torchvision):
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=10, zero_init_residual=True).state_dict()
    torch.manual_seed(3)
    ours = models.resnet18(fused=False, num_classes=10, zero_init_residual=True).state_dict()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("dilate", [(False, False, True), (False, True, True), (True, True, True), (True, False, True)])
def test_replace_stride_with_dilation_is_torchvisions(torchvision, dilate):
    with torch.device("meta"):
        theirs = torchvision.models.resnet50(replace_stride_with_dilation=dilate)
    ours = meta("resnet50", replace_stride_with_dilation=dilate)
    assert str(ours) == str(theirs)
    assert ours.layer4(torch.empty(1, 1024, 8, 8, device="meta")).shape[-1] == (8 if dilate[2] else 4)


def test_weights_from_mapping_and_from_file(tmp_path):
    torch.manual_seed(0)
    source = models.resnet20(fused=False)
    state = source.state_dict()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    for weights in (state, dict(state), path, str(path)):
        loaded = models.resnet20(fused=False, weights=weights).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
        assert all(loaded[key].data_ptr() != value.data_ptr() for key, value in state.items())


@pytest.mark.parametrize("spelling", ["IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "DEFAULT", "member"])
def test_weights_by_torchvisions_names(torchvision, monkeypatch, spelling):
    state = {key: value.fill_(0.5) for key, value in models.resnet18(fused=False).state_dict().items()}
    known = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(known, "get_state_dict", lambda self, progress, check_hash: state)
    weights = known.IMAGENET1K_V1 if spelling == "member" else spelling
    model = models.resnet18(fused=False, weights=weights)
    assert model.fc.out_features == 1000
    assert bool((model.layer4[1].conv2.weight == 0.5).all())
    with pytest.raises(ValueError, match=r"num_classes must be 1000 .*IMAGENET1K_V1, got 10"):
        models.resnet18(fused=False, weights=weights, num_classes=10)


def test_weights_of_another_network(torchvision):
    for weights in (torchvision.models.ResNet50_Weights.DEFAULT, "ResNet50_Weights.DEFAULT", "IMAGENET1K_V7"):
        with pytest.raises(ValueError, match=r"weights: resnet18 takes one of ResNet18_Weights\.IMAGENET1K_V1.*got"):
            models.resnet18(fused=False, weights=weights)


def test_weights_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r"weights='DEFAULT' names weights of torchvision.*or pass a path"):
        models.resnet18(fused=False, weights="DEFAULT")


@pytest.mark.parametrize("factory", [models.plain18, models.resnet20, models.plain110])
@pytest.mark.parametrize("weights", ["DEFAULT", Enum("Other", "A").A])
def test_weights_that_torchvision_does_not_have(factory, weights):
    with pytest.raises(ValueError, match=f"weights: torchvision has none for {factory.__name__}, expected a path"):
        factory(fused=False, weights=weights)


def test_weights_that_do_not_fit(tmp_path):
    state = models.resnet20(fused=False).state_dict()
    with pytest.raises(ValueError, match=r"weights don't fit resnet32 [\s\S]*Missing key.*layer1\.3\.conv1"):
        models.resnet32(fused=False, weights=state)
    with pytest.raises(ValueError, match=r"weights don't fit resnet20 [\s\S]*size mismatch for fc\.weight"):
        models.resnet20(fused=False, weights=state, num_classes=7)
    with pytest.raises(TypeError, match=r"weights must map names to tensors, got 'model': "):
        models.resnet20(fused=False, weights={"model": state})
    with pytest.raises(TypeError, match=r"weights must map names to tensors, got 0: Tensor"):
        models.resnet20(fused=False, weights={0: torch.zeros(1)})
    with pytest.raises(TypeError, match=r"weights must be None, a member .* a state_dict, got bool"):
        models.resnet20(fused=False, weights=True)
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "text.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"weights: .*text\.pt.* is not a state_dict saved by torch\.save"):
            models.resnet20(fused=False, weights=tmp_path / "text.pt")
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        models.resnet20(fused=False, weights=str(tmp_path / "absent.pt"))


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)]
)
def test_cifar_parameter_counts(depth, millions):
    model = meta(f"resnet{depth}")
    assert round(count(model) / 1e6, 2 if millions < 1 else 1) == millions
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth


@pytest.mark.parametrize("depth", [18, 34, 20, 32, 44, 56, 110])
def test_plain_twins(depth):
    plain, residual = meta(f"plain{depth}"), meta(f"resnet{depth}")
    assert shapes(plain) == [entry for entry in shapes(residual) if "downsample" not in entry[0]]
    assert convs_and_norms(plain) == convs_and_norms(residual)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in plain.modules()) == depth
    assert not any(isinstance(m, BasicBlock | ZeroPadShortcut) for m in plain.modules())


def test_plain_block_is_basic_block_minus_shortcut():
    torch.manual_seed(0)
    residual = BasicBlock(8, 8).eval()
    plain = PlainBlock(8, 8).eval()
    plain.load_state_dict(residual.state_dict())
    x = torch.randn(2, 8, 5, 7)
    before_relu = residual.bn2(residual.conv2(residual.relu(residual.bn1(residual.conv1(x)))))
    assert torch.equal(plain(x), before_relu.clamp_min(0))
    assert torch.equal(residual(x), (before_relu + x).clamp_min(0))


@pytest.mark.parametrize("shape", [(2, 4, 6, 8), (1, 4, 5, 7), (0, 4, 4, 4), (2, 4, 1, 1)])
@pytest.mark.parametrize(("stride", "channels"), [(2, 7), (1, 4), (3, 5), (2, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_option_a_by_hand(shape, stride, channels, layout):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    out = ZeroPadShortcut(stride, channels)(x)
    n, c, h, w = shape
    expected = torch.zeros(n, channels, -(-h // stride), -(-w // stride), dtype=torch.float64)
    for i, j in itertools.product(range(expected.shape[2]), range(expected.shape[3])):
        expected[:, :c, i, j] = x[:, :, i * stride, j * stride].detach()
    assert torch.equal(out, expected)
    if min(shape) > 1:
        assert out.is_contiguous(memory_format=layout)
    out.sum().backward()
    kept = torch.zeros(shape, dtype=torch.float64)
    kept[:, :, ::stride, ::stride] = 1
    assert torch.equal(x.grad, kept)


def test_option_a_has_no_parameters_and_does_not_alias():
    shortcut = ZeroPadShortcut(1, 4)
    assert not shortcut.state_dict()
    x = torch.randn(1, 4, 3, 3)
    assert shortcut(x).data_ptr() != x.data_ptr()
    assert repr(ZeroPadShortcut(2, 32)) == "ZeroPadShortcut(stride=2, out_channels=32)"


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_cifar_shortcuts(shortcut):
    model = models.resnet20(shortcut=shortcut, fused=False)
    blocks = [block for layer in (model.layer1, model.layer2, model.layer3) for block in layer]
    assert [type(b) for b in blocks] == [BasicBlock] * 9
    assert [b.conv1.stride[0] for b in blocks] == [1, 1, 1, 2, 1, 1, 2, 1, 1]
    for i, block in enumerate(blocks):
        if i not in (3, 6) and shortcut != "C":
            assert block.downsample is None
        elif shortcut == "A":
            assert isinstance(block.downsample, ZeroPadShortcut)
            assert (block.downsample.stride, block.downsample.out_channels) == (2, block.conv2.out_channels)
        else:
            projection, norm = block.downsample
            c_in, c_out, stride = block.conv1.in_channels, block.conv2.out_channels, block.conv1.stride
            expected = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            assert (repr(projection), repr(norm)) == (repr(expected), repr(nn.BatchNorm2d(c_out)))
    assert count(model) == 269_722 + {"A": 0, "B": 2752, "C": 14240}[shortcut]
    x = torch.randn(2, 3, 32, 32)
    x = model.relu(model.bn1(model.conv1(x)))
    sizes = []
    for layer in (model.layer1, model.layer2, model.layer3):
        x = layer(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    torch.testing.assert_close(model.fc(x.mean((2, 3))), model.fc(model.avgpool(x).flatten(1)))


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_cifar_bottlenecks(shortcut):
    with torch.device("meta"):
        model = CifarResNet(29, shortcut, block=Bottleneck)
    assert [type(b) for layer in (model.layer1, model.layer2, model.layer3) for b in layer] == [Bottleneck] * 9
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == 10
    assert model.fc.in_features == 256
    projected = [n for n, m in model.named_modules() if n.endswith("downsample") and isinstance(m, nn.Sequential)]
    changing = ["layer1.0.downsample", "layer2.0.downsample", "layer3.0.downsample"]
    assert projected == changing if shortcut == "B" else len(projected) == (9 if shortcut == "C" else 0)


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.ELU, lambda: nn.LeakyReLU(0.2)])
@pytest.mark.parametrize(("depth", "shortcut", "block"), [(8, None, None), (8, "B", None), (11, "A", Bottleneck)])
def test_cifar_activations_and_blocks_fused(act, depth, shortcut, block):
    """Every activation is the one that was asked for, and the fused network computes what the plain one does."""
    kwargs = {"shortcut": shortcut, "block": block, "act_layer": act, "in_channels": 1}
    plain = models.cifar_resnet(depth, fused=False, **kwargs).double()
    expected = repr(act())
    assert all(repr(m) == expected for n, m in plain.named_modules() if n.split(".")[-1] == "relu")
    assert not any(isinstance(m, nn.ReLU) for m in plain.modules())
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias, 0.3)
    fused = models.cifar_resnet(depth, weights=plain.state_dict(), **kwargs).double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64) * 2 + 1
    for model in (plain, fused):
        model(x).square().sum().backward()
    torch.testing.assert_close(fused(x), plain(x))
    rows = fr.explain(fused).rows
    assert rows and all(row.fused and not row.reason for row in rows)
    for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-6 * float(q.grad.abs().max()) + 1e-9)


def test_cifar_network_end_to_end():
    torch.manual_seed(0)
    model = models.cifar_resnet(8, shortcut="B", num_classes=7, in_channels=1, fused=False)
    out = model(torch.randn(2, 1, 15, 13))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert isinstance(models.cifar_resnet(8, shortcut=None, fused=False).layer1[0], PlainBlock)
    assert repr(models.cifar_resnet(20, fused=False)) == repr(models.resnet20(fused=False, shortcut="A"))


@pytest.mark.parametrize("name", ["resnet18", "plain18", "resnet20", "resnext50_32x4d"])
def test_he_initialisation(name):
    torch.manual_seed(0)
    for path, module in getattr(models, name)(fused=False).named_modules():
        if isinstance(module, nn.Conv2d):
            ratio = module.weight / (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            n = ratio.numel()
            assert abs(ratio.std() - 1) < 6 / (2 * n) ** 0.5, path
            assert abs(ratio.mean()) < 6 / n**0.5, path
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all() and (module.bias == 0).all()), path


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "resnet20"])
def test_zero_init_residual(name):
    model = getattr(models, name)(fused=False, zero_init_residual=True).eval()
    for block in model.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            norms = [block.bn1, block.bn2] + ([block.bn3] if isinstance(block, Bottleneck) else [])
            assert [n.weight.abs().max().item() for n in norms] == [1.0] * (len(norms) - 1) + [0.0]
    block = model.layer3[1]
    x = torch.rand(1, block.conv1.in_channels, 4, 4)
    assert torch.equal(block(x), x)


def test_avg_down():
    model = models.resnet50(fused=False, avg_down=True, num_classes=10)
    pools = [layer[0].downsample[0] for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]
    assert [type(p) for p in pools] == [nn.Identity] + [nn.AvgPool2d] * 3
    shortcut = model.layer2[0].downsample
    assert [k for k in shortcut.state_dict() if k.endswith("weight")] == ["1.weight", "2.weight"]
    x, pooled = torch.randn(2, 256, 5, 6), torch.empty(2, 256, 3, 3)
    for i, j in itertools.product(range(3), range(3)):
        pooled[:, :, i, j] = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))  # the last row has one pixel
    by_hand = torch.einsum("oc,nchw->nohw", shortcut[1].weight[:, :, 0, 0], pooled) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(shortcut.eval()(x), by_hand, rtol=1e-4, atol=1e-4)
    assert model(torch.randn(1, 3, 33, 47)).shape == (1, 10)
    dilated = meta("resnet50", avg_down=True, replace_stride_with_dilation=(False, False, True))
    assert isinstance(dilated.layer4[0].downsample[0], nn.Identity)


def test_norm_layer_and_other_options():
    grouped = meta("resnet18", norm_layer=lambda c: nn.GroupNorm(4, c), zero_init_residual=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in grouped.modules())
    plain_norm = meta("resnet20", norm_layer=lambda c: nn.BatchNorm2d(c, affine=False))
    assert plain_norm.bn1.weight is None
    custom = meta("resnet50", groups=2, width_per_group=48)
    assert (custom.layer1[0].conv2.groups, custom.layer1[0].conv2.out_channels) == (2, 96)
    assert shapes(meta("resnext50_32x4d")) == shapes(meta("resnet50", groups=32, width_per_group=4))
    assert meta("resnet34", num_classes=5).fc.out_features == 5


def test_list_models_and_exports():
    names = models.list_models()
    assert len(names) == len(set(names)) == 22
    assert set(names) | {"cifar_resnet", "list_models"} == {n for n in models.__all__ if n[0].islower()}
    assert set(IN_TORCHVISION) <= set(names)
    for name in names:
        factory = getattr(models, name)
        assert factory.__name__ == name
        assert pickle.loads(pickle.dumps(factory)) is factory
        for section in ("Args:", "Returns:", "Raises:", "arXiv"):
            assert section in factory.__doc__
    models.list_models().clear()
    assert models.list_models() == names


def test_fused_hands_the_network_to_fuse(monkeypatch):
    stub = types.ModuleType("fused_resnet.fusion.swap")
    stub.fuse = lambda model: ("fused", model)
    monkeypatch.setitem(sys.modules, "fused_resnet.fusion.swap", stub)
    state = models.resnet20(fused=False).state_dict()
    for factory in (models.resnet20, models.plain20, lambda **kw: models.cifar_resnet(20, **kw)):
        label, model = factory(weights=state)
        assert label == "fused"
        assert isinstance(model, CifarResNet)
        assert torch.equal(model.conv1.weight, state["conv1.weight"])
    with torch.device("meta"):
        assert models.resnet18()[0] == "fused"
        assert isinstance(models.resnet18(fused=False), ResNet)


# Refusals: each names the argument, what came and what was expected


def affine_free():
    return meta("resnet18", norm_layer=lambda c: nn.BatchNorm2d(c, affine=False), zero_init_residual=True)


def dilated_basic():
    return meta("resnet34", replace_stride_with_dilation=[False, True, True])


REFUSED = [
    (lambda: BasicBlock(8, 8, groups=2), ValueError, r"BasicBlock: groups must be 1, got 2; others need Bottleneck"),
    (lambda: BasicBlock(8, 8, base_width=128), ValueError, r"base_width \(width_per_group\) must be 64, got 128"),
    (lambda: PlainBlock(8, 8, dilation=2), ValueError, r"PlainBlock: dilation must be 1, got 2"),
    (lambda: BasicBlock(8, 16), ValueError, r"downsample=None .* needs stride 1 and 16 input .* inplanes 8"),
    (lambda: BasicBlock(8, 8, stride=2), ValueError, r"downsample=None .* got stride 2 and inplanes 8"),
    (lambda: Bottleneck(8, 8), ValueError, r"downsample=None .* 32 input channels .* inplanes 8"),
    (lambda: PlainBlock(8, 8, downsample=nn.Identity()), ValueError, r"downsample must be None .*got Identity\(\)"),
    (lambda: BasicBlock(0, 8), ValueError, r"BasicBlock: inplanes must be at least 1, got 0"),
    (lambda: BasicBlock(8, 8.0), TypeError, r"BasicBlock: planes must be an int, got 8\.0 of type float"),
    (lambda: Bottleneck(64, 16, stride=0), ValueError, r"Bottleneck: stride must be at least 1, got 0"),
    (lambda: Bottleneck(64, 16, dilation=-1), ValueError, r"Bottleneck: dilation must be at least 1, got -1"),
    (lambda: Bottleneck(64, 16, groups=True), TypeError, r"Bottleneck: groups must be an int, got True of type bool"),
    (lambda: Bottleneck(64, 16, base_width=3), ValueError, r"base_width \(width_per_group\) .*got 3, .*= 0 channels"),
    (lambda: meta("resnet18", groups=32), ValueError, r"groups must be 1, got 32"),
    (lambda: meta("plain34", width_per_group=128), ValueError, r"width_per_group\) must be 64, got 128"),
    (lambda: meta("resnet50", width_per_group="64"), TypeError, r"width_per_group\) must be an int, got '64'"),
    (lambda: meta("resnet50", num_classes=0), ValueError, r"num_classes must be at least 1, got 0"),
    (lambda: meta("resnet50", num_classes=None), TypeError, r"num_classes must be an int, got None of type NoneType"),
    (lambda: meta("resnet50", replace_stride_with_dilation=[True]), ValueError, r"or 3 bools .* got \[True\]"),
    (lambda: meta("resnet50", replace_stride_with_dilation=(0, 1, 2)), ValueError, r"3 bools .* got \(0, 1, 2\)"),
    (lambda: meta("plain18", avg_down=True), ValueError, r"avg_down=True needs .* a shortcut, got PlainBlock"),
    (dilated_basic, ValueError, r"replace_stride_with_dilation needs Bottleneck, got \[False, .*\] with BasicBlock"),
    (lambda: meta("plain18", zero_init_residual=True), ValueError, r"zero_init_residual=True needs residual blocks"),
    (affine_free, ValueError, r"zero_init_residual=True needs a norm_layer with a weight"),
    (lambda: ResNet("basic", [2, 2, 2, 2]), TypeError, r"block must be a block class .*got 'basic'"),
    (lambda: ResNet(nn.Linear, [2, 2, 2, 2]), TypeError, r"block must be a block class .*Linear"),
    (lambda: ResNet(BasicBlock, [2, 2, 2]), ValueError, r"layers must be 4 numbers .*got \[2, 2, 2\]"),
    (lambda: ResNet(BasicBlock, [2, 2, 2, 0]), ValueError, r"layers\[3\] must be at least 1, got 0"),
    (lambda: models.resnet18(fused="yes"), TypeError, r"fused must be a bool, got 'yes' of type str"),
    (lambda: models.resnet18(fused=False, depth=18), TypeError, r"unexpected keyword argument 'depth'"),
    (lambda: models.plain20(fused=False, shortcut="A"), TypeError, r"multiple values for argument 'shortcut'"),
    (lambda: CifarResNet(21), ValueError, r"depth must be 6n \+ 2 .*got 21"),
    (lambda: models.cifar_resnet(2, fused=False), ValueError, r"depth must be 6n \+ 2 with n at least 1 .*got 2"),
    (lambda: models.cifar_resnet(20.0, fused=False), TypeError, r"depth must be an int, got 20\.0 of type float"),
    (lambda: CifarResNet(20, "D"), ValueError, r'shortcut must be "A", "B", "C" or None .*got \'D\''),
    (lambda: CifarResNet(20, block="basic"), TypeError, r"block must be a block class .*got 'basic'"),
    (lambda: CifarResNet(20, block=nn.Linear), TypeError, r"block must be a block class .*Linear"),
    (
        lambda: CifarResNet(29, None, block=Bottleneck),
        ValueError,
        r"block=Bottleneck has a shortcut.*got shortcut=None",
    ),
    (lambda: CifarResNet(20, "A", block=PlainBlock), ValueError, r"block=PlainBlock has no shortcut.*got shortcut=.A."),
    (lambda: CifarResNet(21, block=Bottleneck), ValueError, r"depth must be 9n \+ 2 .*\(11, 20, 29, .*got 21"),
    (lambda: CifarResNet(20, in_channels=0), ValueError, r"in_channels must be at least 1, got 0"),
    (lambda: CifarResNet(20, num_classes="10"), TypeError, r"num_classes must be an int, got '10' of type str"),
    (lambda: CifarResNet(20, None, zero_init_residual=True), ValueError, r"zero_init_residual=True needs residual"),
    (lambda: ZeroPadShortcut(0, 4), ValueError, r"ZeroPadShortcut: stride must be at least 1, got 0"),
    (lambda: ZeroPadShortcut(2, None), TypeError, r"ZeroPadShortcut: out_channels must be an int, got None"),
    (lambda: ZeroPadShortcut(2, 4)(torch.zeros(1, 5, 2, 2)), ValueError, r"out_channels = 4, got \(1, 5, 2, 2\)"),
    (lambda: ZeroPadShortcut(2, 4)(torch.zeros(4, 2, 2)), ValueError, r"shape \(N, C, H, W\) .*got \(4, 2, 2\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_list_models_by_family() -> None:
    families = [models.list_models(family) for family in ("imagenet", "cifar")]
    assert families[0] + families[1] == models.list_models() and "resnet50" in families[0]
    assert "resnet110" in families[1]
    with pytest.raises(ValueError, match="family must be None, 'imagenet' or 'cifar', got 'mnist'"):
        models.list_models("mnist")
