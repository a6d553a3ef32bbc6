"""Checkpoints that survive a power cut, and that only the training which wrote them goes on with."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

NAME = "checkpoint.pt"


class ResumeError(ValueError):
    """A checkpoint that this training can't go on with; the message names what differs."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes ``state`` so that ``path`` holds, at any moment, the old content whole or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # without it the new name itself may be lost
    finally:
        os.close(folder)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What ``save`` wrote; nothing but tensors and plain values is read.

    Raises:
        ResumeError: it is no checkpoint.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # of zip, of pickle, of torch: they share no class
        raise ResumeError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from error


def check_same(what: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a ResumeError that names every entry in which ``now`` differs from the checkpoint's."""
    pairs = [(key, saved.get(key), now.get(key)) for key in {**saved, **now}]
    different = [f"{what}.{key} is {a!r} in the checkpoint and {b!r} now" for key, a, b in pairs if a != b]
    if different:
        raise ResumeError("; ".join(different))


def rng_state() -> dict[str, Any]:
    """Of torch on the CPU and on this process's GPU, and of Python."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """The opposite of ``rng_state``."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    random.setstate(state["python"])
