"""Options A, B and C: zero-padding, projections where the shape changes, projections everywhere."""

from __future__ import annotations

import statistics

from matplotlib.figure import Figure

from fused_resnet.studies import paper
from fused_resnet.studies.study import (
    COLOURS,
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

BETTER = "all three options are considerably better than the plain counterpart"
SMALL = "the small differences among A/B/C indicate that projection shortcuts are not essential"
OPTIONS = ("A", "B", "C")


def networks(preset: Preset) -> list[Network]:
    return [Network(preset.shortcut_depth, shortcut) for shortcut in (None, *OPTIONS)]  # type: ignore[arg-type]


def measure(lab: Laboratory) -> Figures:
    found = {n.name: summary(lab.runs(n)) for n in networks(lab.preset)}
    return {"networks": found, "published_imagenet_top1_top5_percent": paper.IMAGENET_SHORTCUTS}


def judge(figures: Figures) -> list[Verdict]:
    by_option = {n["network"]["shortcut"]: n for n in figures["networks"].values()}
    losses = {option: finals(n, "train_loss") for option, n in by_option.items()}
    errors = {option: finals(n, "test_error") for option, n in by_option.items()}

    def listed(values: dict[str | None, list[float]], scale: float) -> str:
        return ", ".join(f"{option or 'plain'} {spread(v, scale)}" for option, v in values.items())

    numbers = f"Final training loss: {listed(losses, 1)}; test error in %: {listed(errors, 100)}"
    gaps = {option: Difference.of(losses[None], losses[option]) for option in OPTIONS}
    said = ", ".join(f"{option} {gap}" for option, gap in gaps.items())
    better = Verdict(BETTER, all(gap.positive for gap in gaps.values()), f"{numbers}. Plain is above by {said}.")
    means = [statistics.fmean(losses[option]) for option in OPTIONS]
    among, to_plain = max(means) - min(means), statistics.fmean(losses[None]) - statistics.fmean(means)
    sentence = f"A, B and C lie within {among:.3g} of training loss, and {to_plain:.3g} below the plain network."
    return [better, Verdict(SMALL, among < to_plain, sentence)]


def draw(figures: Figures, figure: Figure) -> None:
    draw_curves(figure.add_subplot(1, 2, 1), figures["networks"], "train_loss", "training loss")
    ax = figure.add_subplot(1, 2, 2)
    for i, (name, network) in enumerate(figures["networks"].items()):
        values = [100 * v for v in finals(network, "test_error")]
        ax.bar(i, statistics.fmean(values), 0.6, color=COLOURS[i], alpha=0.6)
        ax.plot([i] * len(values), values, "k.", markersize=4)
        ax.annotate(name, (i, 0), (0, -12), textcoords="offset points", ha="center", fontsize=8, annotation_clip=False)
    ax.set_xticks([])
    ax.set_ylabel("final test error, % (dots: seeds)")
    tidy(ax, legend=False)


STUDY = Study(
    "shortcuts",
    "Shortcuts of option A, B and C",
    f"{BETTER} ... {SMALL} for addressing the degradation problem",
    "section 4.1, Table 3 (ImageNet, 34 layers; the paper's CIFAR-10 networks are all of option A)",
    networks,
    measure,
    judge,
    draw,
)
