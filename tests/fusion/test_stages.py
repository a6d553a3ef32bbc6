"""Stages of a fused network: their blocks run in rows, and nobody who looks can tell."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from networks import prepared
from stages import BasicBlock, images, same, stage, step
from tolerances import assert_as_good
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision_shim import torchvision
from watching import Calls, rows, rows_of, saved_tensors

import fused_resnet as fr
from fused_resnet.fusion.swap import FusedModule

pytestmark = pytest.mark.usefixtures("one_thread", "every_warning")


@pytest.fixture
def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """A stage and its fused twin."""
    plain = stage()
    return plain, fr.fuse(copy.deepcopy(plain))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ it is one row
def test_a_stage_is_one_row(pair: Any) -> None:
    plain, fused = pair
    assert isinstance(fused, FusedModule) and isinstance(fused, nn.Sequential)
    assert rows_of(lambda: step(copy.deepcopy(fused), images())) == [3]
    x = images()
    for _ in range(2):
        same(step(fused, x), step(plain, x))


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_batch_norm_options(options: dict[str, Any]) -> None:
    """Statistics and num_batches_tracked after three steps, and what eval mode makes of them."""
    plain = stage(**options)
    fused = fr.fuse(copy.deepcopy(plain))
    for _ in range(3):
        x = images()
        same(step(fused, x), step(plain, x))
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))


def test_networks_run_their_stages_in_rows() -> None:
    for model, expected in ((fr.models.resnet18(), [1, 2, 2, 2, 2]), (torchvision.models.resnet50(), [1, 3, 4, 6, 3])):
        fused = fr.fuse(model)
        assert rows_of(lambda fused=fused: fused(torch.randn(2, 3, 32, 32))) == expected


def test_eval_and_no_grad(pair: Any) -> None:
    """A training step without gradients runs a chain at a time, so that nothing is kept; frozen norms are one row."""
    plain, fused = pair
    x = images()
    with torch.no_grad():
        assert rows_of(lambda: fused(x)) == [1, 1, 1]
        torch.testing.assert_close(fused(x), plain(x))
        plain.load_state_dict(fused.state_dict())
        torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
        assert rows_of(lambda: fused(x)) == [3]
    assert rows_of(lambda: fused(x)) == [3]
    same(step(fused, x), step(plain, x))


@pytest.mark.parametrize("wanted", [True, False])
def test_what_learns_nothing_is_inference(pair: Any, wanted: bool) -> None:
    """In eval mode norms fold into the convolutions, also outside no_grad, unless somebody wants a gradient."""
    plain, fused = (model.eval().requires_grad_(wanted) for model in pair)
    x = images()
    ops = torch.ops.fused_resnet
    with (
        patch.object(ops, "chain", wraps=ops.chain) as chain,
        patch.object(ops, "chain_inference", wraps=ops.chain_inference) as inference,
    ):
        out = fused(x)
    assert (chain.call_count, inference.call_count) == ((1, 0) if wanted else (0, 1))
    torch.testing.assert_close(out, plain(x))


def test_one_block_with_frozen_norms(pair: Any) -> None:
    plain, fused = pair
    for model in pair:
        model[1].eval()
    x = images()
    same(step(fused, x), step(plain, x))
    assert rows_of(lambda: fused(x)) == [3]


def test_autocast() -> None:
    """The dtype that blocks called one by one return; values as near to float64's as plain PyTorch's."""
    fused = fr.fuse(stage()).float()
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = fused(x)
        alone = copy.deepcopy(fused)[0](x)
    assert out.dtype == alone.dtype == torch.bfloat16
    plain = fr.unfuse(copy.deepcopy(fused))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = copy.deepcopy(plain)(x)
    assert_as_good("out", [out], [theirs], [plain.double()(x.double())], torch.bfloat16)


# ------------------------------------------------------------------------------------------------ who looks, sees
def test_hooks_on_a_block_see_what_plain_blocks_show(pair: Any) -> None:
    """Input, output and gradients of a block with hooks are its own."""
    x = images()
    seen: list[list[Tensor]] = []
    for model in pair:
        mine: list[Tensor] = []
        seen.append(mine)
        model[1].register_forward_pre_hook(lambda m, i, to=mine: to.append(i[0].detach().clone()))
        model[1].register_forward_hook(lambda m, i, o, to=mine: to.append(o.detach().clone()))
        model[1].register_full_backward_pre_hook(lambda m, g, to=mine: to.append(g[0].clone()))
        model[1].register_full_backward_hook(lambda m, gi, go, to=mine: to.extend([gi[0].clone(), go[0].clone()]))
    plain, fused = pair
    same(step(fused, x), step(plain, x))
    assert len(seen[0]) == len(seen[1]) == 5
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert rows_of(lambda: fused(x)) == [1, 1, 1]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_comes_and_goes(pair: Any, kind: str) -> None:
    """It fires once per step; the row stays or falls apart into its blocks; gone, it leaves no trace."""
    _, fused = pair
    calls: list[int] = []
    step(fused, images())
    for n in (2, 4):
        handle = getattr(fused[0], f"register_{kind}_hook")(lambda *a: calls.append(1))
        for _ in range(2):
            row = rows_of(lambda: step(fused, images()))
            assert row == ([1, 1, 1] if "backward" in kind else [3])
        handle.remove()
        assert rows_of(lambda: step(fused, images())) == [3] and len(calls) == n


def test_a_hook_that_changes_the_output(pair: Any) -> None:
    for model in pair:
        model[1].register_forward_hook(lambda m, i, o: o * 2)
    x = images()
    same(step(pair[1], x), step(pair[0], x))


def test_hooks_on_the_stage_and_on_children(pair: Any) -> None:
    """Those that only look leave the row; one that changes what it sees splits the chain that it is in."""
    _, fused = pair
    calls: list[str] = []
    fused.register_forward_hook(lambda *a: calls.append("stage"))
    assert rows_of(lambda: fused(images())) == [3] and calls == ["stage"]
    handle = fused[0].conv2.register_forward_hook(lambda *a: calls.append("child"))
    assert rows_of(lambda: fused(images())) == [3] and calls == ["stage", "child", "stage"]
    handle.remove()
    fused[0].conv2.register_forward_hook(lambda m, i, o: o * 2)
    with rows() as found:
        fused(images())
    assert found == [[1], [1], [1], [2, 2]]  # the first unit, the shortcut, the norm with the add; the rest


def test_a_replaced_forward_is_called(pair: Any) -> None:
    _, fused = pair
    called: list[int] = []
    real = fused[1].forward
    fused[1].forward = lambda x: (called.append(1), real(x))[1]
    fused(images())
    assert called == [1]
    del fused[1].forward

    class Mine(type(fused[2])):  # type: ignore[misc]
        def __call__(self, x: Tensor) -> Tensor:
            called.append(2)
            return super().__call__(x)

    fused[2].__class__ = Mine
    fused(images())
    assert called == [1, 2]


def test_a_compiled_block(pair: Any) -> None:
    """What the compiler is given is the plain block, called by itself; inside the stage it is captured like others."""
    plain, fused = pair
    fused[2].compile(backend="eager")
    x = images()
    same(step(fused, x), step(plain, x))
    assert rows_of(lambda: fused(x)) == [3]
    x = images()[:, :1].expand(-1, 6, -1, -1)
    torch.testing.assert_close(fused[2](x), plain[2](x))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_block_that_comes_twice(momentum: float | None) -> None:
    """The second visit finds the first one's statistics."""
    block = BasicBlock(4, 4, norm_layer=lambda c: nn.BatchNorm2d(c, momentum=momentum)).double()
    plain = nn.Sequential(block, BasicBlock(4, 4).double())
    fused = fr.fuse(copy.deepcopy(plain))
    for model in (plain, fused):
        model.append(model[0])
    x = images()
    for _ in range(2):
        same(step(fused, x), step(plain, x))
    assert rows_of(lambda: fused(x)) == ([3] if momentum is not None else [1])


