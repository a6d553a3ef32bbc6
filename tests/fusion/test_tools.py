"""The tools of a training script, on a fused network as on the plain one: the same numbers come out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stack import State, both, images, loss_of, network, pair, state
from tolerances import assert_as_good
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.flop_counter import FlopCounterMode
from watching import Calls, saved_tensors

import fused_resnet as fr
from fused_resnet.fusion.swap import FusedModule

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


pytestmark = pytest.mark.usefixtures("every_warning")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def learn(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model(x))
    loss.backward()
    optimizer.step()
    return loss.detach()


# ------------------------------------------------------------------------------------------------ optimizers
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=True),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
        lambda p: torch.optim.AdamW(p, 1e-2, eps=1e-4, foreach=True),
        lambda p: torch.optim.AdamW(p, 1e-2, eps=1e-4, fused=True),
    ],
    ids=["sgd-foreach", "sgd-fused", "adamw-foreach", "adamw-fused"],
)
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_optimizers(make: Callable[[Any], torch.optim.Optimizer], fmt: torch.memory_format) -> None:
    """Three steps; weights in both layouts, with gradients in the weight's strides."""
    batches = [images().to(memory_format=fmt) for _ in range(3)]

    def run(model: nn.Module) -> State:
        model.to(memory_format=fmt)
        optimizer = make(model.parameters())
        losses = torch.stack([learn(model, x, optimizer) for x in batches])
        assert all(p.grad.stride() == p.stride() for p in model.parameters())
        return {"losses": losses}

    both(run)


def test_accumulation_and_clipping() -> None:
    """Two micro-batches per step, their gradients added, the norm clipped."""
    batches = [images() for _ in range(4)]

    def run(model: nn.Module) -> State:
        optimizer, norms = sgd(model), []
        for i, x in enumerate(batches):
            (loss_of(model(x)) / 2).backward()
            if i % 2:
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
                optimizer.step()
                optimizer.zero_grad()
        assert min(norms) > 0.1, "nothing was clipped"
        return {"norms": torch.stack(norms)}

    both(run)


def test_sharpness_aware_minimisation() -> None:
    """SAM (arXiv 2010.01412): two forwards and backwards per step, the parameters moved in place between them."""
    batches = [images() for _ in range(2)]

    def run(model: nn.Module) -> None:
        optimizer = sgd(model)
        for x in batches:
            loss_of(model(x)).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            with torch.no_grad():
                moved = [p.grad * (0.05 / norm) for p in model.parameters()]
                torch._foreach_add_(list(model.parameters()), moved)
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            with torch.no_grad():
                torch._foreach_sub_(list(model.parameters()), moved)
            optimizer.step()
            optimizer.zero_grad()

    both(run)


# ------------------------------------------------------------------------------------------------ averages of weights
def test_exponential_moving_average() -> None:
    """The averaged copy is fused too, averages buffers, and after each step evaluates as the plain model's average."""
    batches = [images() for _ in range(3)]

    def run(model: nn.Module) -> State:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
        assert type(average.module) is type(model)
        optimizer, outs = sgd(model), []
        for x in batches:
            learn(model, x, optimizer)
            average.update_parameters(model)
            with torch.no_grad():
                outs.append(average.eval()(x))
        return state(average) | {"outs": torch.stack(outs)}

    both(run)


def test_stochastic_weight_averaging() -> None:
    """SWA, then ``update_bn``: statistics anew, as a cumulative average over the data."""
    batches = [images() for _ in range(3)]

    def run(model: nn.Module) -> State:
        optimizer = sgd(model)
        average, schedule = AveragedModel(model), SWALR(optimizer, 0.02, anneal_epochs=2)
        for x in batches:
            learn(model, x, optimizer)
            average.update_parameters(model)
            schedule.step()
        update_bn(batches, average)
        assert all(m.momentum == 0.1 for m in average.modules() if isinstance(m, nn.BatchNorm2d))
        return state(average)

    both(run)


