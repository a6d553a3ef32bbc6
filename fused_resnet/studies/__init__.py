"""The paper's experiments: measured, drawn beside the paper's claim, and judged.

``STUDIES`` has them by name; a :class:`Laboratory` of a preset runs any number of them and trains each network once.
"""

from fused_resnet.studies import comparisons, curves, deep, gradients, responses
from fused_resnet.studies.pool import WorkerLost
from fused_resnet.studies.presets import PRESETS
from fused_resnet.studies.study import Laboratory, Network, Preset, Result, Study, Verdict

STUDIES: dict[str, Study] = {
    study.name: study()
    for study in (
        comparisons.Degradation,
        comparisons.Shortcuts,
        comparisons.Projection,
        comparisons.Bottlenecks,
        responses.Responses,
        gradients.Gradients,
        curves.Convergence,
        curves.LrDrop,
        deep.Deep,
    )
}

__all__ = ["PRESETS", "STUDIES", "Laboratory", "Network", "Preset", "Result", "Study", "Verdict", "WorkerLost"]
