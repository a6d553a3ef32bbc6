"""The sizes at which the studies run: quick, on digits, and the paper's, on CIFAR-10."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fused_resnet.studies.study import Preset
from fused_resnet.training import Recipe
from fused_resnet.training import data as datasets
from fused_resnet.training import recipe as recipes


def _digits(folder: Path | None) -> datasets.ImageData:
    if folder is not None:
        raise datasets.DataError(f"the quick preset's digits come with scikit-learn: expected no --data, got {folder}")
    return datasets.digits(size=8)


# The paper's recipe except for the rate and the length. At 0.1 the first updates of a 56-layer network turn so many
# ReLUs off that it does not recover within some hundred steps.
_QUICK = Recipe(epochs=30, lr=0.03)
# Weight decay makes responses small: it acts on BN's scales, which begin at 1, during a long training. In these 330
# updates the paper's 1e-4 leaves the scales where they began. So: five times the updates, ten times the decay.
_RESPONSES = Recipe(epochs=35, batch_size=32, weight_decay=1e-3)
_PAPER = recipes.named("paper")

PRESETS = {
    # 330 updates of 128 images of 8x8: so nine studies take minutes on two cores
    "quick": Preset(
        name="quick",
        data=_digits,
        recipe=_QUICK,
        deep_recipe=replace(_QUICK, warmup="error"),
        depths=(20, 56),
        deepest=110,
        shortcut_depth=20,
        bottleneck_depth=29,
        response_depths=((8, 20), (8, 20, 56)),
        response_recipe=_RESPONSES,
        all_seeds_up_to=56,
    ),
    "paper": Preset(
        name="paper",
        data=datasets.cifar10,
        recipe=_PAPER,
        deep_recipe=recipes.named("paper", model="resnet110"),
        depths=(20, 32, 44, 56),
        deepest=110,
        shortcut_depth=56,
        bottleneck_depth=83,
        response_depths=((20, 32, 44, 56), (20, 32, 44, 56, 110)),
        all_seeds_up_to=110,
        keep=True,
        extreme_batch=128,
        train_extreme=True,
    ),
}
