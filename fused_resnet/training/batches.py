"""The images of each batch, and their augmentation: (seed, epoch, step) alone decides both.

So a training that was interrupted continues with the same batches that it would have had. Neither the number of workers
nor the number of images drawn before matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fused_resnet.training.augment import pad_crop_flip
from fused_resnet.training.files import BrokenImage, ImageFiles
from fused_resnet.training.images import DataError, ImageData

# If this many images in a row can't be read, the folder is at fault.
_TRIES = 100


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed, different for every combination."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def epoch_order(images: int, seed: int, epoch: int) -> Tensor:
    """The order of the training images in one epoch: int64 [images]."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(derived_seed("order", seed, epoch)))


class Batch(NamedTuple):
    """uint8 images [N, C, H, W], their labels [N], and {path: why} of the files that could not be read."""

    x: Tensor
    y: Tensor
    broken: dict[str, str]


@dataclass(frozen=True)
class Share:
    """The part of every batch that this process takes."""

    rank: int = 0
    world: int = 1

    def of(self, t: Tensor) -> Tensor:
        """Every ``world``-th element, from ``rank`` on."""
        return t[self.rank :: self.world]


@dataclass(frozen=True)
class Batches:
    """The batches of a training and of its tests.

    Args:
        data: in memory, on the device of the batches, or files.
        batch_size: over all processes. seed: of order and augmentation. augment: crops and flips.
        share: this process's part. workers: processes that decode files; 0: this process does.
    """

    data: ImageData
    batch_size: int
    seed: int
    augment: bool
    share: Share = field(default_factory=Share)
    workers: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches in the training images."""
        return len(self.data.train_x) // self.batch_size

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's share of the batches of an epoch, from batch ``start`` on.

        Raises:
            DataError: a hundred files in a row can't be read.
        """
        whole = self.steps_per_epoch * self.batch_size
        order = epoch_order(len(self.data.train_x), self.seed, epoch)[:whole].split(self.batch_size)[start:]
        mine = [self.share.of(indices) for indices in order]
        random = (self.seed, epoch) if self.augment else None
        late = self.augment and self.data.in_memory  # files are augmented as they are decoded
        for step, batch in enumerate(self._read(self.data.train_x, self.data.train_y, mine, True, random), start):
            yield batch._replace(x=self._augmented(batch.x, epoch, step)) if late else batch

    def test(self) -> Iterator[Batch]:
        """This process's share of the test images. Files that can't be read are left out; a batch may be empty."""
        indices = self.share.of(torch.arange(len(self.data.test_x))).split(self.batch_size)
        return self._read(self.data.test_x, self.data.test_y, indices, False, None)

    def _augmented(self, x: Tensor, epoch: int, step: int) -> Tensor:
        # drawn for the whole batch, so that an image's crop does not depend on how many processes share it
        generator = torch.Generator().manual_seed(derived_seed("augment", self.seed, epoch, step))
        offsets = torch.randint(2 * self.data.pad + 1, (self.batch_size, 2), generator=generator)
        flipped = torch.rand(self.batch_size, generator=generator) < (0.5 if self.data.flip else 0)
        return pad_crop_flip(x, self.data.pad, *(self.share.of(t).to(x.device) for t in (offsets, flipped)))

    def _read(
        self, x: Tensor | ImageFiles, y: Tensor, order: Sequence[Tensor], replace: bool, random: tuple[int, int] | None
    ) -> Iterator[Batch]:
        """A batch for each element of ``order``, its indices; ``replace`` and ``random`` are :class:`_Decoding`'s."""
        if isinstance(x, Tensor):
            yield from (Batch(x[i], y[i], {}) for i in (indices.to(x.device) for indices in order))
            return
        dataset = _Decoding(x, y, replace, random)
        # its own generator: otherwise a DataLoader draws from torch's global one, once per epoch or resumption
        yield from DataLoader(
            dataset,
            batch_sampler=[b.tolist() for b in order],
            collate_fn=dataset.collate,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )


@dataclass(frozen=True)
class _Decoding(Dataset):
    """The image and the label of an index, and the broken files met on the way.

    Args:
        replace: take the next readable image, with its label, in the place of an unreadable one, so that batches keep
            their size. random: seed and epoch of the augmentation.
    """

    files: ImageFiles
    labels: Tensor
    replace: bool
    random: tuple[int, int] | None

    def __getitem__(self, i: int) -> tuple[Tensor | None, Tensor, dict[str, str]]:
        broken: dict[str, str] = {}
        generator = torch.Generator().manual_seed(derived_seed("crop", *self.random, i)) if self.random else None
        for j in range(i, i + (min(_TRIES, len(self.files)) if self.replace else 1)):
            k = j % len(self.files)
            try:
                return self.files.read(k, generator), self.labels[k], broken
            except BrokenImage as error:
                broken[self.files.names[k]] = str(error)
        if self.replace:
            name, why = next(iter(broken.items()))
            raise DataError(f"{self.files.root}: {len(broken)} images in a row can't be read, the first {name}: {why}")
        return None, self.labels[i], broken

    def collate(self, items: list[tuple[Tensor | None, Tensor, dict[str, str]]]) -> Batch:
        """A batch of the images that could be read."""
        found = [(x, y) for x, y, _ in items if x is not None]
        broken = {name: why for _, _, some in items for name, why in some.items()}
        if not found:
            side = self.files.size
            return Batch(torch.empty(0, 3, side, side, dtype=torch.uint8), self.labels[:0], broken)
        return Batch(torch.stack([x for x, _ in found]), torch.stack([y for _, y in found]), broken)
