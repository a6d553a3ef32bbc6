"""Plain networks get worse with depth; residual ones do not."""

from __future__ import annotations

from matplotlib.figure import Figure

from fused_resnet.studies import paper
from fused_resnet.studies.study import (
    Difference,
    Figures,
    Laboratory,
    Network,
    Preset,
    Study,
    Verdict,
    beside_published,
    draw_curves,
    finals,
    spread,
    summary,
)

PLAIN = "the deep plain nets suffer from increased depth, and exhibit higher training error when going deeper"
RESIDUAL = "our ResNets manage to overcome the optimization difficulty"


def networks(preset: Preset) -> list[Network]:
    return [Network(depth, shortcut) for shortcut in (None, "A") for depth in preset.depths]


def measure(lab: Laboratory) -> Figures:
    found = {n.name: summary(lab.runs(n)) for n in networks(lab.preset)}
    published = {f"ResNet-{d}": e for d, e in paper.CIFAR10_ERROR.items()} if lab.data.name == "cifar10" else {}
    return {"networks": found, "published_test_error_percent": published}


def judge(figures: Figures) -> list[Verdict]:
    verdicts = []
    for claim, plain in ((PLAIN, True), (RESIDUAL, False)):
        family = [n for n in figures["networks"].values() if (n["network"]["shortcut"] is None) is plain]
        shallow, deep = (pick(family, key=lambda n: n["network"]["depth"]) for pick in (min, max))
        a, b = finals(deep, "train_loss"), finals(shallow, "train_loss")
        rise = Difference.of(a, b)
        name = "plain" if plain else "ResNet"
        more = f"{name}-{deep['network']['depth']} ends with a training loss of {spread(a)}"
        less = f"{name}-{shallow['network']['depth']} with {spread(b)}"
        errors = [f"{spread(finals(n, 'train_error'), 100)} %" for n in (deep, shallow)]
        sentence = f"{more}, {less} (difference {rise}); training error {errors[0]} and {errors[1]}."
        sentence += "" if plain else beside_published(figures["networks"], figures["published_test_error_percent"])
        verdicts.append(Verdict(claim, rise.positive is plain, sentence))
    return verdicts


def draw(figures: Figures, figure: Figure) -> None:
    for i, (key, label) in enumerate((("train_error", "training error, %"), ("test_error", "test error, %"))):
        ax = figure.add_subplot(1, 2, i + 1)
        draw_curves(ax, figures["networks"], key, label, 100)
        for name, error in figures["published_test_error_percent"].items():
            if key == "test_error" and name in figures["networks"]:
                ax.axhline(error, color="#9aa0a6", linewidth=0.6)
                ax.annotate(f"paper: {name} {error} %", (1, error), fontsize=6)


STUDY = Study(
    "degradation",
    "Degradation: plain and residual networks at growing depth",
    f"{PLAIN} ... {RESIDUAL} and demonstrate accuracy gains when the depth increases",
    "section 4.2, Fig. 1 and 6 (CIFAR-10); Fig. 4 (ImageNet); Table 6",
    networks,
    measure,
    judge,
    draw,
)