class Looks(nn.Module):
    """A convolution and a norm that are called twice, statistics that are read in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.conv(x))
        mean = self.bn.running_mean * 1.0
        h = torch.relu(h) + mean.view(4, 1, 1)
        return torch.relu(self.bn(self.conv(h)))


def test_statistics_that_are_read_on_the_way() -> None:
    """The first visit updates them before anybody looks; the second one may be a chain."""
    plain = prepared(Looks()).double()
    fused = fr.fuse(copy.deepcopy(plain))
    x = images()
    for _ in range(2):
        same(step(fused, x), step(plain, x))
    assert rows_of(lambda: fused(x)) == [1]


def test_other_modules_between(pair: Any) -> None:
    plain = nn.Sequential(*stage(2), nn.Dropout(0.0), *stage(4)[1:], nn.ReLU())
    fused = fr.fuse(copy.deepcopy(plain))
    x = images()
    assert rows_of(lambda: fused(x)) == [2, 3]
    plain.load_state_dict(fused.state_dict())
    same(step(fused, x), step(plain, x))


# ------------------------------------------------------------------------------------------------ it stays a Sequential
def test_index_slice_iterate(pair: Any) -> None:
    plain, fused = pair
    x = images()

    def loop(model: nn.Sequential) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            for block in model:
                x = block(x)
            return x

        return call

    same(step(fused, x, loop(fused)), step(plain, x))
    # a slice is a new nn.Sequential at each call: capturing it would cost more than its row saves
    assert rows_of(lambda: fused[:2](x)) == [1, 1] and rows_of(lambda: fused[0](x)) == [1]
    assert list(fused.state_dict()) == list(plain.state_dict()) and len(fused) == 3
    plain.load_state_dict(fused.state_dict())
    for model in (fused, plain):
        model.append(model[1])
    same(step(fused, x), step(plain, x))
    assert rows_of(lambda: fused(x)) == [4]


def test_copies_and_unfuse(pair: Any) -> None:
    plain, fused = pair
    x = images()
    with torch.no_grad():
        want = fused.eval()(x)
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert type(other) is type(fused) and torch.equal(other(x), want)
            assert type(fr.unfuse(other)) is nn.Sequential and type(other[0]) is BasicBlock
        torch.testing.assert_close(other(x), want)
    assert isinstance(fr.fuse(fused), FusedModule)


def test_functional_call(pair: Any) -> None:
    """Somebody else's parameters are used, others in each call, and get the gradients; then the module's own again."""
    plain, fused = pair
    for scale in (1.1, 0.8):
        given = {n: (p.detach() * scale + 0.01).requires_grad_() for n, p in plain.named_parameters()}
        x, found = images(), []
        for model in pair:
            out = torch.func.functional_call(model, given, (x,))
            found.append(torch.autograd.grad(out.sin().sum(), list(given.values())))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    same(step(fused, x), step(plain, x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", ["stage", "block"])
def test_checkpoint(pair: Any, what: str, reentrant: bool) -> None:
    """Around a stage or one of its blocks: the same gradients, statistics updated once."""
    plain, fused = pair

    def call(x: Tensor) -> Tensor:
        if what == "stage":
            return checkpoint(fused, x, use_reentrant=reentrant)  # type: ignore[no-any-return]
        return fused[1:](checkpoint(fused[0], x, use_reentrant=reentrant))  # type: ignore[no-any-return]

    x = images()
    same(step(fused, x, call), step(plain, x))


def test_double_backward(pair: Any) -> None:
    plain, fused = pair
    found = []
    x = images().requires_grad_()
    for model in pair:
        (dx,) = torch.autograd.grad(model(x).sigmoid().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), list(model.parameters()), allow_unused=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


# ------------------------------------------------------------------------------------------------ what it costs
def frozen_blocks(model: nn.Sequential, blocks: int) -> nn.Sequential:
    for block in model[:blocks]:
        block.requires_grad_(False)
    return model


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_blocks_without_gradients(pair: Any, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks at the start that learn nothing: nothing of them is kept, nothing computed backward."""
    plain, fused = (frozen_blocks(model, blocks) for model in pair)
    x = images()
    calls = Calls(monkeypatch)
    kept = []
    for model in (fused, fused):
        with saved_tensors() as found:
            out = model(x) if kept else loop_over(model, x)
        kept.append(sorted(v.untyped_storage().nbytes() for v in found.values()))
    assert kept[0] == kept[1], "a row keeps what blocks called one by one keep"
    assert out.requires_grad == (blocks < 3)
    if blocks < 3:
        out.sum().backward()
        # two convolutions in each block that learns; the first one's input wants no gradient
        assert len(calls.conv_backward) == 2 * (3 - blocks) and calls.conv_backward[-1] == (False, True)
    plain.load_state_dict(fused.state_dict())
    fused.zero_grad()
    if blocks < 3:
        for model in (plain, fused):
            model.zero_grad()
            model(x).sin().sum().backward()
        for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad)


