"""A dataset for training: images, labels, and how the images are normalised and augmented."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_resnet.training.files import ImageFiles


class DataError(ValueError):
    """The dataset can't be used; the message says what was expected, and where."""


@dataclass(frozen=True)
class ImageData:
    """Training and test images with their labels.

    Args:
        name: for reports and checkpoints.
        train_x, test_x: uint8 [N, C, H, W], or :class:`ImageFiles`, decoded when they are needed.
        train_y, test_y: int64 [N], indices into ``classes``.
        classes: their names.
        mean, std: per channel, of pixels in 0..1; images are normalised by these.
        size: H = W of the images that a network gets.
        pad, flip: the augmentation of images in memory. pad: the width of the border of zeros before the random crop.
            flip: whether a mirrored image is still one of its class.
        deviations: one sentence for each way in which the data's treatment differs from the paper's.

    Raises:
        DataError: there are no images; labels differ in number from the images or lie outside the classes; images have
            another type or shape.
    """

    name: str
    train_x: Tensor | ImageFiles
    train_y: Tensor
    test_x: Tensor | ImageFiles
    test_y: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    pad: int = 4
    flip: bool = True
    deviations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if isinstance(x, Tensor):
                expected = f"uint8 [N, {self.channels}, {self.size}, {self.size}]"
                if x.dtype != torch.uint8 or x.shape[1:] != (self.channels, self.size, self.size):
                    raise DataError(f"{self.name}: {part}_x must be {expected}, got {x.dtype} {list(x.shape)}")
            if not len(x):
                raise DataError(f"{self.name}: there are no {part} images")
            if y.dtype != torch.int64 or y.shape != (len(x),):
                expected = f"int64 [{len(x)}], one per image"
                raise DataError(f"{self.name}: {part}_y must be {expected}, got {y.dtype} {list(y.shape)}")
            if int(y.min()) < 0 or int(y.max()) >= len(self.classes):
                found = f"{int(y.min())} to {int(y.max())}"
                raise DataError(f"{self.name}: {part}_y must lie in 0..{len(self.classes) - 1}, got {found}")

    @property
    def channels(self) -> int:
        """The number of channels of the images."""
        return len(self.mean)

    @property
    def in_memory(self) -> bool:
        """Whether the images are tensors; otherwise they are files."""
        return isinstance(self.train_x, Tensor)

    def to(self, device: torch.device) -> ImageData:
        """The data with the images in memory moved to ``device``."""
        if not (isinstance(self.train_x, Tensor) and isinstance(self.test_x, Tensor)):
            return self
        moved = [t.to(device) for t in (self.train_x, self.train_y, self.test_x, self.test_y)]
        return replace(self, train_x=moved[0], train_y=moved[1], test_x=moved[2], test_y=moved[3])

    def normalise(self, x: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> float32, channels_last, zero mean and unit variance over the training images."""
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return ((x.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    def identity(self) -> dict[str, Any]:
        """Identifies the data: a training resumes from a checkpoint only with the same data."""
        found = {"name": self.name, "classes": list(self.classes), "size": self.size}
        for part, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            digest = hashlib.blake2b(y.cpu().numpy().tobytes(), digest_size=16)
            digest.update(x.cpu().numpy().tobytes() if isinstance(x, Tensor) else "\0".join(x.names).encode())
            found |= {f"{part}_images": len(x), f"{part}_hash": digest.hexdigest()}
        return found


def statistics(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 [N, C, H, W] as numbers in 0..1, exact: from histograms."""
    values = torch.arange(256, dtype=torch.float64) / 255
    share = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in x.unbind(1)]).double()
    share /= share.sum(1, keepdim=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())
