"""fuse derives a class from a module's own. Whatever that class, its metaclass and its hooks do, nothing of the user's
sees it happen, and the module computes, is copied, saved and given back as if it had not."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from class_kinds import (
    KINDS,
    Block,
    ByName,
    ComparesAttribute,
    ComparesItsClass,
    Concrete,
    CopiesItself,
    Counting,
    Interface,
    NeedsKeyword,
    SaysItsName,
    Unhashable,
)
from networks import prepared
from torch import Tensor, fx, nn
from traced import assert_same, images

import fused_resnet as fr
from fused_resnet.fusion.classes import FusedModule
from fused_resnet.fusion.swap import why_not_fused

pytestmark = pytest.mark.usefixtures("every_warning")


def randomised(m: nn.Module) -> nn.Module:
    """float64, with norms that a mistake can't hide behind; without PyTorch's walks, which need hashes."""
    m.double()
    for key, t in m.state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.rand_like(t) + 0.5 if key.endswith("var") else torch.randn_like(t) - 0.3)
    return m


def answers(m: nn.Module, x: Tensor) -> list[Tensor]:
    """In training, in evaluation after it, and what both leave."""
    found = [m.train()(x), m.eval()(x)]
    return [t.detach().clone() for t in (*found, *m.state_dict().values())]


def compare(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def loaded(m: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make", KINDS, ids=lambda k: getattr(k, "__name__", str(k)))
def test_kinds_of_classes(make: Any) -> None:
    """Fused, with plain's answers; so are its copies; unfused it is of the very class that it was; nobody was told."""
    with torch.no_grad():
        plain, m = randomised(make()), make().double()
        m.load_state_dict(plain.state_dict())
        cls, x = type(m), images()
        text = str([{**NeedsKeyword.known}, {**ByName.known}, [*Counting.made]])
        assert fr.fuse(m) is m and isinstance(m, FusedModule) and isinstance(m, cls)
        assert type(m).__name__ == cls.__name__ and type(type(m)) is type(cls)
        assert [row.fused for row in fr.explain(m, x).rows if row.name == "(model)"] == [True]
        state = {k: v.clone() for k, v in m.state_dict().items()}
        copies = [copy.deepcopy(m), pickle.loads(pickle.dumps(m)), loaded(m), copy.copy(m)]
        want = answers(plain, x)
        for n in (m, *copies):
            assert type(n) is type(m) and "_fr_fused" in n.__dict__ and "__setstate__" not in n.__dict__
            n.load_state_dict(state)  # copy.copy's shares its tensors
            compare(answers(n, x), want)
        assert fr.unfuse(m) is m and type(m) is cls and not any(name.startswith("_fr_") for name in m.__dict__)
        assert str([NeedsKeyword.known, ByName.known, Counting.made]) == text
        compare([m(x)], [want[1]])


@pytest.mark.parametrize("make", KINDS, ids=lambda k: getattr(k, "__name__", str(k)))
def test_kinds_of_classes_frozen(make: Any) -> None:
    """As children, too: fuse, freeze, explain and unfuse of what stands around them."""
    plain = nn.Sequential(randomised(make()), nn.Conv2d(4, 3, 1).double())
    x = images()
    with torch.no_grad():
        want = plain.eval()(x)
        frozen = fr.freeze(plain, x)
        torch.testing.assert_close(frozen(x), want)
        torch.testing.assert_close(copy.deepcopy(frozen)(x), want)
        fused = fr.fuse(plain)
        torch.testing.assert_close(fused(x), want)
        assert any(row.fused for row in fr.explain(fused).rows)
        torch.testing.assert_close(fr.freeze(fused, x)(x), want)
        torch.testing.assert_close(fr.unfuse(fused)(x), want)


def test_hooks_of_copies() -> None:
    """A class's own rules of copying are followed: they see their own class, and no state but theirs."""
    m = fr.fuse(CopiesItself())
    assert (copy.deepcopy(m).copies, copy.copy(m).copies, pickle.loads(pickle.dumps(m)).copies) == (1, 1, -1)
    outer = copy.deepcopy(nn.ModuleList([m, m]))
    assert outer[0] is outer[1] and isinstance(outer[0], FusedModule)


