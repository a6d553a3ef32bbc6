"""What a training writes while it runs: CSV, TensorBoard's events, curves, a log, and the list of broken images."""

from __future__ import annotations

import csv
import importlib
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_resnet.training.history import Callback, EpochRecord, History, StepRecord

if TYPE_CHECKING:
    from fused_resnet.training.loop import Trainer

logger = logging.getLogger("fused_resnet.training")
logger.setLevel(logging.INFO)  # for the log file; nothing is printed unless the user adds a handler

# Seconds between two drawings of the curves. A drawing takes about half a second.
_REDRAW_S = 60.0


def _optional(module: str, gives: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        logger.info("no %s: %s (pip install 'fused_resnet[train]')", gives, error)
        return None


def draw_curves(history: History, path: Path, title: str) -> None:
    """The loss of every step with the averages of the epochs, and the errors, as a PNG (needs matplotlib)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    loss, error = figure.subplots(1, 2)
    loss.plot([s["step"] for s in history.steps], [s["loss"] for s in history.steps], color="#9aa0a6", linewidth=0.5)
    per_epoch = len(history.steps) / max(1, len(history.epochs))
    ends = [per_epoch * (record["epoch"] + 1) for record in history.epochs]
    rows: list[dict[str, Any]] = asdict(history)["epochs"]
    for part, colour in (("train", "#4c78a8"), ("test", "#e4572e")):
        loss.plot(ends, [row[f"{part}_loss"] for row in rows], color=colour, label=part)
        errors = [100 * row[f"{part}_error"] for row in rows]
        error.plot(ends, errors, color=colour, label=f"{part}: {errors[-1]:.2f} %" if errors else part)
    loss.set_yscale("log")
    loss.set_ylabel("cross-entropy")
    error.set_ylabel("error, %")
    for ax in (loss, error):
        ax.set_xlabel("step")
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


class RunLog(Callback):
    """Writes ``steps.csv``, ``epochs.csv``, ``curves.png``, ``train.log`` and ``tensorboard/`` into a folder.

    Uses TensorBoard and matplotlib if they are installed; otherwise the log says so once.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title = folder, title
        self._handler: logging.Handler = logging.NullHandler()
        self._events: Any = None
        self._drawn_at = time.monotonic()
        self._steps_written = 0

    def start(self, history: History) -> None:
        """Begins, or continues after ``history``: removes what a killed process had written after its checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(self.folder / "train.log")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(self._handler)
        self._append(history.steps, history.epochs, "w")
        self._plots = _optional("matplotlib.figure", "curves")
        if (tensorboard := _optional("torch.utils.tensorboard", "TensorBoard events")) is not None:
            self._events = tensorboard.SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._steps_written)

    def _append(self, steps: Sequence[StepRecord], epochs: Sequence[EpochRecord], mode: str = "a") -> None:
        for name, kind, rows in (("steps", StepRecord, steps), ("epochs", EpochRecord, epochs)):
            with open(self.folder / f"{name}.csv", mode, newline="") as file:
                writer = csv.DictWriter(file, list(kind.__annotations__))
                if mode == "w":
                    writer.writeheader()
                writer.writerows(rows)
        self._steps_written += len(steps)

    def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        """Appends the epoch and its steps."""
        fresh = trainer.history.steps[self._steps_written :]
        self._append(fresh, [record])
        if self._events is not None:
            for step in fresh:
                self._events.add_scalar("step/loss", step["loss"], step["step"])
                self._events.add_scalar("step/lr", step["lr"], step["step"])
            for name, value in record.items():
                if name != "epoch":
                    self._events.add_scalar(f"epoch/{name}", value, self._steps_written - 1)
            self._events.flush()
        if trainer.broken:
            lines = [f"{path}\t{why}\n" for path, why in sorted(trainer.broken.items())]
            (self.folder / "broken_images.txt").write_text("".join(lines))
        if time.monotonic() - self._drawn_at > _REDRAW_S:
            self._draw(trainer.history)

    def _draw(self, history: History) -> None:
        if self._plots is not None and history.epochs:
            draw_curves(history, self.folder / "curves.png", self.title)
        self._drawn_at = time.monotonic()

    def close(self, history: History) -> None:
        """Draws the curves and closes the files."""
        self._draw(history)
        if self._events is not None:
            self._events.close()
        logger.removeHandler(self._handler)
        self._handler.close()