def loop_over(model: nn.Sequential, x: Tensor) -> Tensor:
    for block in model:
        x = block(x)
    return x


def test_memory_of_a_training_step(pair: Any) -> None:
    """To the byte what the same blocks keep one by one."""
    _, fused = pair
    kept = []
    for call in (fused, lambda x: loop_over(fused, x)):
        with saved_tensors() as found:
            call(images())
        kept.append(sorted(v.untyped_storage().nbytes() for v in found.values()))
    assert kept[0] == kept[1]


def raised(model: nn.Module, x: Any) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as error:  # noqa: PT011  the plain network's, whatever it is
        model(x)
    return error.type, str(error.value)


ERRORS: dict[str, Callable[[], Any]] = {
    "channels": lambda: images()[:, :3],
    "dtype": lambda: images().float(),
    "dimensions": lambda: images()[0, 0],
    "no tensor": lambda: None,
    "one value": lambda: images(1)[..., :1, :1],
}


@pytest.mark.parametrize("first", [True, False])
def test_errors_are_the_plain_networks(first: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Type, text, and what the plain network's own error leaves of its state; nothing is printed, and the call after
    each runs chains again."""
    plain = stage()
    fused = fr.fuse(copy.deepcopy(plain))
    if not first:
        same(step(fused, x := images()), step(plain, x))
    for make in ERRORS.values():
        x = make()
        assert raised(fused, x) == raised(plain, x)
        for (name, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
    assert capfd.readouterr().err == ""
    x = images()
    assert rows_of(lambda: same(step(fused, x), step(plain, x))) == [3]


def test_an_error_inside_leaves_the_stage_as_it_was(pair: Any) -> None:
    plain, fused = pair
    for model in pair:
        model[2].conv1 = nn.Conv2d(5, 6, 3, padding=1, bias=False).double()
    x = images()
    assert raised(fused, x) == raised(plain, x)
    for model in pair:
        model[2].conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False).double()
    fused.load_state_dict(plain.state_dict())
    assert rows_of(lambda: same(step(fused, x), step(plain, x))) == [3]


def test_explain_names_who_closes(pair: Any) -> None:
    _, fused = pair
    fused(images())
    rows = {row.name: row for row in fr.explain(fused).rows}
    assert set(rows) == {"0", "1", "2"} and all(row.fused for row in rows.values())
    assert rows["0"].backends["bn_act_backward"] == "in conv_backward of 1"
    assert rows["1"].backends["bn_act_backward"] == "in conv_backward of 2"
    assert "conv_backward" not in rows["2"].backends["bn_act_backward"]


# ------------------------------------------------------------------------------------------------ torch.compile
def test_compile(pair: Any, fresh_compiler: None) -> None:
    """The compiler is given the plain network, without a graph break; this package's backend finds the row in it."""
    plain, fused = pair
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    from fused_resnet.fusion.front import backend

    record = AotEagerAndRecordGraphs()
    compiled = torch.compile(fused, fullgraph=True, backend=record)
    x = images()
    assert not rows_of(lambda: same(step(fused, x, compiled), step(plain, x)))
    assert not any("fused_resnet" in str(n.target) for g in record.fw_graphs for n in g.graph.nodes)
    compiled = torch.compile(plain, fullgraph=True, backend=backend)
    x = images()
    assert rows_of(lambda: same(step(plain, x, compiled), step(fused, x))) == [3, 3]
