"""The compiled library: its file, and what it says of itself. Its operators are in ``torch.ops`` once it is loaded."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch

PATH = Path(__file__).parents[1] / "lib" / "libfused_resnet.so"


def unavailable() -> str | None:
    """The reason why the library can't be used, or None: then it is loaded."""
    if os.environ.get("FUSED_RESNET_NO_EXT") == "1":
        return "switched off: FUSED_RESNET_NO_EXT=1"
    return _load()


@lru_cache
def _load() -> str | None:
    if not PATH.exists():
        return "the compiled extension is not built"
    try:
        torch.ops.load_library(PATH)
    except OSError as error:
        return f"the compiled extension can't be loaded: {error}"
    return None


def build_info() -> dict[str, str]:
    """How the library was built and which instruction set it uses; empty without the library."""
    if unavailable() is not None:
        return {}
    words = torch.ops.fused_resnet_library.build_info()
    return dict(zip(words[::2], words[1::2]))


def cuda_status() -> str:
    """Why the library's CUDA kernels can't run on the current device, empty if they can."""
    return str(torch.ops.fused_resnet_library.cuda_status())
