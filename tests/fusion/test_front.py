"""What dynamo captures of a fused module, and what is said of it."""

from __future__ import annotations

import copy
import inspect
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from fused_resnet.chain import call as chain_call


class Layers(nn.Module):
    """conv -> norm twice; the forwards of subclasses say what is done with them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        for bn in (self.bn1, self.bn2):
            nn.init.uniform_(bn.weight, -1.5, 1.5)
            nn.init.normal_(bn.bias, 0.2, 0.5)
        self.double()


def x4() -> Tensor:
    return torch.randn(2, 4, 6, 5, dtype=torch.float64) * 1.3 + 0.4


def same_as_plain(plain: nn.Module, fused: nn.Module) -> int:
    """Output, gradients and buffers of one step are the same; returns how many chains ran."""
    x = x4()
    found = []
    with patch.object(chain_call, "run_row", wraps=chain_call.run_row) as rows:
        for net in (plain, fused):
            net.zero_grad()
            given = x.clone().requires_grad_()
            out = net(given)
            (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
            grads: list[Any] = [p.grad for p in net.parameters()]
            found.append([out, given, given.grad, *grads, *net.buffers()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    return sum(len(args[1]) for args, _ in rows.call_args_list)


class Broken(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        torch._dynamo.graph_break()
        return self.bn2(self.conv2(h))


def test_behind_a_graph_break_modules_have_their_own_names() -> None:
    """dynamo captures frames of inner modules then, and calls each one's self the root."""
    model = fr.fuse(nn.Sequential(nn.Identity(), Broken()))
    with patch.object(chain_call, "run_row", wraps=chain_call.run_row) as rows:
        model(x4())
    explained = {row.name: row.chains for row in fr.explain(model).rows}
    assert explained == {"1": 2}
    assert sum(len(args[1]) for args, _ in rows.call_args_list) == 2


class WrittenResidual(Layers):
    def forward(self, x: Tensor) -> Tensor:
        s = x * 2
        h = F.relu(self.bn1(self.conv1(x)) + s)
        return h + s.mul_(3)


class WrittenStart(Layers):
    def forward(self, x: Tensor) -> Tensor:
        s = x * 2
        scale = self.bn1.running_var.view(1, -1, 1, 1) + 0.5
        h = F.relu(s * scale + self.bn1.bias.detach().view(1, -1, 1, 1))
        return h + s.mul_(3)


class AddIntoView(Layers):
    def forward(self, x: Tensor) -> Tensor:
        s = x * 2
        view = s.view_as(s)
        view += self.bn1(self.conv1(x))
        return F.relu(view) * s


class WrittenBeta(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        with torch.no_grad():
            self.bn1.bias += 0.1
        return self.bn2(self.conv2(h))


@pytest.mark.parametrize("kind", [WrittenResidual, WrittenStart, AddIntoView, WrittenBeta])
def test_what_is_written_around_a_chain(kind: type[Layers]) -> None:
    """A chain keeps its summand for the backward, and plain PyTorch doesn't; what an add writes into others may see."""
    plain = kind()
    same_as_plain(plain, fr.fuse(copy.deepcopy(plain)))


class Patched(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)) + x)


def test_a_class_whose_forward_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Sequential(nn.Identity(), Patched())
    fused = fr.fuse(copy.deepcopy(plain))
    assert same_as_plain(plain, fused) == 1
    before = Patched.forward
    with monkeypatch.context() as patched:
        patched.setattr(Patched, "forward", lambda self, x: before(self, x) * 2)
        assert same_as_plain(plain, fused) == 1
        assert same_as_plain(plain[1], fused[1]) == 1
    assert same_as_plain(plain[1], fused[1]) == 1
    assert same_as_plain(plain, fused) == 1


class WithMethods(Layers):
    """Methods of every kind, a property, and one method that its class inherits."""

    def own(self, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def static(x: Tensor) -> Tensor:
        return x + 1

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return x * 3

    @property
    def number(self) -> float:
        return 0.5


class Inherits(WithMethods):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)) + x)
        return self.own(self.static(self.of_class(h))) * self.number


PATCHES: dict[str, tuple[type, str, Any]] = {
    "method": (WithMethods, "own", lambda self, x: x - 4),
    "override": (Inherits, "own", lambda self, x: x - 4),
    "static": (WithMethods, "static", staticmethod(lambda x: x - 4)),
    "class": (WithMethods, "of_class", classmethod(lambda cls, x: x - 4)),
    "property": (WithMethods, "number", property(lambda self: -4.0)),
}


