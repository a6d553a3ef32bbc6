"""Made-up images in the forms in which CIFAR-10 is distributed."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return x, torch.randint(10, (n,), generator=generator)


TRAIN, TEST = [pictures(7, seed) for seed in range(5)], pictures(9, 5)


def write_python(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name, (x, y) in [(f"data_batch_{i + 1}", part) for i, part in enumerate(TRAIN)] + [("test_batch", TEST)]:
        batch = {b"data": x.reshape(len(x), -1).numpy(), b"labels": y.tolist(), b"batch_label": b"made up"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def write_binary(root: Path) -> None:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    for name, (x, y) in [(f"data_batch_{i + 1}", part) for i, part in enumerate(TRAIN)] + [("test_batch", TEST)]:
        (folder / f"{name}.bin").write_bytes(torch.cat([y[:, None].to(torch.uint8), x.flatten(1)], 1).numpy().tobytes())
