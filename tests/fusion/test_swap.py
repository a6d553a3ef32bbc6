"""fuse, unfuse, explain: the model stays the user's own, and computes the same numbers."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from networks import images, narrow, prepared, relative, step
from torch import nn
from torchvision_shim import torchvision
from watching import rows, rows_of

import fused_resnet as fr

pytestmark = pytest.mark.usefixtures("one_thread", "every_warning")


# Ours has torchvision's modules and forwards: test_models.py, test_outputs_are_torchvisions_bit_for_bit.
@pytest.fixture(params=["torchvision", pytest.param("ours", marks=pytest.mark.full)])
def resnet18(request) -> nn.Module:
    torch.manual_seed(3)
    family = fr.models if request.param == "ours" else torchvision.models
    kwargs = {"fused": False} if request.param == "ours" else {}
    return prepared(narrow(family.resnet18(num_classes=7, **kwargs)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet50", {}),
        ("resnext50_32x4d", {}),
        ("wide_resnet50_2", {"width_per_group": 64}),
        ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
        ("resnet50", {"avg_down": True}),
        ("plain18", {}),
    ],
)
def test_training_equals_plain_in_double(name, options):
    """Output, every gradient and every running statistic of the whole network, in float64."""
    plain = prepared(getattr(fr.models, name)(fused=False, num_classes=5, **options)).double()
    fused = fr.fuse(copy.deepcopy(plain))
    x = images().double()
    (out, grads), (want, want_grads) = step(fused, x), step(plain, x)
    assert all(row.fused and not row.reason for row in fr.explain(fused).rows)
    assert relative(out, want) < 1e-9
    assert grads.keys() == want_grads.keys()
    for key, grad in want_grads.items():
        assert relative(grads[key], grad) < 1e-7, key
    for (key, got), (_, expected) in zip(fused.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(got, expected, msg=key)


@pytest.mark.parametrize("shortcut", ["A", "B", "C", None])
def test_cifar_networks_equal_plain(shortcut):
    plain = prepared(fr.models.cifar_resnet(8, shortcut=shortcut, fused=False)).double()
    fused = fr.fuse(copy.deepcopy(plain))
    x = (torch.randn(3, 3, 16, 16) + 0.3).double()
    (out, grads), (want, want_grads) = step(fused, x), step(plain, x)
    assert relative(out, want) < 1e-10
    assert max(relative(grads[k], g) for k, g in want_grads.items()) < 1e-7


def test_eval_equals_plain(resnet18):
    fused = fr.fuse(copy.deepcopy(resnet18)).eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), resnet18.eval()(x), rtol=1e-4, atol=1e-4)


def test_frozen_norms_inside_training(resnet18):
    """Norms in eval mode in a training network: gradients flow, statistics stay."""
    fused = fr.fuse(copy.deepcopy(resnet18)).double()
    plain = resnet18.double()
    x = images().double()
    results = []
    for model in (fused, plain):
        model.train()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        out = model(x)
        out.square().mean().backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_fuse_keeps_every_object(resnet18):
    """The very same modules, Parameters and buffers; an optimizer made before goes on working."""
    before = dict(resnet18.named_parameters()) | dict(resnet18.named_buffers())
    modules = dict(resnet18.named_modules())
    classes = {name: type(m) for name, m in modules.items()}
    optimizer = torch.optim.SGD(resnet18.parameters(), 0.1)
    assert fr.fuse(resnet18) is resnet18
    after = dict(resnet18.named_parameters()) | dict(resnet18.named_buffers())
    assert list(before) == list(after)
    assert all(after[name] is before[name] for name in before)
    assert all(m is modules[name] for name, m in resnet18.named_modules())
    assert all(isinstance(m, classes[name]) for name, m in resnet18.named_modules())
    weight = resnet18.layer1[0].conv1.weight.detach().clone()
    step(resnet18, images())
    optimizer.step()
    assert not torch.equal(weight, resnet18.layer1[0].conv1.weight)


def test_unfuse_restores(resnet18):
    """Classes, Parameter objects, and the plain outputs bit for bit."""
    classes = {name: type(m) for name, m in resnet18.named_modules()}
    parameters = {name: id(p) for name, p in resnet18.named_parameters()}
    x = images()
    with torch.no_grad():
        want = resnet18.eval()(x)
        fr.unfuse(fr.fuse(resnet18))
        assert {name: type(m) for name, m in resnet18.named_modules()} == classes
        assert {name: id(p) for name, p in resnet18.named_parameters()} == parameters
        assert torch.equal(resnet18(x), want)


def test_unfuse_torchvision_resnet50():
    model = torchvision.models.resnet50(num_classes=4).eval()
    classes = {name: type(m) for name, m in model.named_modules()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    x = images()
    with torch.no_grad():
        want = model(x)
        fr.unfuse(fr.fuse(model))
        assert torch.equal(model(x), want)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


def test_checkpoints_load_both_ways(resnet18):
    """strict=True from plain into fused and from fused into plain."""
    fused = fr.fuse(copy.deepcopy(resnet18))
    step(fused, images())
    resnet18.load_state_dict(fused.state_dict(), strict=True)
    other = fr.fuse(copy.deepcopy(resnet18))
    other.load_state_dict(resnet18.state_dict(), strict=True)
    assert list(fused.state_dict()) == list(resnet18.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), fused.state_dict().values(), strict=True))


def test_deepcopy_and_pickle(resnet18):
    """Copies of a fused model are fused, own their parameters, and can be unfused."""
    fused = fr.fuse(resnet18).eval()
    x = images()
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    with torch.no_grad():
        want = fused(x)
        for other in (
            copy.deepcopy(fused),
            pickle.loads(pickle.dumps(fused)),
            torch.load(buffer, weights_only=False),
        ):
            assert type(other) is type(fused)
            assert torch.equal(other(x), want)
            assert other.fc.weight is not fused.fc.weight
            assert "Fused" not in type(fr.unfuse(other).layer1[0]).__name__


def test_fusing_twice_changes_nothing(resnet18):
    fused = fr.fuse(resnet18)
    classes = [type(m) for m in fused.modules()]
    assert [type(m) for m in fr.fuse(fused).modules()] == classes


def test_fuse_before_or_after_train_and_dtype(resnet18):
    """.double(), .to(memory_format) and eval()/train() after fuse."""
    fused = fr.fuse(copy.deepcopy(resnet18)).double().to(memory_format=torch.channels_last)
    plain = copy.deepcopy(resnet18).double()
    x = images().double()
    for mode in (True, False, True):
        torch.testing.assert_close(fused.train(mode)(x), plain.train(mode)(x), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ what is left alone
def reasons(model: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in fr.explain(model).rows if not row.fused}


def assert_same_step(fused, plain):
    """Output and every gradient, in float64."""
    x = images().double()
    (out, grads), (want, want_grads) = step(fused.double(), x), step(plain.double(), x)
    assert relative(out, want) < 1e-9 and grads.keys() == want_grads.keys()
    assert max(relative(grads[key], grad) for key, grad in want_grads.items()) < 1e-7


@pytest.mark.parametrize("child", ["conv1", "bn1", "relu", "bn2"])
def test_hooks_on_children_before_fuse(resnet18, child):
    """They see what they see of the plain network; what they don't touch is in chains."""
    plain, seen = copy.deepcopy(resnet18), []
    for model in (resnet18, plain):
        getattr(model.layer2[0], child).register_forward_hook(lambda m, i, o: seen.append(o.clone()))
    fr.fuse(resnet18)
    assert_same_step(resnet18, plain)
    calls = len(seen) // 2
    assert calls == (2 if child == "relu" else 1)
    for got, want in zip(seen[:calls], seen[calls:], strict=True):
        assert relative(got, want) < 1e-9
    assert all(row.fused and not row.reason for row in fr.explain(resnet18).rows)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_after_fuse_are_honoured(resnet18, kind):
    """A hook that comes later on a child fires, before and after it the same chains run."""
    plain = copy.deepcopy(resnet18)
    fr.fuse(resnet18)
    x = images()
    before = rows_of(lambda: resnet18(x))
    plain.load_state_dict(resnet18.state_dict())
    calls = []
    handles = [
        getattr(model.layer3[1].conv2, f"register_{kind}_hook")(lambda *a: calls.append(1))
        for model in (resnet18, plain)
    ]
    assert_same_step(resnet18, plain)
    assert calls == [1, 1]
    for handle in handles:
        handle.remove()
    assert rows_of(lambda: resnet18.float()(x)) == before and calls == [1, 1]


