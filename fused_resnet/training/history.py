"""The record of a training, and callbacks that observe it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from fused_resnet.training.loop import Trainer


class StepRecord(TypedDict):
    """One update. ``step`` and ``epoch`` count from 0; ``loss`` is its batch's, before the update; ``lr`` its rate."""

    step: int
    epoch: int
    loss: float
    lr: float


class EpochRecord(TypedDict):
    """One epoch, counted from 0.

    ``train_loss`` and ``train_error`` (a share, 0 to 1) are averages over its batches as they were trained on;
    ``test_loss`` and ``test_error`` are measured after it, on the moving average's weights where there is one;
    ``seconds`` and ``images_per_second`` are of the training alone.
    """

    epoch: int
    train_loss: float
    train_error: float
    test_loss: float
    test_error: float
    seconds: float
    images_per_second: float


@dataclass
class History:
    """Plain numbers: ``steps`` (complete up to the latest finished epoch or checkpoint) and ``epochs``."""

    steps: list[StepRecord] = field(default_factory=list)
    epochs: list[EpochRecord] = field(default_factory=list)


class Callback:
    """Called by a :class:`Trainer`, in every process of it; override what you need."""

    def on_step(self, trainer: Trainer, step: int, loss: Tensor) -> None:
        """After the backward pass and before the update: ``parameter.grad`` holds the gradients.

        Args:
            step: updates done so far. loss: of this batch, a detached scalar on the trainer's device.
        """

    def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        """After the epoch's test; ``trainer.history`` has everything up to here."""