@pytest.mark.parametrize("which", PATCHES)
def test_a_class_with_a_patched_method(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = nn.Sequential(nn.Identity(), Inherits()).eval(), x4()
    fused, frozen = fr.fuse(copy.deepcopy(plain)), fr.freeze(plain, x)

    def same() -> None:
        with torch.no_grad():
            for net in (fused, frozen):
                torch.testing.assert_close(net(x), plain(x), rtol=1e-9, atol=1e-9)

    same()
    owner, name, value = PATCHES[which]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, value, raising=False)
        same()
    same()


class Checkpointed(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x * 2, use_reentrant=False)

    def part(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)) + x)


def test_a_checkpoint_in_a_forward() -> None:
    """The checkpoint saves its inputs for the backward, and statistics, which change, are none of them."""
    plain = Checkpointed()
    fused, wanted = fr.fuse(copy.deepcopy(plain)), x4()
    grads = []
    for net in (plain, fused):
        x = wanted.clone().requires_grad_()
        out = net(x)
        buffers = [b.clone() for b in net.buffers()]
        out.sin().sum().backward()
        grads.append([out, x.grad, *buffers, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)
    assert fr.explain(fused).rows[0].chains == 1


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_norm_with_one_of_weight_and_bias(name: str) -> None:
    plain = Patched()
    setattr(plain.bn1, name, None)
    same_as_plain(plain, fr.fuse(copy.deepcopy(plain)))


class TwoActivations(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x))) + F.relu(x * 2)


def test_a_function_of_torch_in_a_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of a captured graph calls torch's functions by name: the wrapper would wrap itself."""
    plain = TwoActivations()
    fused = fr.fuse(copy.deepcopy(plain))
    same_as_plain(plain, fused)
    relu = F.relu
    monkeypatch.setattr(F, "relu", lambda x: relu(x) * 2)
    same_as_plain(plain, fused)


def test_an_input_that_a_chain_refuses_raises_pytorchs_error() -> None:
    """A norm in another dtype than its input, and too few channels: the types of PyTorch's own errors."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    plain[1].double()
    fused = fr.fuse(copy.deepcopy(plain))
    for x in (torch.randn(2, 3, 8, 8), torch.randn(2, 2, 8, 8), torch.randn(2, 3, 8, 8, dtype=torch.float64)):
        with pytest.raises(Exception) as want:  # noqa: B017
            plain(x)
        with pytest.raises(want.type) as got:
            fused(x)
        assert str(got.value) == str(want.value)
    assert fused[1].num_batches_tracked == plain[1].num_batches_tracked


@pytest.mark.parametrize("frozen", [False, True])
def test_hooks_that_others_imply_have_no_guard(frozen: bool) -> None:
    """A hook that comes later is called all the same, also one that takes the call's keywords."""
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    x, called = torch.randn(2, 3, 8, 8), []
    made: Any = fr.freeze(plain, x) if frozen else fr.fuse(copy.deepcopy(plain))
    made(x)
    (front,) = [made.front()] if frozen else made._fr_fronts.values()
    (captured,) = front.captured.values()
    guards = str(_debug_get_cache_entry_list(inspect.unwrap(captured).__code__)[0].guard_manager)
    without = {"_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"}
    without |= {"_backward_hooks", "_backward_pre_hooks"} if frozen else set()
    assert "._forward_hooks" in guards and "._forward_pre_hooks" in guards
    assert not [name for name in without if f".{name}" in guards]

    def answers(net: nn.Module, layers: Any) -> list[Any]:
        del called[:]
        handles = [
            layers[0].register_forward_hook(lambda m, args, kwargs, out: called.append("after"), with_kwargs=True),
            layers[2].register_forward_pre_hook(lambda m, args, kwargs: called.append("before"), with_kwargs=True),
            layers[1].register_forward_hook(lambda m, args, out: out + 1),
        ]
        with torch.no_grad():
            hooked = net(x)
            for handle in handles:
                handle.remove()
            return [list(called), hooked, net(x), list(called)]

    got, want = answers(made, made.model if frozen else made), answers(plain, plain)
    assert got[::3] == want[::3] == [["after", "before"]] * 2
    torch.testing.assert_close(got[1:3], want[1:3], rtol=1e-5, atol=1e-5)


def test_an_error_of_the_lowering_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo runs such a forward plain. A warning says why."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    fused = fr.fuse(copy.deepcopy(model))

    def chain_of_a_report(*args: Any) -> Any:
        raise TypeError("unhashable")

    monkeypatch.setattr("fused_resnet.fusion.report._chain", chain_of_a_report)
    monkeypatch.delenv("FUSED_RESNET_QUIET", raising=False)
    with pytest.warns(UserWarning, match="its graph was not lowered: TypeError: unhashable"):
        out = fused(x)
    torch.testing.assert_close(out, model(x))
