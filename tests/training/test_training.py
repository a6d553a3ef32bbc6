"""The training loop: bit-exact resumption, the schedule, averages, several processes, fused beside plain."""

from __future__ import annotations

import copy
import csv
import logging
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import training_child
from source_tree import ROOT, SUPPORT
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training_child import RECIPE, STEPS, made_up_data

from fused_resnet import models
from fused_resnet.training import Callback, ImageData, Recipe, ResumeError, Trainer, checkpoint, data, named
from fused_resnet.training.logs import logger

pytestmark = pytest.mark.usefixtures("one_thread")


def child(*words: object, processes: int = 0) -> subprocess.Popen[str]:
    """``training_child.py``, alone or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *torchrun, *map(str, words)]
    environ = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def linear(found: ImageData) -> nn.Module:
    """The least network."""
    return nn.Sequential(nn.Flatten(), nn.Linear(found.channels * found.size**2, len(found.classes)))


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------- resumption
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_in_the_middle_of_an_epoch_and_resumed_is_the_same_training(tmp_path: Path) -> None:
    whole = training_child.trainer(tmp_path / "whole")
    whole.run()
    killed = tmp_path / "killed"
    process = child(SUPPORT / "training_child.py", killed, "hang")
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line == "hangs\n":
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "".join(said)
    assert "checkpoint after step 8\n" in said and not (killed / "model.pt").exists()
    (killed / "checkpoint.pt.tmp").write_bytes(b"cut short")  # what a kill during the writing leaves

    random.seed(99)
    resumed = training_child.trainer(killed, resume=True)
    assert resumed.step == 8 and len(resumed.history.epochs) == 1
    resumed.run()
    assert same_weights(resumed.model.state_dict(), whole.model.state_dict())
    assert same_weights(resumed.tested.state_dict(), whole.tested.state_dict())
    assert not same_weights(resumed.tested.state_dict(), whole.model.state_dict())
    assert resumed.history.steps == whole.history.steps
    timed = ("seconds", "images_per_second")
    for mine, theirs in zip(resumed.history.epochs, whole.history.epochs, strict=True):
        assert {k: v for k, v in mine.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}
    saved = torch.load(killed / "model.pt", weights_only=True)
    assert same_weights(saved, whole.tested.state_dict())
    with open(killed / "steps.csv") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [s["loss"] for s in whole.history.steps]


def test_resumption_depends_on_the_global_generator(tmp_path: Path) -> None:
    """That the network above has dropout is what makes its test notice a generator that is not restored."""
    first = training_child.trainer(None)
    second = training_child.trainer(None)
    torch.manual_seed(4)
    second.run()
    torch.manual_seed(5)
    first.run()
    assert not same_weights(first.model.state_dict(), second.model.state_dict())


@pytest.mark.parametrize(
    ("change", "named_so"),
    [
        ({"recipe": replace(RECIPE, lr=0.07)}, "recipe.lr is 0.05 in the checkpoint and 0.07 now"),
        ({"recipe": replace(RECIPE, epochs=3)}, "recipe.epochs is 2 in the checkpoint and 3 now"),
        ({"data": made_up_data(200)}, "data.train_images is 101 in the checkpoint and 200 now"),
        ({"seed": 6}, "training.seed is 5 in the checkpoint and 6 now"),
        ({"model": models.cifar_resnet(14, num_classes=3)}, "another model"),
    ],
)
def test_resuming_another_training_is_an_error(tmp_path: Path, change: dict[str, Any], named_so: str) -> None:
    found = made_up_data()
    given = {"model": models.cifar_resnet(8, num_classes=3), "data": found, "recipe": RECIPE, "seed": 5}
    short = Trainer(**given, output=tmp_path)
    short._save(0.0)
    Trainer(**given, output=tmp_path, resume=True)
    with pytest.raises(ResumeError, match=named_so):
        Trainer(**(given | change), output=tmp_path, resume=True)


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / checkpoint.NAME
    checkpoint.save(path, {"x": torch.ones(3)})

    def cut_short(state: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, {"x": torch.zeros(3)})
    assert torch.equal(checkpoint.load(path)["x"], torch.ones(3))
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ResumeError, match="is not a checkpoint"):
        checkpoint.load(path)


# ---------------------------------------------------------------------------------------------------- the schedule
def rates(recipe: Recipe, found: ImageData | None = None) -> list[float]:
    found = found or made_up_data()
    return [step["lr"] for step in Trainer(linear(found), found, recipe).run().steps]


def test_schedules_are_those_of_torch() -> None:
    base = Recipe(epochs=4, batch_size=16, lr=0.2, augment=False)
    total = 4 * STEPS

    def of_torch(make: Any) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
        scheduler, found = make(optimizer), []
        for _ in range(total):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    assert rates(replace(base, schedule="cosine")) == of_torch(lambda o: cosine(o, total))
    assert rates(replace(base, schedule="constant")) == [0.2] * total
    # epochs and shares of the training alike
    for milestones in ((2, 3), (0.5, 0.75)):
        found = rates(replace(base, milestones=milestones))
        assert found == pytest.approx([0.2] * 2 * STEPS + [0.02] * STEPS + [0.002] * STEPS)
    warm = rates(replace(base, schedule="cosine", warmup="linear", warmup_end=1))
    assert warm[:STEPS] == pytest.approx([0.01 + 0.19 * i / STEPS for i in range(STEPS)])
    assert warm[STEPS:] == pytest.approx([0.1 * (1 + math.cos(math.pi * i / (3 * STEPS))) for i in range(3 * STEPS)])


def test_the_papers_warm_up_ends_when_the_error_falls() -> None:
    """A network that is wrong until the test makes it right; the schedule goes on underneath."""
    assert named("paper", model="resnet110").warmup == named("paper", model="resnet1202").warmup == "error"
    assert named("paper", model="resnet56").warmup == "none"
    found = made_up_data(128 * 16)
    recipe = named("paper", model="resnet110", epochs=2, milestones=(24 / 32,), augment=False)

    class Oracle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            answer = labels[-1] if len(labels) > 10 else (labels[-1] + 1) % 3
            return self.scale * F.one_hot(answer, 3).float()

    labels: list[Tensor] = []
    trainer = Trainer(Oracle(), found, recipe)
    batches = trainer.batches.train

    def told(epoch: int, start: int = 0) -> Iterator[Any]:
        for batch in batches(epoch, start):
            labels.append(batch.y)
            yield batch

    object.__setattr__(trainer.batches, "train", told)
    trainer.test = lambda: (0.0, 0.0)  # type: ignore[method-assign]
    used = [step["lr"] for step in trainer.run().steps]
    # of the latest ten batches, 1,280 images, three are right after update 13: 70 % < 80 %
    assert used == pytest.approx([0.01] * 13 + [0.1] * 11 + [0.01] * 8)
    assert trainer.recipe.warmup_lr == 0.01 and not trainer.warming


def test_the_warm_up_goes_back_to_the_full_rate() -> None:
    """On images that any network tells apart: as soon as 1,280 images, 80 batches, have been seen."""
    found = made_up_data(64)
    recipe = Recipe(epochs=40, batch_size=16, lr=0.05, warmup="error", warmup_error=0.5, augment=False)
    used = [step["lr"] for step in Trainer(linear(found), found, replace(recipe, milestones=(30,))).run().steps]
    assert used == pytest.approx([0.01] * 80 + [0.05] * 40 + [0.005] * 40)


# ---------------------------------------------------------------------------------------------------- averages
def test_moving_average_is_that_of_torch() -> None:
    """Beside torch's own AveragedModel, fed with the weights of every update, with the decay that begins small."""
    found = made_up_data()

    model = models.cifar_resnet(8, num_classes=3)
    average = AveragedModel(copy.deepcopy(model), use_buffers=True)
    trainer = Trainer(model, found, RECIPE)
    step = trainer.scheduler.step

    def follow() -> None:  # when the schedule steps, the update has just been done
        n = int(average.n_averaged)
        average.multi_avg_fn = get_ema_multi_avg_fn(min(0.9, (1 + n) / (10 + n)))
        average.update_parameters(model)
        step()

    trainer.scheduler.step = follow  # type: ignore[method-assign]
    trainer.run()
    assert average.n_averaged == 2 * STEPS
    assert same_weights(trainer.tested.state_dict(), average.module.state_dict())
    assert not same_weights(trainer.tested.state_dict(), model.state_dict())


