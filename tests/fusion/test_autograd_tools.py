"""Autograd's tools, on a fused network as on the plain one: the same gradients come out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from stack import State, both, images, loss_of, pair, state
from torch import Tensor, nn

from fused_resnet.fusion.swap import FusedModule

pytestmark = pytest.mark.usefixtures("every_warning")

CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "detect_anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "one thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "clone saved": lambda: torch.autograd.graph.saved_tensors_hooks(lambda v: v.clone(), lambda v: v),
    "nothing": nullcontext,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_around_a_step(name: str) -> None:
    x = images()

    def run(model: nn.Module) -> State:
        x.grad = None
        with CONTEXTS[name]():
            loss_of(model(x.requires_grad_())).backward()
        return {"dx": x.grad.clone()}

    both(run)


def test_hooks_on_parameters() -> None:
    """An optimizer per parameter that steps when its gradient has come, and a hook that scales gradients."""
    batches = [images() for _ in range(2)]

    def run(model: nn.Module) -> None:
        optimizers = {p: torch.optim.SGD([p], 0.05, momentum=0.9) for p in model.parameters()}

        def update(p: Tensor) -> None:
            optimizers[p].step()
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(update)
        model.layer1[0].conv1.weight.register_hook(lambda g: g * 0.5)
        for x in batches:
            loss_of(model(x)).backward()

    both(run)


def test_backward_twice() -> None:
    """retain_graph: the same gradients again, in every bit; without it PyTorch's own error."""
    _, fused = pair()
    loss = loss_of(fused(images()))
    loss.backward(retain_graph=True)
    once = state(fused)
    loss.backward()
    for name, p in fused.named_parameters():
        assert torch.equal(p.grad, 2 * once[f"d {name}"]), name
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_two_losses_of_one_forward() -> None:
    """Heads on features between the stages: gradients meet in the middle of a network."""
    x = images()

    def run(model: nn.Module) -> State:
        first = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
        second = model.layer2(first)
        grads = torch.autograd.grad(second.sin().sum(), [first, *model.layer1.parameters()], retain_graph=True)
        (second.square().mean() + first.cos().mean()).backward()
        return {str(i): g for i, g in enumerate(grads)}

    both(run)


@pytest.mark.parametrize("policy", ["save", "recompute"])
def test_selective_checkpointing(policy: str) -> None:
    """torch.utils.checkpoint with a policy that keeps the chains' results, or recomputes them: statistics once."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    x = images()
    keep = CheckpointPolicy.MUST_SAVE if policy == "save" else CheckpointPolicy.MUST_RECOMPUTE
    ops = {torch.ops.fused_resnet.chain.default, torch.ops.aten.convolution.default}

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(
            lambda ctx, op, *a, **k: keep if op in ops else CheckpointPolicy.PREFER_RECOMPUTE
        )

    def run(model: nn.Module) -> State:
        if not isinstance(model, FusedModule):
            out = model(x)  # PyTorch's own norms would be updated twice
        else:
            out = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        loss_of(out).backward()
        return {"out": out.detach()}

    both(run)


def test_profiler_names() -> None:
    """A profile shows the rows, forward and backward: one for the stem and one for each stage."""
    _, fused = pair()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss_of(fused(images())).backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["fused_resnet::chain"] == counts["fused_resnet::chain_backward"] == 5