# ------------------------------------------------------------------------------------------------ autocast
def scaled_step(model: nn.Module, x: Tensor, dtype: torch.dtype, scaler: torch.amp.GradScaler) -> State:
    """Unscaled gradients, output and buffers of a step under autocast."""
    with torch.autocast("cpu", dtype):
        out = model(x)
        loss = loss_of(out.float())
    scaler.scale(loss).backward()
    scaler.unscale_(torch.optim.SGD(model.parameters(), 0.1))
    return {"out": out.detach()} | {n: v for n, v in state(model).items() if n.startswith("d ") or "running" in n}


@DTYPES
def test_autocast(dtype: torch.dtype) -> None:
    """Parameters and their gradients stay float32; every gradient is as near to float64's as plain PyTorch's."""
    plain, fused = (model.float() for model in pair())
    draws: list[tuple[State, State, State]] = []
    for _ in range(5):
        x = images(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        got, theirs = (scaled_step(copy.deepcopy(m), x, dtype, scaler) for m in (fused, plain))
        wide = copy.deepcopy(plain).double()
        out = wide(x.double())
        loss_of(out).backward()
        draws.append((got, theirs, state(wide) | {"out": out.detach()}))
    for name, value in draws[0][0].items():
        assert value.dtype == draws[0][1][name].dtype == (dtype if name == "out" else torch.float32), name
        assert_as_good(name, *([draw[i][name] for draw in draws] for i in range(3)), dtype)


@DTYPES
def test_grad_scaler_skips_infinite_steps(dtype: torch.dtype) -> None:
    """A scale that overflows skips the step and shrinks; the next step is taken, and ends as near to float64's as the
    plain network's. Every gradient shows the overflow, not only the classifier's."""

    def movement(model: nn.Module, before: list[Tensor]) -> Tensor:
        return torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])

    def stepped(model: nn.Module, x: Tensor) -> Tensor:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-117)
        optimizer = sgd(model)
        before, scales, moved = [p.detach().clone() for p in model.parameters()], [], []
        for factor in (1e3, 1.0):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = loss_of(model(x).float()) * factor
            scaler.scale(loss).backward()
            assert {bool(p.grad.isfinite().all()) for p in model.parameters()} == {factor == 1}
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            moved.append(bool(movement(model, before).any()))
        assert moved == [False, True] and scales == [2.0**10] * 2
        return movement(model, before)

    plain, fused = (m.float() for m in pair())
    draws = []
    for _ in range(5):
        x, exact = images(dtype=torch.float32), copy.deepcopy(plain).double()
        before = [p.detach().clone() for p in exact.parameters()]
        learn(exact, x.double(), sgd(exact))
        got, theirs = (stepped(copy.deepcopy(m), x) for m in (fused, plain))
        draws.append((got, theirs, movement(exact, before)))
    assert_as_good("step", *zip(*draws, strict=True), dtype)


