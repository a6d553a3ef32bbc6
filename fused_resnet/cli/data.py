"""The images: the two photographs that ship with scikit-learn, and its handwritten digits."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

# Per channel, of ImageNet's training images: what torchvision's weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def photographs(batch_size: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random crops of china.jpg and flower.jpg in turn, as a training pipeline for ImageNet makes them.

    Each crop covers 20 to 100 % of its photograph at an aspect ratio of 3/4 to 4/3, is mirrored half of the time,
    resized with antialiasing and normalised.

    Returns:
        Images [batch_size, 3, size, size], float32, channels_last, on the CPU; and labels [batch_size], the index of
        the photograph.

    Source: Szegedy et al., arXiv 1409.4842, section 6; ``torchvision.transforms.RandomResizedCrop``.
    """
    sources = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    crops = []
    for i in range(batch_size):
        image = sources[i % len(sources)]
        height, width = image.shape[1:]
        area, ratio = height * width * uniform(0.2, 1), math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = min(height, round(math.sqrt(area / ratio))), min(width, round(math.sqrt(area * ratio)))
        top, left = round(uniform(0, height - h)), round(uniform(0, width - w))
        crop = image[None, :, top : top + h, left : left + w]
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        crops.append(crop.flip(2) if uniform(0, 1) < 0.5 else crop)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    x = (torch.stack(crops) - mean) / std
    return x.contiguous(memory_format=torch.channels_last), torch.arange(batch_size) % len(sources)


class Digits(NamedTuple):
    """Handwritten digits, [N, 1, 16, 16] float32 normalised, and which they are, [N]; four fifths are to train on."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(seed: int) -> Digits:
    """scikit-learn's 1,797 digits of 8x8 pixels, enlarged to 16x16 and shuffled."""
    found = load_digits()
    x = torch.from_numpy(numpy.asarray(found.images, dtype=numpy.float32))[:, None] / 16
    x = F.interpolate(x, (16, 16), mode="bilinear")
    y = torch.from_numpy(numpy.asarray(found.target, dtype=numpy.int64))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    split = len(x) * 4 // 5
    x = (x - x[:split].mean()) / x[:split].std()
    return Digits(x[:split], y[:split], x[split:], y[split:])
