"""The paper's experiments, each a file: measured, drawn beside the paper's claim, and judged.

``STUDIES`` has them by name; a :class:`Laboratory` of a preset runs any number of them and trains each network once.
"""

from fused_resnet.studies import (
    bottleneck,
    convergence,
    deep,
    degradation,
    gradients,
    lr_drop,
    projection,
    responses,
    shortcuts,
)
from fused_resnet.studies.pool import WorkerLost
from fused_resnet.studies.presets import PRESETS
from fused_resnet.studies.study import Laboratory, Network, Preset, Result, Study, Verdict

_ALL = (degradation, shortcuts, projection, bottleneck, responses, gradients, convergence, lr_drop, deep)
STUDIES = {module.STUDY.name: module.STUDY for module in _ALL}

__all__ = ["PRESETS", "STUDIES", "Laboratory", "Network", "Preset", "Result", "Study", "Verdict", "WorkerLost"]
