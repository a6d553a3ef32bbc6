"""The datasets: scikit-learn's digits, CIFAR-10 in its usual file formats, and folders of class folders."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fused_resnet.training.cifar10 import cifar10
from fused_resnet.training.folder import image_folder
from fused_resnet.training.images import DataError, ImageData, statistics

__all__ = ["DataError", "ImageData", "cifar10", "digits", "image_folder", "statistics"]


def digits(split_seed: int = 0, size: int = 16) -> ImageData:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, enlarged to 16x16; four fifths are to train on.

    Args:
        split_seed: decides which images are to train on.
        size: pixels of each side, a multiple of 8; 8 leaves the images as they are.

    Returns:
        Images uint8 [N, 1, size, size]; crops move by size / 8 pixels (the paper: 4 of 32); no image is mirrored.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.images).float()[:, None] / 16
    x = (F.interpolate(x, (size, size), mode="bilinear") * 255).round().to(torch.uint8)
    y = torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split_seed))
    x, y = x[order], y[order]
    split = len(x) * 4 // 5
    images, classes = (x[:split], y[:split], x[split:], y[split:]), tuple(map(str, range(10)))
    different = f"the paper has no such data: {size}x{size}, one channel, crops move by {size // 8} px, no flips"
    return ImageData(
        "digits", *images, classes, *statistics(x[:split]), size, pad=size // 8, flip=False, deviations=(different,)
    )
