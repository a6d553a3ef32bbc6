"""The functional API under autograd and autocast, without gradients, and over steps of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functional_cases import (
    BOTH,
    LAYOUTS,
    LEARNT,
    TENSORS,
    Case,
    block,
    fused,
    image,
    in_float64,
    outcome,
    plain,
    unit,
)
from tolerances import assert_as_good
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from watching import composed

from fused_resnet import functional as fr
from fused_resnet.backends import BnAct, Call
from fused_resnet.functional import Unit
from fused_resnet.spec import PoolSpec


# ------------------------------------------------------------------------------------------------ autograd, autocast
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpointing_updates_statistics_once(backend: str, reentrant: bool) -> None:
    """Under gradient checkpointing the block runs twice, the running statistics move once, gradients are the same."""
    case = Case(image(3, 4, 6, 6), block(), shortcut="identity")
    plainly, again = case.clone(), case.clone()
    fused(plainly).square().sum().backward()
    checkpoint(lambda x: fused(replace(again, x=x)), again.x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(again.x.grad, plainly.x.grad)
    for a, b in zip(again.units, plainly.units, strict=True):
        assert torch.equal(a.running_mean, b.running_mean)
        assert torch.equal(a.running_var, b.running_var)
        torch.testing.assert_close(a.weight.grad, b.weight.grad)
        torch.testing.assert_close(a.bn_weight.grad, b.bn_weight.grad)


def test_a_forward_after_a_backward_updates_again(backend: str) -> None:
    """What tells a recomputation from a training step is being inside a backward pass, not having had one."""
    u = unit(None, 4)
    for _ in range(2):
        before = u.running_mean.clone()
        fused(Case(image(3, 4, 5, 5), [u])).sum().backward()
        assert not torch.equal(u.running_mean, before)


def second_order(way: Callable[[Case], Tensor], case: Case, scale: float = 1.0) -> list[Tensor]:
    """The gradients g of scale*|out|^2 by all that can learn, and those of |g|^2."""
    c = case.clone()
    out = way(c)
    leaves = [c.x, c.residual, *(getattr(u, n) for u in c.everyone for n in LEARNT)]
    leaves = list({id(v): v for v in leaves if v is not None and v.requires_grad}.values())
    first = torch.autograd.grad(out.square().sum() * scale, leaves, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]


@BOTH
@pytest.mark.parametrize("kind", ["block", "projection", "no_conv", "stem", "shared", "twice"])
def test_double_backward(backend: str, kind: str, training: bool) -> None:
    """Second derivatives are right, also where one tensor comes in twice (a residual that is x, a shared weight)."""
    x = image(3, 4, 5, 5, dtype=torch.float64)
    units = [in_float64(u) for u in block(training=training)]
    kernel = (torch.randn(4, 4, 3, 3, dtype=torch.float64) / 6).requires_grad_()
    case = {
        "block": lambda: Case(x, units, shortcut="identity"),
        "projection": lambda: Case(x, units, shortcut=in_float64(unit(4, 4, 1, act=None, training=training))),
        "no_conv": lambda: Case(
            x, [in_float64(unit(None, 4, training=training))], residual=x.detach().requires_grad_()
        ),
        "stem": lambda: Case(x, units[:1], max_pool=PoolSpec.make(3, 2, 1), recompute=True),
        "shared": lambda: Case(x, [in_float64(unit(None, 4, training=training))]),
        "twice": lambda: Case(x, [in_float64(unit(4, 4, training=training)) for _ in range(2)]),
    }[kind]()

    def tied(way: Callable[[Case], Tensor]) -> Callable[[Case], Tensor]:
        def call(c: Case) -> Tensor:
            if kind == "shared":
                c.residual = c.x
            if kind == "twice":
                for u in c.units:
                    u.weight = kernel
            return way(c)

        return call

    for got, want in zip(second_order(tied(fused), case), second_order(tied(plain), case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_double_backward_16_bit(backend: str, dtype: torch.dtype) -> None:
    """A gradient penalty in 16 bits is as good as plain PyTorch's."""
    results: list[list[list[Tensor]]] = [[], [], []]
    for _ in range(7):
        low = Case(image(3, 4, 6, 6, dtype=dtype), block(), shortcut="identity")
        for u in low.units:
            u.weight = u.weight.detach().to(dtype).requires_grad_()
        wide = replace(low, x=low.x.detach().double().requires_grad_(), units=[in_float64(u) for u in low.units])
        for found, way, case in zip(results, (fused, plain, plain), (low, low, wide), strict=True):
            found.append(second_order(way, case, 1e-2))
    for i in range(len(results[0][0])):
        got, theirs, want = ([draw[i] for draw in found] for found in results)
        assert_as_good(f"gradient {i}", got, theirs, want, dtype)


