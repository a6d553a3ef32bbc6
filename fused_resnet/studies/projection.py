"""Zero-padding against 1x1 projections of stride 2, where the shape changes: the cost and the gain of each."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from fused_resnet.studies import costs
from fused_resnet.studies.study import (
    Difference,
    Figures,
    Laboratory,
    Network,
    Preset,
    Study,
    Verdict,
    draw_curves,
    finals,
    spread,
    summary,
    tidy,
)

CLAIM = "B is slightly better than A. We argue that this is because the zero-padded dimensions in A indeed have no"
CLAIM += " residual learning"


def networks(preset: Preset) -> list[Network]:
    return [Network(preset.shortcut_depth, "A"), Network(preset.shortcut_depth, "B")]


def measure(lab: Laboratory) -> Figures:
    found = {}
    for n in networks(lab.preset):
        with torch.device("meta"):
            model = n.build(lab.data.channels, len(lab.data.classes), fused=False)
        cost = {
            "parameters": costs.parameters(model),
            "multiply_adds": costs.multiply_adds(model, lab.data.channels, lab.data.size),
        }
        found[n.name] = summary(lab.runs(n)) | cost
    return {"networks": found}


def judge(figures: Figures) -> list[Verdict]:
    a, b = figures["networks"].values()
    loss = Difference.of(finals(a, "train_loss"), finals(b, "train_loss"))
    error = Difference.of(finals(a, "test_error"), finals(b, "test_error"))
    more = [100 * (b[key] / a[key] - 1) for key in ("parameters", "multiply_adds")]
    errors = f"{spread(finals(a, 'test_error'), 100)} % and {spread(finals(b, 'test_error'), 100)} %"
    sentence = (
        f"A's test error minus B's: {100 * error.value:+.2g} ± {100 * error.error:.1g} points ({errors}); A's final "
        f"training loss minus B's: {loss}. B has {more[0]:.1f} % more parameters, {more[1]:.1f} % more multiply-adds."
    )
    return [Verdict(CLAIM, error.positive, sentence)]


def draw(figures: Figures, figure: Figure) -> None:
    for i, (key, label, scale) in enumerate((("train_loss", "training loss", 1), ("test_error", "test error, %", 100))):
        ax = figure.add_subplot(1, 2, i + 1)
        draw_curves(ax, figures["networks"], key, label, scale)
        tidy(ax)


STUDY = Study(
    "projection",
    "Zero-padding (A) and projection (B) where the shape changes",
    CLAIM,
    "section 4.1, Table 3 (ImageNet, 34 layers: 25.03 % and 24.52 % top-1 error)",
    networks,
    measure,
    judge,
    draw,
)
