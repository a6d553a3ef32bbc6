"""A whole training: the paper's ResNet-20 on scikit-learn's handwritten digits, fused beside plain, the same seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fused_resnet import models
from fused_resnet.planner.sizes import chains_always
from fused_resnet.training import Callback, EpochRecord, Trainer, data, named

REQUIRED_ACCURACY = 0.97


def train_both(
    epochs: int, device: torch.device, seed: int, tick: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """Trains plain and fused: the same initial weights, the same batches in the same order.

    Args:
        epochs: passes over the 1,437 training images. tick: called after each epoch, 2 * ``epochs`` times in all.

    Returns:
        The loss of every step, the share of test images classified correctly, seconds; and whether the network learned
        enough: one that learns nothing would prove nothing.
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
        found = {"variant": variant, "losses": losses, "accuracy": accuracy, "seconds": time.perf_counter() - start}
        required = {"ok": accuracy >= REQUIRED_ACCURACY, "required_accuracy": REQUIRED_ACCURACY}
        trainings.append(found | required)
    return trainings
