"""The ways to run one model that ``bench`` compares: plain PyTorch, torch.compile and fused, for a mode and a dtype."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import measure
from fused_resnet.cli import validate

TITLES = {"plain": "plain PyTorch, channels_last", "compile": "torch.compile", "fused": "fused_resnet"}


class Skipped(Exception):
    """This machine can't run the variant; the message says why."""


@dataclass
class Variant:
    """A model that is ready to run.

    Attributes:
        name: one of ``VARIANTS``. model: owns the parameters. forward: the model or its compiled form.
        x: the images in the dtype that it takes. autocast: autocast's dtype, or None.
        note: a remark for the report.
    """

    name: str
    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    x: Tensor
    autocast: torch.dtype | None
    note: str = ""
    optimizer: torch.optim.Optimizer | None = field(default=None, repr=False)

    def infer(self) -> Tensor:
        """The forward pass, without gradients."""
        with torch.no_grad(), validate.autocast(self.x.device, self.autocast):
            return self.forward(self.x)

    def loss(self, labels: Tensor) -> Tensor:
        """The forward pass of a training step."""
        with validate.autocast(self.x.device, self.autocast):
            return F.cross_entropy(self.forward(self.x), labels)

    def train(self, labels: Tensor) -> None:
        """A whole training step: clears gradients, then forward, cross-entropy, backward, SGD with momentum."""
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(labels).backward()
        self.optimizer.step()


def plain(model: nn.Module, x: Tensor, train: bool, dtype: torch.dtype) -> Variant:
    """Plain PyTorch at its best: inference in 16 bits takes the faster of autocast and a 16-bit copy of the model."""
    variant = Variant("plain", model.train(train), model, x, dtype)
    if train or dtype == torch.float32:
        return variant
    low = copy.deepcopy(model).to(dtype)
    contenders = {"autocast": variant, f"model.to({dtype})": Variant("plain", low, low, x.to(dtype), None)}
    steps = {note: v.infer for note, v in contenders.items()}
    found = measure.interleaved(steps, x.device, repeats=(3, 3), budget_s=0)
    note = min(found, key=lambda n: measure.quantiles(found[n])["median"])
    contenders[note].note = note
    return contenders[note]


def fused(model: nn.Module, x: Tensor, train: bool, dtype: torch.dtype) -> Variant:
    """``fuse`` for training, ``freeze`` for inference."""
    if train:
        model = fr.fuse(model)
        return Variant("fused", model, model, x, dtype)
    x = x.to(dtype)
    frozen = validate.frozen(model, x, dtype)
    return Variant("fused", frozen, frozen, x, None)


def compiled(model: nn.Module, x: Tensor, train: bool, dtype: torch.dtype) -> Variant:
    """``torch.compile`` with inductor. Inference runs with freezing and, in 16 bits, on a 16-bit copy.

    The first call compiles.
    """
    torch.compiler.reset()  # compilations of earlier cases would count towards the limit of recompilations
    if train:
        return Variant("compile", model, torch.compile(model.train()), x, dtype)
    model, x = model.to(dtype).eval(), x.to(dtype)
    return Variant("compile", model, torch.compile(model, options={"freezing": True}), x, None)


VARIANTS = {"plain": plain, "compile": compiled, "fused": fused}


@dataclass
class CompileBudget:
    """The seconds that torch.compile may take in all. Predicts from those used so far whether the next fits."""

    limit_s: float
    spent_s: float = 0.0
    predicted_s: float = 0.0

    @staticmethod
    def prediction(model: nn.Module, train: bool) -> float:
        """Predicted seconds on two slow cores with empty caches: about linear in the convolutions (torch 2.13)."""
        convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
        return 6 + 1.0 * convs if train else 5 + 0.3 * convs

    @contextmanager
    def compiling(self, model: nn.Module, train: bool) -> Iterator[None]:
        """Adds the time of its body to the time used.

        Raises:
            Skipped: compiling ``model`` would probably exceed the limit; or the compilation failed (this machine has
                no compiler, say).
        """
        pace = self.spent_s / self.predicted_s if self.predicted_s else 1.0
        expected = pace * self.prediction(model, train)
        if self.spent_s + expected > self.limit_s:
            budget = f"of {self.limit_s:.0f} s for compilation {self.spent_s:.0f} are spent"
            raise Skipped(f"not compiled: would take about {expected:.0f} s, and {budget} (--preset full compiles all)")
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # inductor, the compiler and the backend raise exceptions without a common class
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            raise Skipped(f"torch.compile failed: {type(error).__name__}: {lines[0]}") from error
        finally:
            self.spent_s += time.perf_counter() - start
            self.predicted_s += self.prediction(model, train)
