"""A fused model on its way: to other devices and dtypes, through files and other processes, into threads."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from source_tree import SUPPORT
from stack import State, images, loss_of, network, pair, same, state
from torch import Tensor, nn
from watching import rows_of

import fused_resnet as fr
from fused_resnet.fusion.swap import FusedModule

LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import torchvision_shim
model, x = torch.load(sys.argv[2], weights_only=False)
model.train()
loss = model(x).square().mean()
loss.backward()
torch.save({"loss": loss.detach(), "d": model.conv1.weight.grad} | model.state_dict(), sys.argv[3])
"""


def step(model: nn.Module, x: Tensor) -> State:
    model.train()
    model.zero_grad()
    loss_of(model(x)).backward()
    return state(model)


def test_whole_model_into_another_process(tmp_path: Path) -> None:
    """torch.save of a fused torchvision model; a process that never called ``fuse`` loads and trains it, fused."""
    _, fused = pair()
    x = images()
    torch.save((fused, x), tmp_path / "model.pt")
    code = LOAD + "print(*(m._get_name() for m in (model, model.layer1, model.layer1[0])))"
    command = [sys.executable, "-c", code, str(SUPPORT), "model.pt", "after.pt"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["FusedResNet", "FusedSequential", "FusedBasicBlock"]
    loss = fused(x).square().mean()
    loss.backward()
    want = {"loss": loss.detach(), "d": fused.conv1.weight.grad} | fused.state_dict()
    same(torch.load(tmp_path / "after.pt"), want, rtol=1e-9)


@pytest.mark.parametrize("assign", [True, False])
def test_meta_device(assign: bool) -> None:
    """A fused model without memory: shapes of outputs and gradients; then memory, and weights into it."""
    plain, fused = pair()
    x = images()
    empty = copy.deepcopy(fused).to("meta")
    out = empty(x.to("meta"))
    loss_of(out).backward()
    assert out.shape == (4, 5) and all(p.grad.shape == p.shape for p in empty.parameters())
    assert all(b.device.type == "meta" for b in empty.buffers())
    empty.zero_grad(set_to_none=True)
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(copy.deepcopy(plain.state_dict()), assign=assign)
    assert isinstance(empty, FusedModule)
    same(step(empty, x), step(plain, x))


def test_dtype_and_layout_back_and_forth() -> None:
    """.float(), channels_last, .double() after fuse, between the steps of a training."""
    plain, fused = pair()
    x, features = images(), torch.randn(2, 8, 12, 12, dtype=torch.float64)
    found = []
    for model in (fused, plain):
        states = [step(model, x)]
        states.append(step(model.float().to(memory_format=torch.channels_last), x.float()))
        states.append(step(model.double(), x))
        assert all(p.dtype == torch.float64 for p in model.parameters())
        assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            states.append({"eval": model.eval()(x)})
        for mode in (False, True):  # the weights' layout decides
            assert model.train(mode).layer1(features).is_contiguous(memory_format=torch.channels_last)
        found.append(states)
    for i, (got, want) in enumerate(zip(*found, strict=True)):
        same(got, want, rtol=1e-2 if i == 1 else 1e-4 if i > 1 else 1e-6)  # the float32 step rounds the statistics


def test_inference_mode_before_training() -> None:
    """Nothing that inference keeps for later is a tensor of inference mode; outputs equal the plain network's."""
    plain, fused = pair()
    x = images()
    for model in (plain, fused):
        model.eval()
    with torch.inference_mode():
        got, want = fused(x), plain(x)
        assert got.is_inference()
        torch.testing.assert_close(got, want)
        for model in (plain, fused):  # statistics move in inference mode as well
            model.train()(x)
    same(step(fused, x), step(plain, x))


def in_threads(calls: list[object]) -> None:
    errors: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def guarded(call: object) -> None:
        try:
            start.wait()
            assert callable(call)
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_share_a_model_in_eval() -> None:
    """Two threads, inputs of two sizes, one of them on a backend of its own: every answer is the one given alone."""
    _, fused = pair()
    fused.eval()
    inputs = [images(2), images(3)[..., :40]]
    backends = ["aten", next(name for name in ("cpu", "aten") if fr.backends()[name] == "ok")]
    alone: list[Tensor] = []
    for x, backend in zip(inputs, backends, strict=True):
        with torch.no_grad(), fr.use_backend(backend):
            alone.append(fused(x))
    answers: list[list[Tensor]] = [[], []]

    def serve(i: int) -> None:
        with torch.no_grad(), fr.use_backend(backends[i]):
            for _ in range(5):
                answers[i].append(fused(inputs[i]))

    in_threads([lambda i=i: serve(i) for i in range(2)])
    for want, got in zip(alone, answers, strict=True):
        assert len(got) == 5 and all(torch.equal(g, want) for g in got)


def test_threads_share_the_first_call() -> None:
    """Two threads that are the first to call a fused model, a third one with the plain network."""
    plain, fused = (model.eval() for model in pair())
    x, answers = images(2), []

    def serve(model: nn.Module) -> None:
        for _ in range(3):
            answers.append(model(x).detach())

    in_threads([lambda model=model: serve(model) for model in (fused, fused, plain)])
    want = plain(x)
    assert len(answers) == 9
    for got in answers:
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    assert rows_of(lambda: fused(x)) == [1, 2, 2, 1, 1]


def replica(model: nn.Module) -> nn.Module:
    """As ``nn.DataParallel`` makes them: parameters are plain tensors that come of the model's own."""
    made = model._replicate_for_data_parallel()
    made._buffers.update(model._buffers)
    made._modules.update({name: replica(m) for name, m in model._modules.items() if m is not None})
    for name, p in model._parameters.items():
        if p is None:
            made._parameters[name] = None
        else:
            setattr(made, name, p.clone())
    return made


def test_replicas_and_copies_of_a_called_model() -> None:
    """They share or make anew what was captured, and run the same rows."""
    plain, fused = pair()
    same(step(fused, x := images()), step(plain, x))
    for _ in range(2):
        found = []
        for model in (fused, plain):
            model.zero_grad()
            loss_of(replica(model)(x)).backward()
            found.append(state(model))
        same(*found)
    for other in (copy.deepcopy(fused), copy.copy(fused), pickle.loads(pickle.dumps(fused)), replica(fused)):
        assert rows_of(lambda other=other: other(x)) == [1, 2, 2, 1, 1]


def test_threads_train_models_of_their_own() -> None:
    """Two trainings at once end where they end one after the other, in every bit."""
    _, fused = pair()
    models = [fused, fr.fuse(network())]
    batches = [[images(2), images(3)] for _ in models]

    def train(model: nn.Module, data: list[Tensor]) -> State:
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for x in data:
            step(model, x)
            optimizer.step()
        return state(model)

    want = [train(copy.deepcopy(model), data) for model, data in zip(models, batches, strict=True)]
    got: list[State] = [{}, {}]
    in_threads([lambda i=i: got[i].update(train(models[i], batches[i])) for i in range(2)])
    for g, w in zip(got, want, strict=True):
        assert all(torch.equal(g[key], w[key]) for key in w) and g.keys() == w.keys()