def test_hooks_on_a_block_work(resnet18):
    """Forward, pre-forward and backward hooks on the fused block itself see what they saw before."""
    seen = {}
    block = fr.fuse(resnet18).layer2[1]
    block.register_forward_hook(lambda m, i, o: seen.update(out=o.shape))
    block.register_forward_pre_hook(lambda m, i: seen.update(x=i[0].shape))
    block.register_full_backward_hook(lambda m, gi, go: seen.update(grad=gi[0].shape))
    step(resnet18, images())
    assert seen["out"] == seen["x"] == seen["grad"]


def test_parametrized_and_weight_norm(resnet18):
    plain = copy.deepcopy(resnet18)
    for model in (plain, resnet18):
        torch.nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
        model.layer1[1].conv2 = torch.nn.utils.weight_norm(model.layer1[1].conv2)
    fr.fuse(resnet18)
    assert_same_step(resnet18, plain)
    assert all(row.fused for row in fr.explain(resnet18).rows), "the weight is computed, the convolution is one"


class Half(nn.Module):
    def forward(self, weight):
        return weight * 0.5


def test_parametrization_after_fuse_is_seen(resnet18):
    fr.fuse(resnet18)
    with torch.no_grad():
        resnet18.eval()(images())
    plain = fr.unfuse(copy.deepcopy(resnet18))
    for model in (resnet18, plain):
        torch.nn.utils.parametrize.register_parametrization(model.layer1[0].conv1, "weight", Half())
    assert_same_step(resnet18, plain)


class Twice(torchvision.models.resnet.BasicBlock):
    """A forward of its own around a known block's."""

    def forward(self, x):
        return super().forward(x) * 2


