"""The one training loop of the project."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_resnet.training import checkpoint
from fused_resnet.training.batches import Batch, Batches, Share
from fused_resnet.training.checkpoint import ResumeError
from fused_resnet.training.history import Callback, EpochRecord, History
from fused_resnet.training.images import ImageData
from fused_resnet.training.logs import RunLog, logger
from fused_resnet.training.recipe import DTYPES, Recipe

# The error that ends a warm-up is averaged over this many images: ten of the paper's batches.
_WARMUP_IMAGES = 1280

# The attributes that a checkpoint holds as they are.
_KEPT = ("seed", "step", "warming", "recent", "broken")


def _moving_average(decay: float) -> Any:
    """torch's exponential moving average with a decay that begins small, so that early weights soon count little."""

    def update(average: Any, current: Any, updates: Tensor) -> None:
        n = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(average, current, updates)

    return update


class Trainer:
    """Trains a classifier of images by a recipe.

    Where ``torch.distributed`` is initialised, each process takes its share of every batch (of ``recipe.batch_size`` in
    all) and gradients are averaged; BatchNorm's statistics are each process's own, as in plain DDP.

    Args:
        model: maps float [N, C, H, W], normalised, channels_last, to [N, classes]. Trained in place, fused or not.
        data: the images; those in memory are copied to ``device``.
        recipe: the recipe.
        device: the device. seed: decides the order and the augmentation of the images, not the weights: for these seed
            torch before you build the model.
        output: a folder for checkpoints and logs; None writes nothing.
        callbacks: see :class:`Callback`.
        workers: processes that decode image files.
        resume: continue from the checkpoint in ``output``, if there is one.
        checkpoint_every: updates between two checkpoints, in addition to the one after each epoch.

    Attributes:
        history: the record so far. step: updates done so far. broken: path -> reason of the images left out.
        warming: whether the recipe's warm-up by the training error is still running.
        tested: the model that is tested and finally saved: the moving average's, or ``model`` itself.

    Raises:
        ValueError: a batch is larger than the training set, or can't be shared among the processes.
        ResumeError: the checkpoint is of another recipe, dataset, seed or model.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        recipe: Recipe,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        output: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        workers: int = 0,
        resume: bool = False,
        checkpoint_every: int | None = None,
    ) -> None:
        self.recipe, self.device, self.seed = recipe, torch.device(device), seed
        self.output = Path(output) if output is not None else None
        self.distributed = dist.is_available() and dist.is_initialized()
        self.share = Share(dist.get_rank(), dist.get_world_size()) if self.distributed else Share()
        size, images, processes = recipe.batch_size, len(data.train_x), self.share.world
        if size > images:
            expected = f"at most the number of training images, {images} in {data.name}"
            raise ValueError(f"batch_size must be {expected}, got {size}")
        if size % processes:
            raise ValueError(f"batch_size must be a multiple of {processes} processes, got {size}")
        self._identity = data.identity() if self.output else {}
        self.data = data.to(self.device)
        self.batches = Batches(self.data, recipe.batch_size, seed, recipe.augment, self.share, workers)
        self.steps_per_epoch = self.batches.steps_per_epoch

        self.model = model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network: nn.Module = self.model
        if self.distributed:
            ids = [self.device.index or 0] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, device_ids=ids)
        self.optimizer = recipe.optimizer(self.model.parameters())
        self.scheduler = recipe.scheduler(self.optimizer, self.steps_per_epoch)
        self.ema: AveragedModel | None = None
        if recipe.ema_decay is not None:
            self.ema = AveragedModel(self.model, multi_avg_fn=_moving_average(recipe.ema_decay), use_buffers=True)
        self.tested: nn.Module = self.ema.module if self.ema else self.model

        self.history = History()
        self.step = 0
        self.broken: dict[str, str] = {}
        self.warming = recipe.warmup == "error"
        self.recent: list[list[float]] = []  # [wrong, images] of the latest batches, while warming
        self._pending: list[tuple[Tensor, float]] = []  # (loss, lr) of the steps that are not in the history yet
        self._totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss x images, wrong, images
        self._seconds = 0.0  # seconds of this epoch that earlier processes used
        self._broken_told = 0

        self.callbacks = list(callbacks)
        self.log: RunLog | None = None
        if self.output and self._leads:
            self.log = RunLog(self.output, f"{type(model).__name__} on {data.name}")
            self.callbacks.append(self.log)
        self._checkpoint_every = checkpoint_every if self.output else None
        if resume and self.output and (self.output / checkpoint.NAME).exists():
            self._load(self.output / checkpoint.NAME)

    @property
    def _leads(self) -> bool:
        return self.share.rank == 0

    def _say(self, text: str, *values: object) -> None:
        if self._leads:
            logger.info(text, *values)

    def running(self) -> tuple[float, float]:
        """Loss and error of this process's images, averaged over the epoch so far. Waits for the device."""
        loss, wrong, images = self._totals.tolist()
        return (loss / images, wrong / images) if images else (math.nan, math.nan)

    def run(self) -> History:
        """Trains to the end.

        Returns:
            ``self.history``.
        """
        if self.log:
            self.log.start(self.history)
        try:
            if self.step:
                self._say("goes on after step %d", self.step)
            for epoch in range(self.step // self.steps_per_epoch, self.recipe.epochs):
                self._train(epoch)
                self._finish(epoch)
            if self.output and self._leads:
                checkpoint.save(self.output / "model.pt", self.tested.state_dict())
        finally:
            if self.log:
                self.log.close(self.history)
        return self.history

    def _train(self, epoch: int) -> None:
        self.model.train()
        started = time.perf_counter()
        for batch in self.batches.train(epoch, self.step % self.steps_per_epoch):
            self._update(epoch, batch)
            # the end of an epoch has a checkpoint of its own, after its test
            due = self._checkpoint_every and self.step % self._checkpoint_every == 0
            if due and self.step % self.steps_per_epoch:
                self._flush(epoch)
                self._save(self._seconds + time.perf_counter() - started)
                self._say("checkpoint after step %d", self.step)
        self._flush(epoch)
        self._seconds += time.perf_counter() - started

    def _autocast(self) -> Any:
        dtype = DTYPES[self.recipe.dtype]
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    def _update(self, epoch: int, batch: Batch) -> None:
        self.broken |= batch.broken
        x = self.data.normalise(batch.x.to(self.device, non_blocking=True))
        y = batch.y.to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            out = self.network(x)
            loss = F.cross_entropy(out, y, label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        found = loss.detach()
        for callback in self.callbacks:
            callback.on_step(self, self.step, found)
        wrong = (out.detach().argmax(1) != y).sum()
        images = torch.tensor(float(len(y)), dtype=torch.float64, device=self.device)
        self._totals += torch.stack((found.double() * images, wrong.double(), images))

        group = self.optimizer.param_groups[0]
        scheduled = group["lr"]
        if self.warming:
            group["lr"] = self.recipe.warmup_lr
        self._pending.append((found, group["lr"]))
        self.optimizer.step()
        if self.warming:
            group["lr"] = scheduled  # the schedule continues meanwhile
            self._watch(torch.stack((wrong.double(), images)))
        self.scheduler.step()
        if self.ema:
            self.ema.update_parameters(self.model)
        self.step += 1

    def _watch(self, counts: Tensor) -> None:
        """Ends the warm-up once the error over the latest images is small enough."""
        self.recent.append(self._sum(counts).tolist())
        batches = max(1, _WARMUP_IMAGES // self.recipe.batch_size)
        del self.recent[:-batches]
        wrong, images = (sum(column) for column in zip(*self.recent, strict=True))
        if len(self.recent) == batches and wrong < self.recipe.warmup_error * images:
            self.warming = False
            self._say("step %d: training error %.1f %%, the warm-up ends", self.step, 100 * wrong / images)

    def _sum(self, t: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.distributed:
            t = t.clone()
            dist.all_reduce(t)
        return t

    def _flush(self, epoch: int) -> None:
        """Moves the losses that are still on the device into the history."""
        if not self._pending:
            return
        losses = self._sum(torch.stack([loss.double() for loss, _ in self._pending])) / self.share.world
        for loss, (_, lr) in zip(losses.tolist(), self._pending, strict=True):
            self.history.steps.append({"step": len(self.history.steps), "epoch": epoch, "loss": loss, "lr": lr})
        self._pending.clear()

    @torch.no_grad()
    def test(self) -> tuple[float, float]:
        """Loss (without label smoothing) and error of ``tested`` on the test images."""
        self.tested.eval()
        totals = torch.zeros_like(self._totals)
        for batch in self.batches.test():
            self.broken |= batch.broken
            if not len(batch.y):
                continue
            x, y = self.data.normalise(batch.x.to(self.device)), batch.y.to(self.device)
            with self._autocast():
                out = self.tested(x)
                loss = F.cross_entropy(out, y, reduction="sum")
            images = torch.full_like(totals[2], len(y))
            totals += torch.stack((loss.double(), (out.argmax(1) != y).sum().double(), images))
        loss, wrong, images = self._sum(totals).tolist()
        if not images:
            raise ValueError(f"{self.data.name}: none of the test images can be read")
        return loss / images, wrong / images

    def _finish(self, epoch: int) -> None:
        loss, wrong, images = self._sum(self._totals).tolist()
        test_loss, test_error = self.test()
        self._gather_broken()
        record: EpochRecord = {
            "epoch": epoch,
            "train_loss": loss / images,
            "train_error": wrong / images,
            "test_loss": test_loss,
            "test_error": test_error,
            "seconds": self._seconds,
            "images_per_second": images / self._seconds,
        }
        self.history.epochs.append(record)
        self._say(
            f"epoch {epoch + 1}/{self.recipe.epochs}: loss {loss / images:.4f} (test {test_loss:.4f}), error "
            f"{wrong / images:.2%} (test {test_error:.2%}), {record['images_per_second']:.0f} images/s"
        )
        for callback in self.callbacks:
            callback.on_epoch(self, record)
        self._totals.zero_()
        self._seconds = 0.0
        if self.output:
            self._save(0.0)

    def _gather_broken(self) -> None:
        if self.distributed and not self.data.in_memory:
            everybody: list[dict[str, str]] = [{} for _ in range(self.share.world)]
            dist.all_gather_object(everybody, self.broken)
            self.broken = {path: why for found in everybody for path, why in found.items()}
        if len(self.broken) > self._broken_told:
            self._broken_told = len(self.broken)
            some = "; ".join(f"{path}: {why}" for path, why in sorted(self.broken.items())[:5])
            self._say("%d images can't be read and are left out: %s", self._broken_told, some)

    def _save(self, seconds: float) -> None:
        """Writes the checkpoint: everything that the rest of the training depends on."""
        totals = self._sum(self._totals)
        rng = [checkpoint.rng_state()]
        if self.distributed:
            rng = [{} for _ in range(self.share.world)]
            dist.all_gather_object(rng, checkpoint.rng_state())
        if not self._leads or self.output is None:
            return
        steps = self.history.steps
        state: dict[str, Any] = {name: getattr(self, name) for name in _KEPT}
        state |= {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"recipe": asdict(self.recipe), "data": self._identity, "epochs": self.history.epochs}
        state |= {"losses": torch.tensor([s["loss"] for s in steps], dtype=torch.float64)}
        state |= {"rates": torch.tensor([s["lr"] for s in steps], dtype=torch.float64)}
        checkpoint.save(self.output / checkpoint.NAME, state | {"totals": totals, "seconds": seconds, "rng": rng})

    def _parts(self) -> dict[str, Any]:
        """Everything that has a ``state_dict``."""
        found = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "ema": self.ema}
        return {name: part for name, part in found.items() if part is not None}

    def _load(self, path: Path) -> None:
        state = checkpoint.load(path, self.device)
        checkpoint.check_same("recipe", state["recipe"], asdict(self.recipe))
        checkpoint.check_same("data", state["data"], self._identity)
        checkpoint.check_same("training", {"seed": state["seed"]}, {"seed": self.seed})
        try:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
        except RuntimeError as error:
            raise ResumeError(f"{path} is of another model: {error}") from error
        for name in _KEPT:
            setattr(self, name, state[name])
        if self._leads:  # these are sums over all processes, and the epoch's end adds up the processes again
            self._totals.copy_(state["totals"])
        self._seconds = state["seconds"]
        rates = zip(state["losses"].tolist(), state["rates"].tolist(), strict=True)
        self.history.steps = [
            {"step": i, "epoch": i // self.steps_per_epoch, "loss": loss, "lr": lr}
            for i, (loss, lr) in enumerate(rates)
        ]
        self.history.epochs = state["epochs"]
        checkpoint.set_rng_state(state["rng"][self.share.rank % len(state["rng"])])
