"""A whole training: the paper's ResNet-20 on scikit-learn's handwritten digits, fused beside plain, the same seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet import models
from fused_resnet.cli.data import Digits, digits
from fused_resnet.cli.validate import in_layout

REQUIRED_ACCURACY = 0.97
BATCH_SIZE = 64


@dataclass
class Training:
    """One network's training: the loss of every step, the share of the test images that it names rightly, seconds."""

    variant: str
    losses: list[float]
    accuracy: float
    seconds: float

    @property
    def ok(self) -> bool:
        """Good enough; a network that learns nothing useful would prove nothing."""
        return self.accuracy >= REQUIRED_ACCURACY

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self) | {"ok": self.ok, "required_accuracy": REQUIRED_ACCURACY}


def _train(
    model: nn.Module, found: Digits, epochs: int, seed: int, tick: Callable[[], object]
) -> tuple[list[float], float]:
    steps = epochs * (len(found.train_x) // BATCH_SIZE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps, pct_start=0.3)
    generator = torch.Generator().manual_seed(seed)
    losses: list[Tensor] = []
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(found.train_x), generator=generator).to(found.train_x.device)
        for batch in order.split(BATCH_SIZE)[: len(order) // BATCH_SIZE]:
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(found.train_x[batch]), found.train_y[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        tick()
    model.eval()
    with torch.no_grad():
        right = model(found.test_x).argmax(1) == found.test_y
    return torch.stack(losses).tolist(), float(right.float().mean())


def train_both(
    epochs: int, device: torch.device, seed: int, tick: Callable[[], object] = lambda: None
) -> list[Training]:
    """Trains plain and fused: the same initial weights, the same batches in the same order.

    Args:
        epochs: over the 1,437 training images. tick: called after each epoch, twice ``epochs`` times in all.
    """
    found = Digits(*(t.to(device) for t in digits(seed)))
    trainings = []
    for variant in ("plain", "fused"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = models.resnet20(in_channels=1, fused=variant == "fused")
        model = in_layout(model.to(device), torch.channels_last)
        start = time.perf_counter()
        losses, accuracy = _train(model, found, epochs, seed, tick)
        trainings.append(Training(variant, losses, accuracy, time.perf_counter() - start))
    return trainings
