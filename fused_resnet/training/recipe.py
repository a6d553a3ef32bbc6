"""Recipes of training: the paper's, a modern one, a quick one, and the checks of a recipe's fields.

Sources: He et al., arXiv 1512.03385, sections 3.4 and 4.2 (``paper``); Loshchilov and Hutter, arXiv 1608.03983
(cosine); Goyal et al., arXiv 1706.02677, section 2.2 (linear warm-up); Szegedy et al., arXiv 1512.00567, section 7
(label smoothing).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.optim import lr_scheduler

SCHEDULES = ("steps", "cosine", "constant")
WARMUPS = ("none", "error", "linear")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# "we further explore n = 18 that leads to a 110-layer ResNet. In this case, we find that the initial learning rate of
# 0.1 is slightly too large to start converging"; the one of 1202 layers "is trained as described above".
_WARMED_UP = ("resnet110", "resnet1202")


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    _typed(name, value, int | float, "a number")
    assert isinstance(value, int | float)
    if not (low < value if open_low else low <= value) or value > high or not math.isfinite(value):
        bounds = f"{'above' if open_low else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
        raise ValueError(f"{name} must be {bounds}, got {value}")


def _typed(name: str, value: object, kind: Any, expected: str) -> None:
    """Raises a TypeError unless the value is of the kind; a bool is no number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}")


