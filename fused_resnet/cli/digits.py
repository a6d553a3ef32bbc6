"""A whole training: the paper's ResNet-20 on scikit-learn's handwritten digits, fused beside plain, the same seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fused_resnet import models
from fused_resnet.planner.sizes import chains_always
from fused_resnet.training import Callback, EpochRecord, Trainer, data, named

REQUIRED_ACCURACY = 0.97


@dataclass
class Training:
    """One network's training: the loss of every step, the share of test images classified correctly, seconds."""

    variant: str
    losses: list[float]
    accuracy: float
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the network learned enough: one that learns nothing would prove nothing."""
        return self.accuracy >= REQUIRED_ACCURACY

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self) | {"ok": self.ok, "required_accuracy": REQUIRED_ACCURACY}


def train_both(
    epochs: int, device: torch.device, seed: int, tick: Callable[[], object] = lambda: None
) -> list[Training]:
    """Trains plain and fused: the same initial weights, the same batches in the same order.

    Args:
        epochs: passes over the 1,437 training images. tick: called after each epoch, 2 * ``epochs`` times in all.
    """

    class Tick(Callback):
        def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
            tick()

    trainings = []
    for variant in ("plain", "fused"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = models.resnet20(in_channels=1, fused=variant == "fused")
        recipe, start = named("quick", epochs=epochs), time.perf_counter()
        with chains_always():  # the trial is about chains
            history = Trainer(model, data.digits(), recipe, device=device, seed=seed, callbacks=[Tick()]).run()
        losses, accuracy = [step["loss"] for step in history.steps], 1 - history.epochs[-1]["test_error"]
        trainings.append(Training(variant, losses, accuracy, time.perf_counter() - start))
    return trainings