# ------------------------------------------------------------------------------------------------ what is frozen
@pytest.mark.parametrize("bn", ["training", "frozen"])
def test_frozen_stem_and_stages_cost_no_backward(bn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """requires_grad_(False) on the stem and two stages: not one primitive of theirs runs in the backward, nor the
    gradient of the input of the first block that learns."""
    x, calls = images(), Calls(monkeypatch)

    def run(model: nn.Module) -> None:
        for part in (model.conv1, model.bn1, model.layer1, model.layer2):
            part.requires_grad_(False)
            part.train(bn == "training")
        loss_of(model(x)).backward()
        assert all((p.grad is None) == (n < "layer3" and not n.startswith("fc")) for n, p in model.named_parameters())

    both(run)
    # two blocks with three convolutions each: all want dW, and those of layer3.0 that read its input no dx
    assert sorted(calls.conv_backward) == [(False, True)] * 2 + [(True, True)] * 4


def test_a_linear_probe_costs_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the classifier frozen, in eval and in training mode: no chain keeps or computes anything backward."""
    x, calls = images(), Calls(monkeypatch)

    def run(model: nn.Module) -> None:
        model.requires_grad_(False)
        model.fc.requires_grad_(True)
        for mode in (False, True):
            with saved_tensors() as found:
                out = model.train(mode)(x)
            loss_of(out).backward()
            assert max(v.dim() for v in found.values()) == 2, "a chain kept an image"

    both(run)
    assert not calls.conv_backward


# ------------------------------------------------------------------------------------------------ pruning and the like
def test_flop_counter() -> None:
    """PyTorch's counter, whose hooks are on all modules, finds the same operations; in a frozen network too."""
    found = []
    for model in pair():
        with FlopCounterMode(display=False) as training:
            loss_of(model(images())).backward()
        found.append(training.get_flop_counts()["Global"])
    assert found[0] == found[1] and len(found[0]) > 2
    model = network().eval()
    for each in (model, fr.freeze(model, images())):
        with torch.no_grad(), FlopCounterMode(display=False) as evaluation:
            each(images())
        found.append(evaluation.get_flop_counts()["Global"])
    assert found[2] == found[3] and len(found[2]) == 2


def test_hooks_on_all_modules() -> None:
    """Hooks for all modules of a process see every layer's output; gone, chains run again."""
    x = images()

    def run(model: nn.Module) -> State:
        seen: list[Tensor] = []
        hook = lambda m, i, o: None if list(m.children()) else seen.append(o.detach().clone())  # noqa: E731
        handle = nn.modules.module.register_module_forward_hook(hook)
        try:
            learn(model, x, sgd(model))
        finally:
            handle.remove()
        learn(model, x, sgd(model))
        return {str(i): o for i, o in enumerate(seen)}

    both(run)


@pytest.mark.parametrize("child", ["conv1", "bn1", "relu", "maxpool"])
def test_hooks_on_the_stems_layers(child: str) -> None:
    """A hook that comes after ``fuse`` sees and changes what it would of the plain network."""
    x = images()

    def run(model: nn.Module) -> State:
        seen: list[Tensor] = []
        getattr(model, child).register_forward_hook(lambda m, i, o: (seen.append(o.detach().clone()), o * 2)[1])
        learn(model, x, sgd(model))
        return {str(i): o for i, o in enumerate(seen)}

    both(run)


def test_a_layer_whose_forward_was_replaced() -> None:
    """As quantization's and adapters' libraries do, on the object."""
    x = images()

    def run(model: nn.Module) -> State:
        conv = model.layer2[1].conv1
        conv.forward = lambda h, plain=conv.forward: plain(h) + h.tanh()
        return {"loss": learn(model, x, sgd(model))}

    both(run)


def test_pruning() -> None:
    """A pruned convolution has a hook that applies its mask: the masked weight learns, until it is made permanent."""
    from torch.nn.utils import prune

    x = images()

    def run(model: nn.Module) -> State:
        conv = model.layer1[0].conv2
        prune.l1_unstructured(conv, "weight", 0.5)
        outs = [learn(model, x, sgd(model))]
        prune.remove(conv, "weight")
        assert (conv.weight == 0).float().mean() == 0.5
        outs.append(learn(model, x, sgd(model)))
        return {"losses": torch.stack(outs)}

    plain, fused = pair()
    both(run, (plain, fused))
    assert all(row.fused for row in fr.explain(fused).rows)


def test_spectral_norm() -> None:
    """Parametrized after fuse: power iterations run once per forward, as in the plain network."""
    batches = [images() for _ in range(2)]

    def run(model: nn.Module) -> State:
        torch.nn.utils.parametrizations.spectral_norm(model.layer2[1].conv1)
        optimizer = sgd(model)
        return {"losses": torch.stack([learn(model, x, optimizer) for x in batches])}

    both(run)


def test_the_tests_can_fail() -> None:
    """``both`` sees a difference of one part in ten thousand in one gradient."""
    x = images()

    def run(model: nn.Module) -> None:
        loss_of(model(x)).backward()
        if isinstance(model, FusedModule):
            model.layer3[0].bn1.weight.grad.mul_(1 + 1e-4)

    with pytest.raises(AssertionError, match=r"d layer3\.0\.bn1\.weight"):
        both(run)
    plain = network()
    with pytest.raises(AssertionError):
        both(lambda model: loss_of(model(x)).backward(), (plain, copy.deepcopy(plain)))  # nothing was fused
