"""Random crops for training: small images are padded and cropped a batch at a time, photographs one by one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_crop_flip(x: Tensor, pad: int, offsets: Tensor, flipped: Tensor) -> Tensor:
    """Pads each image by zeros, crops it to its old size at its own offset, and mirrors it or not.

    Args:
        x: [N, C, H, W], any dtype.
        pad: pixels on each side.
        offsets: int64 [N, 2], each from 0 to 2*pad: the crop's first row and column.
        flipped: bool [N].

    Returns:
        [N, C, H, W], channels_last.

    Source: Lee et al., arXiv 1409.5185; He et al., arXiv 1512.03385, section 4.2.
    """
    n, _, height, width = x.shape
    padded = F.pad(x, (pad, pad, pad, pad))
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    rows = offsets[:, :1] + row
    columns = offsets[:, 1:] + torch.where(flipped[:, None], column.flip(0), column)
    image = torch.arange(n, device=x.device)
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_box(height: int, width: int, smallest: float, generator: torch.Generator) -> tuple[int, int, int, int, bool]:
    """A crop of a photograph, ``smallest`` to 1 of its area at an aspect ratio of 3/4 to 4/3, and mirrored or not.

    Returns:
        Top, left, height, width, and whether to mirror it.

    Source: Szegedy et al., arXiv 1409.4842, section 6; ``torchvision.transforms.RandomResizedCrop``.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    area, ratio = height * width * uniform(smallest, 1), math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
    h, w = min(height, round(math.sqrt(area / ratio))), min(width, round(math.sqrt(area * ratio)))
    h, w = max(h, 1), max(w, 1)
    top, left = round(uniform(0, height - h)), round(uniform(0, width - w))
    return top, left, h, w, uniform(0, 1) < 0.5
