"""Checkpoints that survive a power cut. Only a training with the same settings resumes from one."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

NAME = "checkpoint.pt"


class ResumeError(ValueError):
    """This training can't resume from the checkpoint; the message names the difference."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes ``state`` atomically: at any moment ``path`` holds either the whole old content or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # otherwise the new name may be lost
    finally:
        os.close(folder)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads what ``save`` wrote; it accepts only tensors and plain values.

    Raises:
        ResumeError: the file is not a checkpoint.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zip, pickle and torch raise exceptions without a common class
        raise ResumeError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from error


def check_same(what: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a ResumeError that names every entry in which ``now`` differs from the checkpoint's."""
    pairs = [(key, saved.get(key), now.get(key)) for key in {**saved, **now}]
    different = [f"{what}.{key} is {a!r} in the checkpoint and {b!r} now" for key, a, b in pairs if a != b]
    if different:
        raise ResumeError("; ".join(different))


def rng_state() -> dict[str, Any]:
    """The generators' states of torch on the CPU and on this process's GPU, and of Python."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Sets the states that ``rng_state`` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    random.setstate(state["python"])
