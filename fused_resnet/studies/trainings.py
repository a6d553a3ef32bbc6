"""The studies' networks, and the training of one. It has the same bits in every process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.models import Bottleneck, CifarResNet, cifar_resnet
from fused_resnet.models.cifar import Shortcut
from fused_resnet.planner.sizes import chains_always
from fused_resnet.studies.pool import Advance
from fused_resnet.training import Callback, EpochRecord, History, ImageData, Recipe, Trainer


@dataclass(frozen=True)
class Network:
    """A network of the CIFAR family: its depth, its shortcut (None: plain) and its kind of blocks.

    ``recipe`` is its recipe if that is not the preset's.
    """

    depth: int
    shortcut: Shortcut | None = "A"
    bottleneck: bool = False
    recipe: Recipe | None = None

    @property
    def name(self) -> str:
        """ "plain-20", "ResNet-20", "ResNet-20 B", "ResNet-29 bottleneck"."""
        if self.shortcut is None:
            return f"plain-{self.depth}"
        option = "" if self.shortcut == "A" else f" {self.shortcut}"
        return f"ResNet-{self.depth}{option}{' bottleneck' if self.bottleneck else ''}"

    def build(self, in_channels: int, num_classes: int, **kwargs: Any) -> CifarResNet:
        """The network, initialised by the default generator; kwargs are those of ``models.cifar_resnet``."""
        block = Bottleneck if self.bottleneck else None
        kwargs = {"in_channels": in_channels, "num_classes": num_classes, "block": block} | kwargs
        return cifar_resnet(self.depth, shortcut=self.shortcut, **kwargs)

    def seeded(self, seed: int, data: ImageData, device: torch.device, **kwargs: Any) -> CifarResNet:
        """The network for these images with the weights that ``seed`` gives, on the device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(data.channels, len(data.classes), **kwargs).to(device)


@dataclass(frozen=True)
class Training:
    """Everything that decides a run, except the images.

    ``recipe`` is the network's own or the preset's. ``folder`` keeps the run, if it is kept.
    """

    network: Network
    recipe: Recipe
    seed: int
    folder: Path | None

    def work(self, images: int) -> int:
        """The training's work: steps times layers."""
        return self.network.depth * self.recipe.epochs * (images // self.recipe.batch_size)


@dataclass
class Run:
    """A trained network.

    It has the model after the last step, every step and epoch, and the norms of each convolution's gradient at the
    first step of every epoch.
    """

    network: Network
    seed: int
    model: nn.Module
    history: History
    gradients: list[dict[str, Any]]

    def curve(self, key: str) -> list[float]:
        """The history's values of ``key``, one per epoch."""
        return [record[key] for record in self.history.epochs]  # type: ignore[literal-required]


def train(training: Training, advance: Advance, *, data: ImageData, device: torch.device, resume: bool) -> Run:
    """Trains a network. Chains run at any size, because the studies are about them.

    Args:
        advance: called with the steps times layers done.
        resume: continue from the training's folder.
    """
    network, folder = training.network, training.folder
    watch = _Watch(network, advance, folder / "gradients.json" if folder else None, resume)
    with _one_thread_on_a_cpu(device), chains_always():
        model = network.seeded(training.seed, data, device)
        trainer = Trainer(
            model, data, training.recipe, device=device, seed=training.seed, output=folder, callbacks=[watch],
            resume=resume,
        )  # fmt: skip
        advance(network.depth * trainer.step, network.name)
        history = trainer.run()
    return Run(network, training.seed, model, history, [watch.norms[step] for step in sorted(watch.norms)])


@contextmanager
def _one_thread_on_a_cpu(device: torch.device) -> Iterator[None]:
    """Uses one thread: two are slower on layers as small as these, and they sum in another order."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Watch(Callback):
    """Reports progress, and reads the gradients' norms at the first step of every epoch.

    ``file``, if given, keeps them for a training that is resumed.
    """

    def __init__(self, network: Network, advance: Advance, file: Path | None, resume: bool) -> None:
        self.network, self.advance, self.file = network, advance, file
        found = json.loads(file.read_text()) if file and resume and file.exists() else []
        self.norms: dict[int, dict[str, Any]] = {record["step"]: record for record in found}

    def on_step(self, trainer: Trainer, step: int, loss: Tensor) -> None:
        if step % trainer.steps_per_epoch == 0:
            self.norms[step] = {"step": step, "norms": weight_gradients(trainer.model)}
        self.advance(self.network.depth, self.network.name)

    def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        if self.file:  # written before this epoch's checkpoint, and atomically
            written = self.file.with_suffix(".tmp")
            written.write_text(json.dumps(list(self.norms.values())))
            written.replace(self.file)


def weight_gradients(model: nn.Module) -> list[float]:
    """The gradient's L2 norm of each 3x3 convolution, first to last layer."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    grads = [m.weight.grad for m in convs if m.weight.grad is not None]
    return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]).tolist()