def _one_of(name: str, value: object, expected: Sequence[str]) -> None:
    if value not in expected:
        raise ValueError(f"{name} must be one of {', '.join(expected)}, got {value!r}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training, except the network, the data and the seed. The defaults are the paper's.

    A point in time is an int (epochs from the start) or a float between 0 and 1 (that share of the whole training).

    Args:
        epochs: passes over the training images; an incomplete last batch is left out of each.
        batch_size: images per update, over all processes.
        lr, momentum, weight_decay, nesterov: arguments of ``torch.optim.SGD``; the decay applies to all parameters.
        schedule: "steps": the rate is multiplied by ``factor`` at each of ``milestones``; "cosine": it falls to 0 at
            the end; "constant".
        milestones: increasing points in time.
        factor: the factor of "steps".
        warmup: "none"; "error": ``warmup_lr`` until the training error, over the latest 1,280 images or one batch if
            that is more, falls below ``warmup_error``, then the schedule as if there had been no warm-up; "linear":
            from ``warmup_lr`` to ``lr`` until ``warmup_end``, and the schedule over the rest.
        warmup_lr, warmup_error, warmup_end: see ``warmup``.
        label_smoothing: of the training loss; the test loss has none.
        ema_decay: the weights and buffers that are tested and finally saved are an exponential moving average with the
            decay min(ema_decay, (1 + n) / (10 + n)) after n updates; None: no average.
        dtype: "fp32", or "bf16" by autocast.
        augment: random crops, and flips where the data allow them.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    epochs: int = 164
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    schedule: str = "steps"
    milestones: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1
    warmup: str = "none"
    warmup_lr: float = 0.01
    warmup_error: float = 0.8
    warmup_end: float = 0.03
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    dtype: str = "fp32"
    augment: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _typed(name, getattr(self, name), int, "an int")
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("nesterov", "augment"):
            _typed(name, getattr(self, name), bool, "a bool")
        for name in ("lr", "warmup_lr"):
            _number(name, getattr(self, name), 0, math.inf, open_low=True)
        for name in ("factor", "warmup_error"):
            _number(name, getattr(self, name), 0, 1, open_low=True)
        for name in ("momentum", "label_smoothing", *(["ema_decay"] if self.ema_decay is not None else [])):
            _number(name, getattr(self, name), 0, 1)
        _number("weight_decay", self.weight_decay, 0, math.inf)
        for name, expected in (("schedule", SCHEDULES), ("warmup", WARMUPS), ("dtype", tuple(DTYPES))):
            _one_of(name, getattr(self, name), expected)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True needs a momentum above 0, got momentum 0")
        if isinstance(self.milestones, str) or not isinstance(self.milestones, Sequence):
            raise TypeError(f"milestones must be a sequence of numbers, got {self.milestones!r}")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        shares = [self._share(f"milestones[{i}]", m) for i, m in enumerate(self.milestones)]
        if self.schedule == "steps" and sorted(set(shares)) != shares:
            raise ValueError(f"milestones must increase, got {self.milestones} over {self.epochs} epochs")
        if self.warmup == "linear" and self.warmup_lr > self.lr:
            raise ValueError(f"warmup_lr must be at most lr = {self.lr} with warmup='linear', got {self.warmup_lr}")
        end = self._share("warmup_end", self.warmup_end)
        if self.warmup == "linear" and self.schedule == "steps" and any(share <= end for share in shares):
            raise ValueError(f"warmup_end must come before all milestones {self.milestones}, got {self.warmup_end}")

    def _share(self, name: str, value: float) -> float:
        """A point in time as a share of the training."""
        _number(name, value, 0, math.inf, open_low=True)
        share = value / self.epochs if isinstance(value, int) else value
        # a field that the schedule does not use may have any value
        used = self.warmup == "linear" if name == "warmup_end" else self.schedule == "steps"
        if used and share >= 1:
            expected = f"an int below epochs = {self.epochs} or a float between 0 and 1"
            raise ValueError(f"{name} must be {expected}, got {value}")
        return share

    def steps(self, name: str, steps_per_epoch: int) -> list[int]:
        """The points in time of ``milestones`` or ``warmup_end`` in updates; each is at least 1."""
        value = getattr(self, name)
        total = self.epochs * steps_per_epoch
        points = value if isinstance(value, tuple) else (value,)
        return [max(1, round(self._share(name, point) * total)) for point in points]

    def optimizer(self, parameters: Any) -> torch.optim.SGD:
        """The recipe's SGD optimizer."""
        return torch.optim.SGD(
            parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )

    def scheduler(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> lr_scheduler.LRScheduler:
        """torch's scheduler; call its step after every update. The loop itself handles the warm-up by the error."""
        warm = self.steps("warmup_end", steps_per_epoch)[0] if self.warmup == "linear" else 0
        main: lr_scheduler.LRScheduler
        if self.schedule == "steps":
            milestones = [step - warm for step in self.steps("milestones", steps_per_epoch)]
            main = lr_scheduler.MultiStepLR(optimizer, milestones, self.factor)
        elif self.schedule == "cosine":
            main = lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.epochs * steps_per_epoch - warm))
        else:
            main = lr_scheduler.ConstantLR(optimizer, factor=1.0)
        if not warm:
            return main
        start = lr_scheduler.LinearLR(optimizer, self.warmup_lr / self.lr, total_iters=warm)
        return lr_scheduler.SequentialLR(optimizer, [start, main], [warm])

    def differences(self, other: Recipe, *, mine: str = "here", theirs: str = "there") -> list[str]:
        """A sentence for each field in which two recipes differ."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return [f"{name} is {a!r} {mine} and {b!r} {theirs}" for name, a, b in pairs if a != b]


# 64,000 updates of 128 images are 164 epochs of CIFAR-10's 50,000; the rate falls at 32,000 and 48,000.
_PAPER = Recipe()
# 600,000 updates of 256 images are 120 epochs of ImageNet.
_PAPER_IMAGENET = Recipe(epochs=120, batch_size=256, milestones=(0.25, 0.5, 0.75))
_MODERN: dict[str, Any] = {
    "schedule": "cosine",
    "nesterov": True,
    "warmup": "linear",
    "label_smoothing": 0.1,
    "ema_decay": 0.999,
    "dtype": "bf16",
}
_QUICK = Recipe(
    epochs=8, batch_size=64, nesterov=True, schedule="cosine", warmup="linear", warmup_end=0.3, augment=False
)
RECIPES = ("paper", "modern", "quick")


def named(name: str, *, model: str = "", imagenet: bool = False, **changes: Any) -> Recipe:
    """A recipe by its name.

    Args:
        name: "paper"; "modern": the paper's length and batches with cosine, linear warm-up, Nesterov's momentum, label
            smoothing, a moving average and bf16; "quick": 8 epochs for small data, without augmentation.
        model: the network's name in ``fused_resnet.models``; the paper warms resnet110 and resnet1202 up.
        imagenet: the paper's recipe for ImageNet (folders of photographs) instead of the one for CIFAR-10.
        changes: fields that get other values.

    Raises:
        TypeError, ValueError: an unknown name, an unknown field or a wrong value.
    """
    _one_of("recipe", name, RECIPES)
    unknown = sorted(changes.keys() - {f.name for f in fields(Recipe)})
    if unknown:
        raise TypeError(
            f"a recipe has no field {', '.join(unknown)}: expected {', '.join(f.name for f in fields(Recipe))}"
        )
    base = _PAPER_IMAGENET if imagenet else _PAPER
    if name == "quick":
        base = _QUICK
    elif name == "modern":
        base = replace(base, **_MODERN)
    elif model in _WARMED_UP:
        base = replace(base, warmup="error")
    return replace(base, **changes)