def test_records_are_what_they_say() -> None:
    found = made_up_data()
    recipe = Recipe(epochs=2, batch_size=16, augment=False, label_smoothing=0.2, schedule="constant", lr=0.01)
    outputs: list[tuple[Tensor, Tensor]] = []
    gradients: list[bool] = []

    class Look(Callback):
        def on_step(self, trainer: Trainer, step: int, loss: Tensor) -> None:
            gradients.append(all(p.grad is not None and bool(p.grad.any()) for p in trainer.model.parameters()))
            losses.append(float(loss))

    losses: list[float] = []
    model = linear(found)
    model.register_forward_hook(lambda m, x, out: outputs.append((m.training, out.detach())))
    trainer = Trainer(model, found, recipe, seed=1, callbacks=[Look()])
    history = trainer.run()
    assert gradients == [True] * 2 * STEPS
    assert losses == [s["loss"] for s in history.steps]
    assert [s["step"] for s in history.steps] == list(range(2 * STEPS))
    assert [s["epoch"] for s in history.steps] == [0] * STEPS + [1] * STEPS
    for record in history.epochs:
        mine = losses[record["epoch"] * STEPS :][:STEPS]
        assert record["train_loss"] == pytest.approx(sum(mine) / STEPS)
        assert record["images_per_second"] == pytest.approx(STEPS * 16 / record["seconds"])
    out = torch.cat([out for training, out in outputs if not training][-2:])
    assert history.epochs[-1]["test_loss"] == pytest.approx(float(F.cross_entropy(out, found.test_y)), rel=1e-5)
    assert history.epochs[-1]["test_error"] == pytest.approx(float((out.argmax(1) != found.test_y).double().mean()))
    answers = torch.cat([out for training, out in outputs if training][:STEPS]).argmax(1)
    labels = torch.cat([batch.y for batch in trainer.batches.train(0)])
    assert history.epochs[0]["train_error"] == pytest.approx(float((answers != labels).double().mean()))


