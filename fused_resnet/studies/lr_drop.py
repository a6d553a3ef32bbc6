"""The error falls at once where the rate is divided by ten; augmented training images are harder than test images."""

from __future__ import annotations

import math
import statistics

from matplotlib.figure import Figure

from fused_resnet.studies.study import (
    COLOURS,
    Figures,
    Laboratory,
    Network,
    Preset,
    Study,
    Verdict,
    finals,
    spread,
    summary,
    tidy,
)

FALL = "the error falls suddenly where the learning rate is divided by ten"
ABOVE = "under augmentation the training error stays above the test error while the learning rate is high"
# This many epochs on either side of a division are averaged.
WINDOW = 2
# A fall is sudden if the loss of the epochs before, over that of the epochs after, is at least this.
SUDDEN = 1.25


def networks(preset: Preset) -> list[Network]:
    return [Network(preset.depths[0], "A")]


def measure(lab: Laboratory) -> Figures:
    (network,) = networks(lab.preset)
    runs = lab.runs(network)
    rates: dict[int, float] = {}
    for step in runs[0].history.steps:
        rates.setdefault(step["epoch"], step["lr"])
    augmented = lab.preset.recipe_of(network).augment
    return {"networks": {network.name: summary(runs)}, "lr": list(rates.values()), "augmented": augmented}


def divisions(rates: list[float]) -> list[int]:
    """The epochs before which the rate was at least halved."""
    return [e for e in range(1, len(rates)) if rates[e] <= rates[e - 1] / 2]


def falls(curve: list[float], epoch: int) -> tuple[float, float]:
    """The mean of WINDOW epochs before ``epoch`` over the mean after it; and the same ratio one WINDOW earlier."""
    starts = (epoch - 2 * WINDOW, epoch - WINDOW, epoch)
    means = [statistics.fmean(curve[max(0, e) : max(1, e + WINDOW)]) for e in starts]
    return means[1] / max(means[2], 1e-12), means[0] / max(means[1], 1e-12)


def judge(figures: Figures) -> list[Verdict]:
    network = next(iter(figures["networks"].values()))
    at = divisions(figures["lr"])
    if not at:
        return [Verdict(claim, False, "The rate was never divided in so few epochs.") for claim in (FALL, ABOVE)]
    ratios = [falls(curve, at[0]) for curve in network["train_loss"]]
    now, before = (math.exp(statistics.fmean(math.log(max(r[i], 1e-12)) for r in ratios)) for i in (0, 1))
    tests = [falls(curve, at[0])[0] for curve in network["test_error"] if statistics.fmean(curve[at[0] :]) > 0]
    fall = (
        f"At the first division (epoch {at[0] + 1}) the training loss falls by a factor of {now:.2f} from the {WINDOW} "
        f"epochs before to the {WINDOW} after; one such spell earlier it was {before:.2f}. The test error falls by "
        f"{statistics.fmean(tests) if tests else math.inf:.2f}; in the end it is "
        f"{spread(finals(network, 'test_error'), 100)} %."
    )
    pairs = [
        (a, b)
        for train, test in zip(network["train_loss"], network["test_loss"], strict=True)
        for a, b in zip(train[: at[0]], test[: at[0]], strict=True)
    ]
    ends = [(a[-1], b[-1]) for a, b in zip(network["train_loss"], network["test_loss"], strict=True)]
    share = statistics.fmean(a > b for a, b in pairs)
    above = (
        f"Before the first division the training loss is above the test loss in {100 * share:.0f} % of the epochs; at "
        f"the end it is {spread([a for a, _ in ends])} beside {spread([b for _, b in ends])}. (The training loss is "
        f"that of an epoch's batches as they were trained on, the test loss is measured after the epoch.)"
    )
    held = bool(figures["augmented"]) and share > 0.5
    return [Verdict(FALL, now > SUDDEN and now > before, fall), Verdict(ABOVE, held, above)]


def draw(figures: Figures, figure: Figure) -> None:
    name, network = next(iter(figures["networks"].items()))
    for i, (what, scale) in enumerate((("loss", 1), ("error", 100))):
        ax = figure.add_subplot(1, 2, i + 1)
        for part, label, colour in (("train", "training, augmented", COLOURS[0]), ("test", "test", COLOURS[1])):
            for j, curve in enumerate(network[f"{part}_{what}"]):
                values = [scale * v for v in curve]
                ax.plot(range(1, len(curve) + 1), values, color=colour, linewidth=1, label=None if j else label)
        for e in divisions(figures["lr"]):
            ax.axvline(e + 0.5, color="#9aa0a6", linewidth=0.8, linestyle=":")
        ax.set_yscale("log" if what == "loss" else "symlog")
        if what == "error":
            ax.set_ylim(bottom=0)
        ax.set_xlabel("epoch (dotted: rate divided by ten)")
        ax.set_ylabel(f"{what}{', %' if scale == 100 else ''}, {name}")
        tidy(ax)


STUDY = Study(
    "lr-drop",
    "The learning rate divided by ten",
    f"{FALL}; {ABOVE} (what the curves show; the paper says it in no sentence)",
    "section 4.2, Fig. 6 (CIFAR-10) and section 4.1, Fig. 4 (ImageNet)",
    networks,
    measure,
    judge,
    draw,
)