def test_same_tensor_twice(backend: str) -> None:
    """A residual that is x, and one weight in two units: the gradients of both places add up."""
    x, u = image(3, 4, 5, 5), unit(4, 4)
    for units, residual in (([unit(None, 4)], True), ([u, replace(u)], False)):
        results = []
        for way in (fused, plain):
            case = Case(x, units).clone()
            case.residual = case.x if residual else None
            if not residual:
                case.units[1].weight = case.units[0].weight
            leaf = [case.x] + ([] if residual else [case.units[0].weight])
            results.append(torch.autograd.grad(way(case).square().sum(), leaf))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_saved_tensor_changed_in_place(backend: str) -> None:
    """What the backward needs and somebody overwrote is an error, not a wrong gradient."""
    u = unit(4, 4, training=False)
    out = fused(Case(image(2, 4, 5, 5), [u]))
    u.running_mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["stem", "block", "projection", "no_conv"])
@BOTH
def test_autocast(backend: str, kind: str, dtype: torch.dtype, training: bool) -> None:
    """Under autocast: plain PyTorch's output dtype, fp32 gradients and statistics, errors at most twice its own."""
    cases: dict[str, Callable[[], Case]] = {
        "stem": lambda: Case(image(4, 8, 10, 9), [unit(8, 16, training=training)]),
        "block": lambda: Case(image(4, 8, 10, 9, dtype=dtype), block(8, 8, training=training), shortcut="identity"),
        "projection": lambda: Case(
            image(4, 8, 10, 9),
            [unit(8, 12, stride=2, training=training), unit(12, 16, training=training)],
            shortcut=unit(8, 16, 1, stride=2, act=None, training=training),
        ),
        "no_conv": lambda: Case(image(4, 8, 10, 9), [unit(None, 8, training=training)]),
    }
    draws = [cases[kind]() for _ in range(9)]
    got, low, want = [], [], []
    for case in draws:
        wide = replace(case, x=case.x.detach().double().requires_grad_(), units=[in_float64(u) for u in case.units])
        wide.shortcut = in_float64(case.shortcut) if isinstance(case.shortcut, Unit) else case.shortcut
        dout = torch.randn(plain(wide.clone()).shape)
        want.append(outcome(plain, wide, dout.double()))
        for way, results in ((fused, got), (plain, low)):

            def under_autocast(c: Case, way: Callable[[Case], Tensor] = way) -> Tensor:
                with torch.autocast("cpu", dtype):
                    return way(c)

            with torch.autocast("cpu", dtype):
                probe = way(case.clone())
            results.append(outcome(under_autocast, case, dout.to(probe.dtype)))
    for name in want[0]:
        assert got[0][name].dtype == low[0][name].dtype, name
        assert_as_good(name, *([r[name] for r in results] for results in (got, low, want)), dtype)
    assert got[0]["out"].dtype == (torch.float32 if kind == "no_conv" else dtype)


@BOTH
def test_autocast_leaves_norms_in_float32(backend: str, training: bool) -> None:
    """gamma and beta half-way between two bfloat16 numbers: they show in the outputs' deviation and mean."""
    u = unit(4, 6, act=None, training=training)
    x, between = image(8, 4, 20, 20).detach().bfloat16().float(), 1 + 2**-8
    with torch.no_grad():
        u.weight.copy_(u.weight.bfloat16())
        u.bn_weight.fill_(between)
        u.bn_bias.fill_(-between)
        y = F.conv2d(x, u.weight, padding=1)
        u.running_mean, u.running_var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    with torch.autocast("cpu", torch.bfloat16):
        out = fused(Case(x, [u])).double()
    want = torch.full((6,), between, dtype=torch.float64)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), want, rtol=0, atol=2**-10)
    torch.testing.assert_close(out.mean((0, 2, 3)), -want, rtol=0, atol=2**-10)


def test_autocast_leaves_float64_alone(backend: str) -> None:
    """Autocast never lowers fp64."""
    case = Case(image(2, 4, 5, 5, dtype=torch.float64), [in_float64(unit(4, 6))])
    want = fused(case.clone())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(case.clone()), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bn_dtype", ["fp32", "same"])
