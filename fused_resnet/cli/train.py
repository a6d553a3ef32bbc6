"""``fused-resnet train``: a network of the paper on digits, CIFAR-10 or a folder of images, alone or under torchrun."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress, TimeRemainingColumn
from torch import Tensor, nn

from fused_resnet import models
from fused_resnet.cli.console import console, pick_device, pick_models, process_group, progress, table, write_json
from fused_resnet.cli.env import cores, head
from fused_resnet.cli.options import UsageError, usage
from fused_resnet.training import Callback, DataError, ImageData, Recipe, ResumeError, Trainer, checkpoint, data, named
from fused_resnet.training.logs import logger

# Seconds between two reads of the running loss. Each read waits for the device.
_REFRESH_S = 0.25
# Processes that decode images: these deliver more than an ordinary network on a GPU can use.
_MOST_WORKERS = 8


class _Bar(Callback):
    """The progress bar: epoch, loss, error, images per second; rich adds the time that is left."""

    def __init__(self, bar: Progress, recipe: Recipe) -> None:
        self.bar, self.recipe, self.seen_at = bar, recipe, time.perf_counter()
        self.task = bar.add_task("", total=None)

    def on_step(self, trainer: Trainer, step: int, loss: Tensor) -> None:
        if (now := time.perf_counter()) - self.seen_at < _REFRESH_S:
            return
        self.seen_at = now
        mean, error = trainer.running()
        speed = (self.bar.tasks[self.task].speed or 0.0) * self.recipe.batch_size
        # fits, with the bar and the times, into a terminal of 80 columns
        epoch = f"epoch {step // trainer.steps_per_epoch + 1}/{self.recipe.epochs}"
        text = f"{epoch} loss {mean:.3f} acc {1 - error:.1%} {speed:.0f} images/s"
        total = self.recipe.epochs * trainer.steps_per_epoch
        self.bar.update(self.task, description=text, completed=step, total=total)


def _images(words: str, model: str) -> ImageData:
    """The data that ``--data`` names."""
    kind, _, path = words.partition(":")
    if words == "digits":
        return data.digits()
    if kind == "cifar10":
        return data.cifar10(path or None)
    return data.image_folder(words, 224 if model in models.list_models("imagenet") else 32)


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


def run(args: argparse.Namespace) -> int:
    """Trains, alone or with torchrun's other processes. Returns 0 if the losses stay finite, else 1."""
    output = Path(args.output)
    if (output / checkpoint.NAME).exists() and not args.resume:
        raise UsageError(f"--output {output} holds a checkpoint: --resume continues from it; or name another folder")
    device = pick_device(args.device)
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return _train(args, output, device, True)
    with process_group(device) as own:
        return _train(args, output, own, dist.get_rank() == 0)


def _train(args: argparse.Namespace, output: Path, device: torch.device, leads: bool) -> int:
    start = time.perf_counter()
    pick_models([args.model], [])
    with usage(f"--data {args.data}: ", DataError):
        found = _images(args.data, args.model)
    imagenet = not found.in_memory
    given = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "dtype": args.dtype}
    changes = {name: value for name, value in given.items() if value is not None}
    with usage("the recipe: ", TypeError, ValueError):
        recipe = named(args.recipe, model=args.model, imagenet=imagenet, **changes)
    model = _model(args.model, found, args.plain, args.seed)
    parameters = sum(p.numel() for p in model.parameters())
    paper = named("paper", model=args.model, imagenet=imagenet)
    deviations = [*recipe.differences(paper, mine="here", theirs="in the paper's recipe"), *found.deviations]
    workers = args.workers if args.workers is not None else 0 if found.in_memory else min(_MOST_WORKERS, cores())
    with progress(TimeRemainingColumn(), quiet=not leads) as bar:
        with usage("", ValueError), usage("--resume: ", ResumeError):
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
        handler = logging.StreamHandler(sys.stdout)  # rich replaces it: the log is printed above the bar
        if leads:
            logger.addHandler(handler)
            _announce(args, found, parameters, deviations, trainer.step)
        try:
            with usage(f"--data {args.data}: ", DataError):
                history = trainer.run()
        finally:
            logger.removeHandler(handler)
    ok = math.isfinite(history.epochs[-1]["train_loss"] + history.epochs[-1]["test_loss"])
    if leads:
        images = {"name": found.name, "train": len(found.train_x), "test": len(found.test_x)}
        report: dict[str, Any] = {
            "ok": ok,
            **head(device),
            "processes": trainer.share.world,
            "model": args.model,
            "plain": args.plain,
            "parameters": parameters,
            "data": images | {"classes": found.classes},
            "seed": args.seed,
            "recipe": asdict(recipe),
            "not_as_in_the_paper": deviations,
            "broken_images": trainer.broken,
            "history": asdict(history),
            "elapsed_s": round(time.perf_counter() - start, 1),
        }
        for path in filter(None, (output / "results.json", args.json)):
            write_json(path, report)
        _print(report, output)
    return 0 if ok else 1


def _announce(
    args: argparse.Namespace, found: ImageData, parameters: int, deviations: Sequence[str], step: int
) -> None:
    """Logs the model, the data, and the differences from the paper."""
    variant = "plain PyTorch" if args.plain else "fused"
    images = f"{len(found.train_x):,} training and {len(found.test_x):,} test images"
    logger.info("%s (%s parameters, %s) on %s: %s", args.model, f"{parameters:,}", variant, args.data, images)
    for sentence in deviations:
        logger.info("not as in the paper: %s", sentence)
    if args.resume and not step:
        logger.info("nothing to resume in %s: starts from the beginning", args.output)


def _print(report: dict[str, Any], output: Path) -> None:
    epochs = report["history"]["epochs"]
    last, out = epochs[-1], console()
    rows = [(part, f"{last[f'{part}_loss']:.4f}", f"{last[f'{part}_error']:.2%}") for part in ("train", "test")]
    title = f"{report['model']} on {report['data']['name']} after {len(epochs)} epochs, {report['device']}"
    out.print(table(title, ("images", "loss", "error"), rows))
    best = min(epochs, key=lambda e: e["test_error"])
    out.print(f"lowest test error {best['test_error']:.2%}, after epoch {best['epoch'] + 1}")
    if report["broken_images"]:
        out.print(f"{len(report['broken_images'])} images could not be read: {output / 'broken_images.txt'}")
    if not report["ok"]:
        out.print("[red]the loss is not finite: a smaller --lr may help[/]")
    out.print(f"{report['elapsed_s']:.0f} s; written: {output}")