def test_subclassed_forward_is_what_runs():
    plain = prepared(nn.Sequential(Twice(8, 8), torchvision.models.resnet.BasicBlock(8, 8))).double()
    fused = fr.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x))
    assert isinstance(fused[0], Twice) and all(row.fused for row in fr.explain(fused).rows)


def test_unknown_modules_are_left(resnet18):
    """A norm, activation or padding that no chain knows: what is left of the block is fused."""
    resnet18.layer1[0].bn1 = nn.GroupNorm(4, 16)
    resnet18.layer1[1].relu = nn.Softsign()
    resnet18.layer2[0].downsample = nn.Sequential(*resnet18.layer2[0].downsample, nn.Dropout(0.0))
    resnet18.layer2[1].conv1.padding_mode = "reflect"
    plain = copy.deepcopy(resnet18)
    fr.fuse(resnet18)
    assert_same_step(resnet18, plain)
    with rows() as found:
        resnet18(images().double())
    # the stem; behind the GroupNorm a unit with the add; two, apart; three with the dropped shortcut apart; the padded
    # convolution is PyTorch's, its norm begins the next chain
    assert found[:1] == [[1]] and sum(map(sum, found)) == 19 and not reasons(resnet18)


def test_nothing_to_fuse():
    stranger = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    with pytest.warns(UserWarning, match="nothing in this Sequential"):
        fr.fuse(stranger)
    assert type(stranger) is nn.Sequential and not fr.explain(stranger).rows


def test_shared_modules(resnet18):
    resnet18.layer1[1].conv1 = resnet18.layer1[0].conv1
    plain = copy.deepcopy(resnet18)
    fr.fuse(resnet18)
    assert_same_step(resnet18, plain)
    assert not reasons(resnet18)


def test_instance_patch_is_called(resnet18):
    """Set before ``fuse`` or after it."""
    resnet18.layer1[0].forward = lambda x: x * 2
    plain = copy.deepcopy(resnet18)
    fr.fuse(resnet18)
    x = images()
    torch.testing.assert_close(resnet18.double()(x.double()), plain.double()(x.double()))
    assert "replaced" in reasons(resnet18)["layer1.0"]
    for model in (resnet18, plain):
        model.layer2[1].forward = lambda x: x * 3
    torch.testing.assert_close(resnet18(x.double()), plain(x.double()))


def test_patch_does_not_leak_to_the_class(resnet18):
    """Fusing one model leaves others of the same class plain."""
    other = copy.deepcopy(resnet18)
    fr.fuse(resnet18)
    assert all("Fused" not in type(m).__name__ for m in other.modules())


def test_explain_prints(resnet18):
    text = str(fr.explain(resnet18))
    assert "call fuse" in text and "\n0 of" in text
    text = str(fr.explain(fr.fuse(resnet18)))
    assert "not called yet" in text and "\n0 of" in text
    assert "9 of 9 fused" in str(fr.explain(resnet18, images())) and "not called yet" in str(fr.explain(resnet18))
    resnet18(images())
    text = str(fr.explain(resnet18))
    assert "9 of 9 fused" in text and "bn_act_max_pool" in text and "conv_backward 3x3" in text


@pytest.mark.parametrize("function", [fr.fuse, fr.unfuse, fr.explain])
def test_wrong_type(function):
    with pytest.raises(TypeError, match="model: expected an nn.Module, got list"):
        function([1])


# ------------------------------------------------------------------------------------------------ modules of our own
def test_residual_chain_module():
    """ConvBNAct and ResidualChain against the same children run plainly."""
    block = fr.ResidualChain(
        [fr.ConvBNAct(6, 8, 1), fr.ConvBNAct(8, 8, 3, stride=2, act="silu"), fr.ConvBNAct(8, 12, 1, act=("elu", 0.7))],
        shortcut=fr.ConvBNAct(6, 12, 1, stride=2, act=None),
    ).double()
    x = torch.randn(3, 6, 7, 7, dtype=torch.float64)
    plain = copy.deepcopy(block)
    h = x
    for i, u in enumerate(plain.units):
        h = u.bn(u.conv(h)) if i == 2 else u.act(u.bn(u.conv(h)))
    want = nn.functional.elu(h + plain.shortcut.bn(plain.shortcut.conv(x)), 0.7)
    torch.testing.assert_close(block(x), want)
    for (key, a), (_, b) in zip(block.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    block.units[0].conv.register_forward_hook(lambda *a: None)
    with pytest.raises(RuntimeError, match="has hooks"):
        block(x)


# ------------------------------------------------------------------------------------------------ torch.compile
def test_compile_fullgraph(resnet18):
    """No graph break, the same training step as eager, statistics included."""
    fused = fr.fuse(resnet18).to(memory_format=torch.channels_last)
    other = copy.deepcopy(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, grads = step(compiled, x)
    want, want_grads = step(other, x)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    for (key, a), b in zip(grads.items(), want_grads.values(), strict=True):
        assert relative(a, b) < 1e-3, key
    for (key, a), (_, b) in zip(fused.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
