"""Image files, decoded when they are needed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused_resnet.training.augment import random_box

# The smallest share of an image's area in a crop, as in torchvision's RandomResizedCrop and the papers that use it.
SMALLEST_CROP = 0.08
# The shorter side of a test image over the side of the crop from its middle: 256 to 224 in the paper.
TEST_MARGIN = 256 / 224


class BrokenImage(Exception):
    """The file does not hold a readable image; the message says why."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files below a folder. Reading one gives uint8 [3, size, size].

    Args:
        root: the folder. names: paths in it, with "/". size: H = W of the images.
    """

    root: Path
    names: Sequence[str]
    size: int

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int, generator: torch.Generator | None) -> Tensor:
        """Image ``i`` as RGB: a random crop by ``generator``, or the middle of it without one.

        Raises:
            BrokenImage: the file is missing, truncated, or not an image.
        """
        from PIL import Image

        side, flip = self.size, False
        try:
            with Image.open(self.root / self.names[i]) as opened:
                image = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise BrokenImage(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
        width, height = image.size
        if generator is None:
            crop = min(width, height) / TEST_MARGIN
            left, top = (width - crop) / 2, (height - crop) / 2
            box = (left, top, left + crop, top + crop)
        else:
            y, x, h, w, flip = random_box(height, width, SMALLEST_CROP, generator)
            box = (x, y, x + w, y + h)
        image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
        return pixels.flip(2) if flip else pixels
