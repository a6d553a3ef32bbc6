"""``fused-resnet train``: a network of the paper on digits, CIFAR-10 or a folder of images, alone or under torchrun."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress, TimeRemainingColumn
from torch import Tensor, nn

from fused_resnet import models
from fused_resnet.cli.console import console, pick_device, pick_models, progress, table, write_json
from fused_resnet.cli.env import cores, describe, device_name
from fused_resnet.cli.options import UsageError
from fused_resnet.training import Callback, DataError, ImageData, Recipe, ResumeError, Trainer, checkpoint, data, named
from fused_resnet.training.logs import logger

# Seconds between two reads of the running loss. Each read waits for the device.
_REFRESH_S = 0.25
# Processes that decode images: these deliver more than an ordinary network on a GPU can use.
_MOST_WORKERS = 8


class _Bar(Callback):
    """The progress bar: epoch, loss, error, images per second; rich adds the time that is left."""

    def __init__(self, bar: Progress, recipe: Recipe) -> None:
        self.bar, self.recipe = bar, recipe
        self.task = bar.add_task("", total=None)
        self.epoch = -1
        self.started = self.seen_at = time.perf_counter()
        self.first = 0

    def on_step(self, trainer: Trainer, step: int, loss: Tensor) -> None:
        now, epoch = time.perf_counter(), step // trainer.steps_per_epoch
        if epoch != self.epoch:
            self.epoch, self.started, self.first = epoch, now, step
        if now - self.seen_at < _REFRESH_S or step == self.first:
            return
        self.seen_at = now
        mean, error = trainer.running()
        speed = (step - self.first) * self.recipe.batch_size / (now - self.started)
        # fits, with the bar and the times, into a terminal of 80 columns
        text = f"epoch {epoch + 1}/{self.recipe.epochs} loss {mean:.3f} acc {1 - error:.1%} {speed:.0f} images/s"
        total = self.recipe.epochs * trainer.steps_per_epoch
        self.bar.update(self.task, description=text, completed=step, total=total)


@contextmanager
def _processes(name: str) -> Iterator[tuple[torch.device, int]]:
    """The device of this process and its rank. Under torchrun it joins the process group first."""
    device = pick_device(name)
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield device, 0
        return
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, dist.get_rank()
    finally:
        dist.destroy_process_group()


@contextmanager
def _printing(leads: bool) -> Iterator[Progress]:
    """Shows a progress bar and prints the training's log above it, in the first process only."""
    with progress(TimeRemainingColumn(), quiet=not leads) as bar:
        handler = logging.StreamHandler(sys.stdout)  # rich replaces it: the log is printed above the bar
        if leads:
            logger.addHandler(handler)
        try:
            yield bar
        finally:
            logger.removeHandler(handler)


def _images(words: str, model: str) -> ImageData:
    """The data that ``--data`` names.

    Raises:
        UsageError: the data are missing, or not of the expected form.
    """
    kind, _, path = words.partition(":")
    try:
        if words == "digits":
            return data.digits()
        if kind == "cifar10":
            return data.cifar10(path or None)
        return data.image_folder(words, 224 if model in models.list_models("imagenet") else 32)
    except DataError as error:
        raise UsageError(f"--data {words}: {error}") from error


def _model(name: str, found: ImageData, plain: bool, seed: int) -> nn.Module:
    sizes: dict[str, Any] = {"num_classes": len(found.classes)}
    if name in models.list_models("cifar"):
        sizes["in_channels"] = found.channels
    elif found.channels != 3:
        others = ", ".join(models.list_models("cifar"))
        problem = f"takes images of 3 channels, {found.name} has {found.channels}; expected one of {others}"
        raise UsageError(f"--model {name}: {problem}")
    torch.manual_seed(seed)
    return getattr(models, name)(fused=not plain, **sizes)


def _recipe(args: argparse.Namespace, imagenet: bool) -> Recipe:
    given = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "dtype": args.dtype}
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        return named(args.recipe, model=args.model, imagenet=imagenet, **changes)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the recipe: {error}") from error