@BOTH
def test_16_bit_with_either_batchnorm(backend: str, bn_dtype: str, dtype: torch.dtype, training: bool) -> None:
    """16-bit x and weights with BatchNorm tensors in fp32 or in 16 bits too: every gradient in its tensor's dtype, and
    as near to float64's as plain PyTorch's."""
    draws = []
    for _ in range(9):
        u = unit(4, 6, training=training)
        u.weight = u.weight.detach().to(dtype).requires_grad_()
        if bn_dtype == "same":
            for name in TENSORS[1:5]:
                value = getattr(u, name)
                setattr(u, name, value.detach().to(dtype).requires_grad_(value.requires_grad))
        case = Case(image(3, 4, 5, 5, dtype=dtype), [u])
        dout = torch.randn(3, 6, 5, 5, dtype=dtype)
        got = outcome(fused, case, dout)
        assert got["out"].dtype == got["d x"].dtype == got["d 0.weight"].dtype == dtype
        for name in ("bn_weight", "bn_bias"):
            assert got[f"d 0.{name}"].dtype == getattr(u, name).dtype
        wide = replace(case, x=case.x.detach().double().requires_grad_(), units=[in_float64(u)])
        draws.append((got, outcome(plain, case, dout), outcome(plain, wide, dout.double())))
    for name in draws[0][2]:
        assert_as_good(name, *([draw[i][name] for draw in draws] for i in range(3)), dtype)


# ------------------------------------------------------------------------------------------------ inference, state
@BOTH
def test_no_grad_is_the_same(backend: str, training: bool) -> None:
    """Without gradients (folded inference included), in inference mode and with them: the same values."""
    for case in (
        Case(image(3, 4, 6, 6), block(training=training), shortcut="identity"),
        Case(image(3, 4, 6, 6), [unit(4, 5, training=training)], max_pool=PoolSpec.make(3, 2, 1)),
        Case(image(3, 4, 6, 6), [unit(None, 4, training=training)], residual=image(3, 4, 6, 6)),
    ):
        want = outcome(fused, case, None)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = outcome(fused, case, None)
            for name in want:
                torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


@BOTH
def test_output_is_nobody_elses(backend: str, training: bool) -> None:
    """The output shares no memory with an argument, even where the chain is the identity."""
    x = torch.randn(2, 3, 4, 4)
    for residual in (None, x):
        out = fr.bn_act(
            x, None, None, torch.zeros(3), torch.ones(3), residual=residual, act=None, training=training, eps=1e-5
        )
        assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_layout(backend: str, layout: str) -> None:
    """The output comes in x's layout, channels_last in channels_last."""
    fmt = LAYOUTS[layout]
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=fmt)
    for case in (
        Case(x, [unit(None, 4)]),
        Case(x, [unit(4, 4)]),
        Case(x, block(), shortcut="identity"),
        Case(x, [unit(4, 5)], max_pool=PoolSpec.make(3, 2, 1)),
        Case(x, block(training=False), shortcut="identity"),
    ):
        assert fused(case).is_contiguous(memory_format=fmt)
        with torch.no_grad():
            assert fused(case).is_contiguous(memory_format=fmt)


def test_statistics_untouched_after_an_error(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the last kernel of a block leaves the running statistics of the first unit as they were."""
    import fused_resnet.chain.forward

    case = Case(image(3, 4, 6, 6), block(), shortcut="identity")
    before = case.clone()
    real = fused_resnet.chain.forward.run

    def run(call: Call[Any]) -> Any:
        if isinstance(call, BnAct):
            raise RuntimeError("out of memory")
        return real(call)

    composed(monkeypatch)
    monkeypatch.setattr(fused_resnet.chain.forward, "run", run)
    with pytest.raises(RuntimeError, match="out of memory"):
        fused(case)
    for a, b in zip(case.units, before.units, strict=True):
        assert torch.equal(a.running_mean, b.running_mean) and torch.equal(a.running_var, b.running_var)


def test_steps_of_training(backend: str) -> None:
    """Ten SGD steps on a block: the same losses, weights and statistics as plain PyTorch."""
    case = Case(torch.randn(4, 4, 6, 6), block(), shortcut="identity")
    target = torch.randn(4, 4, 6, 6)
    losses: list[list[float]] = []
    ends = []
    for way in (fused, plain):
        c = case.clone()
        for u in c.units:
            for n in LEARNT[:3]:
                setattr(u, n, getattr(u, n).detach().clone().requires_grad_())
        optimizer = torch.optim.SGD([getattr(u, n) for u in c.units for n in LEARNT[:3]], 0.05, 0.9)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.mse_loss(way(c), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        ends.append([getattr(u, n) for u in c.units for n in TENSORS[:5]])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)
    assert losses[0][-1] < losses[0][0]
    for got, want in zip(*ends, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
