"""Output that the commands share: tables, progress on a terminal, JSON files, models and devices."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

from fused_resnet import models
from fused_resnet.cli.options import UsageError


def console() -> Console:
    """Standard output. If it is not a terminal, tables get the width that they need instead of 80 columns."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def progress(*more: ProgressColumn, quiet: bool = False) -> Progress:
    """A progress bar on standard error, hidden if that is not a terminal or if ``quiet``. ``more``: extra columns."""
    err = Console(stderr=True)
    text, bar, *_ = Progress.get_default_columns()
    columns = (SpinnerColumn(), text, bar, MofNCompleteColumn(), TimeElapsedColumn(), *more)
    return Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Table:
    """A table whose first ``left`` columns are text and whose other columns are numbers."""
    t = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        t.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        t.add_row(*row)
    return t


def write_json(path: str | Path, found: Any) -> None:
    """Writes ``found`` as JSON and creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")


def pick_device(name: str) -> torch.device:
    """The device that ``--device`` names; a UsageError if this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu or cuda")
    return device


@contextmanager
def process_group(device: torch.device, timeout: timedelta | None = None) -> Iterator[torch.device]:
    """Joins torchrun's processes, by NCCL between GPUs, otherwise by gloo, and gives the device of this one.

    Raises:
        UsageError: this machine has fewer GPUs than processes.
    """
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield device
        # Nobody leaves before the first process has written its results, nor while gloo's threads still hold tensors:
        # these would abort a process that ends (pytorch#179291).
        dist.barrier()
    finally:
        dist.destroy_process_group()


def pick_models(chosen: Sequence[str] | None, default: Sequence[str], libraries: Sequence[str] = ()) -> list[str]:
    """The models that ``--models`` names, ``default`` without it; a UsageError if there is no such model."""
    names = list(default if chosen is None else chosen)
    known = [*models.list_models(), *(f"{library}/NAME" for library in libraries)]
    unknown = [name for name in names if name not in known and name.partition("/")[0] not in libraries]
    if unknown or not names:
        raise UsageError(f"--models: expected some of {', '.join(known)}, got {', '.join(unknown) or 'nothing'}")
    return names