def run(args: argparse.Namespace) -> int:
    """Trains. Returns 0 if the losses stay finite, 1 if the training diverged."""
    output = Path(args.output)
    if (output / checkpoint.NAME).exists() and not args.resume:
        raise UsageError(f"--output {output} holds a checkpoint: --resume continues from it; or name another folder")
    with _processes(args.device) as (device, rank):
        return _train(args, output, device, rank == 0)


def _train(args: argparse.Namespace, output: Path, device: torch.device, leads: bool) -> int:
    start = time.perf_counter()
    pick_models([args.model], [])
    found = _images(args.data, args.model)
    imagenet = not found.in_memory
    recipe = _recipe(args, imagenet)
    model = _model(args.model, found, args.plain, args.seed)
    parameters = sum(p.numel() for p in model.parameters())
    paper = named("paper", model=args.model, imagenet=imagenet)
    deviations = [*recipe.differences(paper, mine="here", theirs="in the paper's recipe"), *found.deviations]
    workers = args.workers if args.workers is not None else 0 if found.in_memory else min(_MOST_WORKERS, cores())
    with _printing(leads) as bar:
        with _usage_errors():
            trainer = Trainer(
                model,
                found,
                recipe,
                device=device,
                seed=args.seed,
                output=output,
                callbacks=[_Bar(bar, recipe)] if leads else [],
                workers=workers,
                resume=args.resume,
                checkpoint_every=args.checkpoint_every,
            )
        try:
            if leads:
                _announce(args, found, parameters, deviations)
                if args.resume and not trainer.step:
                    logger.info("nothing to resume in %s: starts from the beginning", output)
            history = trainer.run()
        except DataError as error:
            raise UsageError(f"--data {args.data}: {error}") from error
    last = history.epochs[-1]
    ok = math.isfinite(last["train_loss"]) and math.isfinite(last["test_loss"])
    if not leads:
        return 0 if ok else 1
    report: dict[str, Any] = {
        "ok": ok,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(device),
        "processes": trainer.share.world,
        **describe(),
        "model": args.model,
        "plain": args.plain,
        "parameters": parameters,
        "data": {"name": found.name, "train": len(found.train_x), "test": len(found.test_x), "classes": found.classes},
        "seed": args.seed,
        "recipe": recipe.to_json(),
        "not_as_in_the_paper": deviations,
        "broken_images": trainer.broken,
        "history": history.to_json(),
        "elapsed_s": round(time.perf_counter() - start, 1),
    }
    write_json(output / "results.json", report)
    if args.json:
        write_json(args.json, report)
    _print(report, output)
    return 0 if ok else 1


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Raises a trainer's errors as usage errors of the command."""
    try:
        yield
    except ResumeError as error:
        raise UsageError(f"--resume: {error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def _announce(args: argparse.Namespace, found: ImageData, parameters: int, deviations: Sequence[str]) -> None:
    """Logs the model, the data, and the differences from the paper."""
    variant = "plain PyTorch" if args.plain else "fused"
    images = f"{len(found.train_x):,} training and {len(found.test_x):,} test images"
    logger.info("%s (%s parameters, %s) on %s: %s", args.model, f"{parameters:,}", variant, args.data, images)
    for sentence in deviations:
        logger.info("not as in the paper: %s", sentence)


def _print(report: dict[str, Any], output: Path) -> None:
    epochs = report["history"]["epochs"]
    rows = [
        [part, f"{epochs[-1][f'{part}_loss']:.4f}", f"{epochs[-1][f'{part}_error']:.2%}"] for part in ("train", "test")
    ]
    out = console()
    title = f"{report['model']} on {report['data']['name']} after {len(epochs)} epochs, {report['device']}"
    out.print(title)
    out.print(table("", ("images", "loss", "error"), rows))
    best = min(epochs, key=lambda e: e["test_error"])
    out.print(f"lowest test error {best['test_error']:.2%}, after epoch {best['epoch'] + 1}")
    if report["broken_images"]:
        out.print(f"{len(report['broken_images'])} images could not be read: {output / 'broken_images.txt'}")
    if not report["ok"]:
        out.print("[red]the loss is not finite: a smaller --lr may help[/]")
    out.print(f"{report['elapsed_s']:.0f} s; written: {output}")