@pytest.mark.parametrize("cls", [ComparesItsClass, ComparesAttribute])
def test_forwards_that_compare_their_class(cls: type[nn.Module]) -> None:
    """Of a subclass the answer would be another: they stay plain."""
    model = fr.fuse(nn.Sequential(plain := prepared(cls()).double(), Block().double()))
    assert type(plain) is cls and isinstance(model[1], FusedModule)
    assert {row.name: row.reason for row in fr.explain(model).rows if not row.fused}["0"].endswith("class with others")


def test_a_name_asked_for_where_the_chain_does_not_run() -> None:
    """A block that runs plain, for a hook, gives the same answer."""
    plain = prepared(SaysItsName()).double()
    fused = fr.fuse(copy.deepcopy(plain))
    assert isinstance(fused, FusedModule)
    for m in (plain, fused):
        m.conv.register_forward_hook(lambda *_: None)
    assert_same(fused, plain, images())


def test_isinstance_of_abstract_classes() -> None:
    """A fused class has caches of its own: asking it does not change what its original answers."""
    plain, fused = Concrete(), fr.fuse(Concrete())
    assert not isinstance(plain, type(fused)) and isinstance(fused, Interface)
    assert isinstance(plain, Concrete) and isinstance(fused, Concrete) and isinstance(fused, type(fused))
    assert not isinstance(Block(), type(fused))


def test_instances_of_a_fused_class() -> None:
    """Made by ``type(m)(...)``, they run plain until they are fused."""
    m = fr.fuse(CopiesItself())
    other = type(m)()
    other = randomised(other)
    plain = CopiesItself().double()
    plain.load_state_dict(other.state_dict())
    assert "not fused yet" in fr.explain(other).rows[0].reason
    assert_same(other, plain, images())
    assert_same(fr.fuse(other), plain, images())
    assert fr.explain(other).rows[0].fused and type(fr.unfuse(other)) is CopiesItself


def test_classes_derived_from_a_fused_one() -> None:
    """``super()`` in them means the class itself, which unfuse therefore leaves; it runs plain."""
    parent: Any = type(fr.fuse(Block()))

    class Derived(parent):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    plain, m, x = prepared(Block()).double(), Derived().double(), images()
    m.load_state_dict(plain.state_dict())
    with torch.no_grad():
        want = plain.eval()(x) + 1
        assert "_fr_fused" in fr.fuse(m.eval()).__dict__
        torch.testing.assert_close(m(x), want)
        assert "_fr_fused" not in fr.unfuse(m).__dict__
        assert torch.equal(m(x), want)


def test_a_class_that_nobody_uses_any_more_goes() -> None:
    def use() -> weakref.ref[type]:
        class Local(Block):
            pass

        m = fr.fuse(Local())
        assert isinstance(m, FusedModule) and isinstance(copy.deepcopy(m), FusedModule)
        return weakref.ref(Local)

    gone = use()
    gc.collect()
    assert gone() is None


def test_a_module_that_holds_another_which_holds_it() -> None:
    """Cycles, which pickle and deepcopy handle, are cycles in the copies."""
    m = Block()
    m.others = [m, {"me": m}]  # type: ignore[assignment]
    fr.fuse(m)
    for n in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), loaded(m)):
        assert n.others[0] is n.others[1]["me"] is n is not m and type(n) is type(m)


# ------------------------------------------------------------------------------------------------ other children
def reasons(model: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in fr.explain(model).rows if not row.fused}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda m: torch.jit.trace(m.eval(), images())])
def test_torchscript_inside(compiled: Any) -> None:
    inner = prepared(nn.Sequential(Block())).double()
    plain = nn.Sequential(compiled(inner), prepared(Block()).double()).eval()
    x = images()
    with torch.no_grad():
        want = plain(x)
        fused = fr.fuse(plain)
        assert isinstance(fused[1], FusedModule) and isinstance(fused[0], torch.jit.ScriptModule)
        torch.testing.assert_close(fused(x), want)
        assert set(reasons(fused).values()) == {"TorchScript compiled it"}
        torch.testing.assert_close(fr.freeze(fused, x)(x), want)
        torch.testing.assert_close(fr.unfuse(fused)(x), want)
    with pytest.warns(UserWarning, match="nothing in this"):
        fr.fuse(compiled(inner))


