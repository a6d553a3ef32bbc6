"""Shallow residual networks converge faster than plain ones that reach the same loss."""

from __future__ import annotations

import math
import statistics

from matplotlib.figure import Figure

from fused_resnet.studies.study import (
    Difference,
    Figures,
    Laboratory,
    Network,
    Preset,
    Study,
    Verdict,
    spread,
    tidy,
)

CLAIM = (
    'When the net is "not overly deep" (18 layers here), the current SGD solver is still able to find good solutions '
    "to the plain net. In this case, the ResNet eases the optimization by providing faster convergence at the early "
    "stage"
)
# Shares of the loss of guessing; the second decides.
SHARES = (0.5, 0.25, 0.125)
WINDOW = 10


def networks(preset: Preset) -> list[Network]:
    return [Network(preset.depths[0], None), Network(preset.depths[0], "A")]


def smooth(losses: list[float], window: int = WINDOW) -> list[float]:
    """The mean of the last ``window`` steps; of fewer steps at the start."""
    return [statistics.fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]


def reached(losses: list[float], threshold: float) -> int:
    """The first step at which the smooth loss is below the level; the number of steps if it never is."""
    return next((i + 1 for i, loss in enumerate(smooth(losses)) if loss < threshold), len(losses))


def measure(lab: Laboratory) -> Figures:
    guessing = math.log(len(lab.data.classes))
    losses = {n.name: [[s["loss"] for s in run.history.steps] for run in lab.runs(n)] for n in networks(lab.preset)}
    steps = {n: {str(s): [reached(run, s * guessing) for run in runs] for s in SHARES} for n, runs in losses.items()}
    # a curve keeps at most some hundred points per seed: CIFAR-10's 64,000 steps would take megabytes
    stride = max(1, len(next(iter(losses.values()))[0]) // 400)
    curves = {n: [smooth(run)[::stride] for run in runs] for n, runs in losses.items()}
    return {"guessing": guessing, "steps_to_reach": steps, "stride": stride, "smooth_loss": curves}


def judge(figures: Figures) -> list[Verdict]:
    (plain_name, plain), (name, residual) = figures["steps_to_reach"].items()
    saved = {share: Difference.of(plain[share], residual[share]) for share in residual}
    decides = str(SHARES[1])
    others = "; ".join(
        f"{float(share):.3g} of guessing: {spread(plain[share])} and {spread(residual[share])}"
        for share in residual
        if share != decides
    )
    sentence = (
        f"{plain_name} needs {spread(plain[decides])} steps to a quarter of the loss of guessing, {name} "
        f"{spread(residual[decides])} (difference {saved[decides]}); to {others}."
    )
    return [Verdict(CLAIM, saved[decides].positive, sentence)]


def draw(figures: Figures, figure: Figure) -> None:
    ax = figure.add_subplot()
    for (name, runs), style, colour in zip(
        figures["smooth_loss"].items(), ("--", "-"), ("#4c78a8", "#e4572e"), strict=True
    ):
        for i, run in enumerate(runs):
            steps = [1 + figures["stride"] * j for j in range(len(run))]
            ax.plot(steps, run, style, color=colour, linewidth=1, label=None if i else name)
    for share in SHARES:
        ax.axhline(share * figures["guessing"], color="#9aa0a6", linewidth=0.6)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel(f"training loss, mean of {WINDOW} steps (a line per seed)")
    tidy(ax)


STUDY = Study(
    "convergence",
    "Convergence of a shallow plain and a shallow residual network",
    CLAIM,
    "section 4.1, Fig. 4 (ImageNet, 18 layers)",
    networks,
    measure,
    judge,
    draw,
)
