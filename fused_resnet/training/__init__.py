"""Training: recipes, datasets, the loop, checkpoints and logs. ``fused-resnet train`` is a thin layer over it.

from fused_resnet.training import Trainer, data, named
history = Trainer(fused_resnet.models.resnet20(), data.cifar10("data"), named("paper"), output="run").run()
"""

from fused_resnet.training import checkpoint, data
from fused_resnet.training.checkpoint import ResumeError
from fused_resnet.training.history import Callback, EpochRecord, History, StepRecord
from fused_resnet.training.images import DataError, ImageData
from fused_resnet.training.loop import Trainer
from fused_resnet.training.recipe import RECIPES, Recipe, named

__all__ = [
    "RECIPES",
    "Callback",
    "DataError",
    "EpochRecord",
    "History",
    "ImageData",
    "Recipe",
    "ResumeError",
    "StepRecord",
    "Trainer",
    "checkpoint",
    "data",
    "named",
]