def test_bf16_is_autocast() -> None:
    found = made_up_data()
    seen = set()
    model = linear(found)
    model[1].register_forward_hook(lambda m, x, out: seen.add((m.weight.dtype, out.dtype)))  # type: ignore[index]
    history = Trainer(model, found, Recipe(epochs=1, batch_size=16, lr=0.01, dtype="bf16")).run()
    assert seen == {(torch.float32, torch.bfloat16)} and math.isfinite(history.epochs[0]["test_loss"])


def test_batches_that_do_not_fit_are_an_error() -> None:
    found = made_up_data(10)
    with pytest.raises(ValueError, match="batch_size must be at most .* 10 in made up, got 11"):
        Trainer(linear(found), found, Recipe(batch_size=11))


# ---------------------------------------------------------------------------------------------------- processes
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Without norms, whose statistics are each process's own, two shares of a batch are the batch."""
    alone = training_child.trainer(None, norm=False)
    alone.run()
    process = child(SUPPORT / "training_child.py", tmp_path, "share", processes=2)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    state = checkpoint.load(tmp_path / checkpoint.NAME)
    assert len(state["rng"]) == 2 and state["step"] == 2 * STEPS
    expected = torch.tensor([s["loss"] for s in alone.history.steps], dtype=torch.float64)
    torch.testing.assert_close(state["losses"], expected, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(state["epochs"], alone.history.epochs, strict=True):
        for name in ("train_loss", "train_error", "test_loss", "test_error"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name  # type: ignore[literal-required]
    assert said.count("epoch 2/2") == 1  # the first process alone speaks


# ------------------------------------------------------------------------------------------------ fused, plain
def history_of(found: ImageData, recipe: Recipe, fused: bool, seed: int) -> Any:
    torch.manual_seed(seed)
    model = models.cifar_resnet(8, in_channels=found.channels, num_classes=len(found.classes), fused=fused)
    return Trainer(model, found, recipe, seed=seed).run()


def test_fused_and_plain_losses_follow_each_other() -> None:
    """50 updates at a rate at which rounding alone does not decide.

    At higher ones it does: at 0.01 on digits plain PyTorch leaves its own float64 twin by 1e-2 within 50 updates, and
    so does fused; at the paper's 0.1 by more. What grows is the rounding of the first gradients, 5e-6 of them in plain
    PyTorch on a CPU, 1e-6 fused.
    """
    found = made_up_data(64 * 50, 64)
    recipe = Recipe(epochs=1, batch_size=64, lr=0.003, schedule="constant")
    plain, fused = (history_of(found, recipe, fused, 0).steps for fused in (False, True))
    assert len(plain) == 50 and plain[-1]["loss"] < 0.8 * plain[0]["loss"]
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(plain, fused, strict=True))
    assert 0 < worst < 1e-3


def test_fused_and_plain_losses_follow_each_other_in_float64() -> None:
    """50 updates at the paper's rate: where rounding is small enough not to decide, nothing else makes them differ."""
    found = data.digits(size=8)
    images = (found.normalise(found.train_x[:64]).double(), found.train_y[:64])
    losses = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = models.cifar_resnet(20, in_channels=1, num_classes=10, fused=fused).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        losses.append([])
        for _ in range(50):
            loss = F.cross_entropy(model(images[0]), images[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(f"loss from {losses[0][0]:.3g} to {losses[0][-1]:.3g}; largest difference {worst:.2g}")
    assert 0 < worst < 1e-9


@pytest.mark.slow
def test_fused_and_plain_end_equally_good() -> None:
    """Three seeds: the means differ by no more than the seeds of one of them do, or by two images of 360."""
    found = data.digits()
    found = replace(found, train_x=found.train_x[:640], train_y=found.train_y[:640])
    recipe = named("quick", epochs=4, batch_size=32)
    plain, fused = (
        [history_of(found, recipe, fused, seed).epochs[-1]["test_error"] for seed in range(3)]
        for fused in (False, True)
    )
    noise = max(max(plain) - min(plain), max(fused) - min(fused), 2 / 360)
    print(f"test errors: plain {plain}, fused {fused}")
    assert abs(sum(plain) - sum(fused)) / 3 <= noise
    assert max(*plain, *fused) < 0.2


# ---------------------------------------------------------------------------------------------------- logs
def test_logs_of_a_training(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="events can't be read without it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = training_child.trainer(tmp_path)
    history = trainer.run()
    with open(tmp_path / "epochs.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test_loss"]) for row in rows] == [e["test_loss"] for e in history.epochs]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("step/loss")
    assert [e.step for e in losses] == list(range(2 * STEPS))
    assert [e.value for e in losses] == pytest.approx([s["loss"] for s in history.steps])
    assert [e.step for e in events.Scalars("epoch/test_error")] == [STEPS - 1, 2 * STEPS - 1]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "epoch 2/2: loss" in (tmp_path / "train.log").read_text()
    assert not any(isinstance(handler, logging.FileHandler) for handler in logger.handlers)


def test_without_tensorboard_the_log_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    found = made_up_data()
    Trainer(linear(found), found, RECIPE, output=tmp_path).run()
    assert (tmp_path / "train.log").read_text().count("no TensorBoard events") == 1
    assert not (tmp_path / "tensorboard").exists() and (tmp_path / "steps.csv").exists()