def test_graph_modules() -> None:
    """Each has a class of its own, which changes when its graph does: then it runs what the graph now says."""
    plain = prepared(Block()).double()
    graph = fx.symbolic_trace(plain)
    fused = fr.fuse(copy.deepcopy(graph))
    assert isinstance(fused, FusedModule)
    for n in (fused, copy.deepcopy(fused), copy.copy(fused)):
        assert isinstance(n, FusedModule) and isinstance(n, fx.GraphModule)
        assert_same(copy.deepcopy(n), copy.deepcopy(plain), images())
    for node in fused.graph.nodes:
        if node.op == "output":
            with fused.graph.inserting_before(node):
                node.args = (fused.graph.call_function(torch.neg, (node.args[0],)),)
    fused.recompile()
    x = images()
    for m in (fused, fr.fuse(fused), fr.unfuse(fused)):
        torch.testing.assert_close(m(x), -plain(x))
    assert "_fr_original" not in dir(type(fused))


class Wide(nn.Module):
    """Layers that learn their sizes from the first input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.bn(self.conv(x)).relu())


def test_lazy_modules() -> None:
    plain, fused, x = Wide(), fr.fuse(Wide()), images().float()
    assert isinstance(fused.block, FusedModule) and not isinstance(fused, FusedModule)
    assert reasons(fused)
    plain(x)
    fused(x)
    fused.load_state_dict(plain.state_dict())
    fr.fuse(fused)
    assert all(row.fused for row in fr.explain(fused, x).rows)
    assert_same(fused.double(), plain.double(), x.double())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_modules() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no engine for quantized convolutions")

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.block, self.plain = quantization.QuantStub(), Block(), Block()
            self.dequant = quantization.DeQuantStub()
            self.plain.qconfig = None

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(self.dequant(self.block(self.quant(x))))

    m = prepared(Quantized()).eval()
    m.qconfig = quantization.get_default_qconfig("fbgemm")
    x = images().float()
    ready = quantization.prepare(m)
    ready(x)
    plain = quantization.convert(ready)
    with torch.no_grad():
        want = plain(x)
        fused = fr.fuse(plain)
        assert isinstance(fused.plain, FusedModule) and not isinstance(fused.block, FusedModule)
        torch.testing.assert_close(fused(x), want)
        assert "Quantized" in str(fr.unfuse(fused))


class Contrary(type):
    """Has no forward, for those who ask the class."""

    def __getattribute__(cls, name: str) -> Any:
        if name == "forward":
            raise RuntimeError("ask an instance")
        return super().__getattribute__(name)


class Hidden(Block, metaclass=Contrary):
    pass


class MroOfItsOwn(type):
    def mro(cls) -> list[type]:
        found = super().mro()
        if FusedModule in found:
            raise TypeError("this family is complete")
        return found


class Complete(Block, metaclass=MroOfItsOwn):
    pass


@pytest.mark.parametrize(("cls", "why"), [(Hidden, "ask an instance"), (Complete, "this family is complete")])
def test_one_child_spoils_nothing(cls: type[nn.Module], why: str) -> None:
    """Whatever a class raises when it is looked at, or derived from: it stays as it is, and explain says why."""
    plain = nn.Sequential(randomised(cls()), randomised(Block())).eval()
    x = images()
    with torch.no_grad():
        want = plain(x)
        fused = fr.fuse(copy.deepcopy(plain))
        assert type(fused[0]) is cls and isinstance(fused[1], FusedModule)
        torch.testing.assert_close(fused(x), want)
        assert why in str(why_not_fused(fused[0]))
        assert all(row.fused or row.reason for row in fr.explain(fr.freeze(plain, x)).rows)
        torch.testing.assert_close(fr.freeze(fused, x)(x), want)
        torch.testing.assert_close(fr.unfuse(fused)(x), want)
    with warnings.catch_warnings(record=True):
        fr.fuse(fused[0])


def test_a_module_without_a_hash() -> None:
    plain, m, x = randomised(Unhashable()), Unhashable().double(), images()
    m.load_state_dict(plain.state_dict())
    with warnings.catch_warnings(record=True):
        fr.fuse(m)
    compare(answers(m, x), answers(plain, x))
    for function in (fr.explain, fr.unfuse):
        function(m)
    compare(answers(m, x), answers(plain, x))
