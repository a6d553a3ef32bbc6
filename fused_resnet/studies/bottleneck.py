"""Bottleneck blocks: three layers for the price of two."""

from __future__ import annotations

import statistics
from functools import cache

import torch
from matplotlib.figure import Figure

from fused_resnet import models
from fused_resnet.models import Bottleneck
from fused_resnet.studies import costs, paper
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

SIMILAR = "both designs have similar time complexity"
BETTER = "The 50/101/152-layer ResNets are more accurate than the 34-layer ones by considerable margins"
# A bottleneck network may cost at most this much more than the basic network with as many blocks.
SIMILAR_WITHIN = 0.15


def networks(preset: Preset) -> list[Network]:
    blocks = (preset.bottleneck_depth - 2) // 9
    return [Network(6 * blocks + 2, "A"), Network(preset.bottleneck_depth, "A", bottleneck=True)]


@cache
def imagenet_costs() -> dict[str, Figures]:
    """Parameters and multiply-adds of the five networks of table 1.

    Bottlenecks are counted with the stride in the paper's place and in the 3x3 convolution, basic blocks with the
    paper's option A.
    """
    found = {}
    for depth, published in paper.IMAGENET_MULTIPLY_ADDS.items():
        with torch.device("meta"):
            here = getattr(models, f"resnet{depth}")(fused=False)
            # option A adds no cost: count the plain twin
            theirs = getattr(models, f"plain{depth}" if depth < 50 else f"resnet{depth}")(fused=False)
        found[f"ResNet-{depth}"] = {
            "parameters": costs.parameters(here),
            "multiply_adds": costs.multiply_adds(costs.stride_first(theirs), 3, 224),
            "multiply_adds_here": costs.multiply_adds(here, 3, 224),
            "published_multiply_adds": published * 1e9,
            "bottleneck": any(isinstance(m, Bottleneck) for m in here.modules()),
        }
    return found


def measure(lab: Laboratory) -> Figures:
    trained = {}
    for n in networks(lab.preset):
        with torch.device("meta"):
            model = n.build(lab.data.channels, len(lab.data.classes), fused=False)
        cost = {
            "parameters": costs.parameters(model),
            "multiply_adds": costs.multiply_adds(model, lab.data.channels, lab.data.size),
        }
        trained[n.name] = summary(lab.runs(n)) | cost
    return {
        "imagenet": imagenet_costs(),
        "networks": trained,
        "published_imagenet_top1_top5_percent": paper.IMAGENET_SHORTCUTS,
    }


def judge(figures: Figures) -> list[Verdict]:
    basic, bottleneck = figures["networks"].values()
    basic_name, bottleneck_name = figures["networks"]
    imagenet = figures["imagenet"]
    ratios = {
        "ResNet-50 over ResNet-34": imagenet["ResNet-50"]["multiply_adds"] / imagenet["ResNet-34"]["multiply_adds"],
        f"{bottleneck_name} over {basic_name}": bottleneck["multiply_adds"] / basic["multiply_adds"],
    }
    counted = ", ".join(f"{k} {n['multiply_adds'] / 1e9:.2f}" for k, n in imagenet.items())
    similar = Verdict(
        SIMILAR,
        all(1 - SIMILAR_WITHIN <= ratio <= 1 + SIMILAR_WITHIN for ratio in ratios.values()),
        f"Multiply-adds: {', '.join(f'{k} {v:.2f}×' for k, v in ratios.items())}; in 10^9: {counted}.",
    )
    error = Difference.of(finals(basic, "test_error"), finals(bottleneck, "test_error"))
    loss = Difference.of(finals(basic, "train_loss"), finals(bottleneck, "train_loss"))
    sentence = (
        f"{basic_name} ends with a test error of {spread(finals(basic, 'test_error'), 100)} %, {bottleneck_name} with "
        f"{spread(finals(bottleneck, 'test_error'), 100)} % (difference {100 * error.value:+.2g} ± "
        f"{100 * error.error:.1g} points); the difference of the training losses is {loss}."
    )
    return [similar, Verdict(BETTER, error.positive, sentence)]


def draw(figures: Figures, figure: Figure) -> None:
    ax = figure.add_subplot(1, 2, 1)
    for i, n in enumerate(figures["imagenet"].values()):
        ax.bar(i, n["multiply_adds"] / 1e9, 0.6, color=COLOURS[1 if n["bottleneck"] else 0], alpha=0.7)
        ax.plot([i - 0.35, i + 0.35], [n["published_multiply_adds"] / 1e9] * 2, "k-", linewidth=1)
        ax.annotate(f"{n['parameters'] / 1e6:.1f} M", (i, 0.1), ha="center", fontsize=7)
    ax.set_xticks(range(len(figures["imagenet"])), [name.removeprefix("ResNet-") for name in figures["imagenet"]])
    ax.set_xlabel("layers of the ImageNet ResNet (orange: bottlenecks)")
    ax.set_ylabel("multiply-adds, 10⁹ (line: the paper's Table 1)")
    tidy(ax, legend=False)
    ax = figure.add_subplot(1, 2, 2)
    draw_curves(ax, figures["networks"], "test_error", "test error, %", 100)
    best = min(statistics.fmean(finals(n, "test_error")) for n in figures["networks"].values())
    ax.axhline(100 * best, color="#9aa0a6", linewidth=0.6)


STUDY = Study(
    "bottleneck",
    "Bottleneck and basic blocks",
    f"{SIMILAR} ... {BETTER}",
    "section 4.1, Fig. 5, Tables 1 and 3 (ImageNet)",
    networks,
    measure,
    judge,
    draw,
)
