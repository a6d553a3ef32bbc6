"""The benchmark's images: crops of the two photographs that ship with scikit-learn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.training.augment import random_box
from fused_resnet.training.folder import MEAN, STD


def photographs(batch_size: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random crops of china.jpg and flower.jpg in turn, like those of a training pipeline for ImageNet.

    Each crop covers 20 to 100 % of its photograph at an aspect ratio of 3/4 to 4/3. Half of the crops are mirrored. All
    are resized with antialiasing and normalised.

    Returns:
        Images [batch_size, 3, size, size], float32, channels_last, on the CPU; and labels [batch_size], the index of
        the photograph.
    """
    from sklearn.datasets import load_sample_images  # of the extra [bench]: cases of other images run without it

    sources = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(seed)
    crops = []
    for i in range(batch_size):
        image = sources[i % len(sources)]
        top, left, h, w, flip = random_box(image.shape[1], image.shape[2], 0.2, generator)
        crop = image[None, :, top : top + h, left : left + w]
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        crops.append(crop.flip(2) if flip else crop)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    x = (torch.stack(crops) - mean) / std
    return x.contiguous(memory_format=torch.channels_last), torch.arange(batch_size) % len(sources)
