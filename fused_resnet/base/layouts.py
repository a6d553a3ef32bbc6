"""Memory layouts of images: contiguous, or channels_last, which has another name for each number of dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(t: Tensor) -> torch.memory_format:
    """The channels_last layout of images [N, C, H, W] or [N, C, D, H, W] like ``t``."""
    return _CHANNELS_LAST[t.dim()]


def is_channels_last(t: Tensor) -> bool:
    """Whether it is an image that is dense in this layout. With sizes of 1 it may be contiguous too."""
    layout = _CHANNELS_LAST.get(t.dim())
    return layout is not None and t.is_contiguous(memory_format=layout)


def layout_of(t: Tensor) -> torch.memory_format:
    """The layout of a dense image."""
    return channels_last(t) if is_channels_last(t) else torch.contiguous_format
