"""What trained networks end with: deeper ones, other shortcuts, bottlenecks."""

from __future__ import annotations

import statistics
from functools import cache

import torch
from matplotlib.figure import Figure

from fused_resnet import models
from fused_resnet.models import Bottleneck
from fused_resnet.studies import costs, paper
from fused_resnet.studies import study as parts
from fused_resnet.studies.study import Difference, Figures, Laboratory, Network, Preset, Verdict, finals, spread

OPTIONS = ("A", "B", "C")
# A bottleneck network may cost at most this much more than the basic network with as many blocks.
SIMILAR_WITHIN = 0.15


class Degradation(parts.Study):
    """Plain networks get worse with depth; residual ones do not."""

    PLAIN = "the deep plain nets suffer from increased depth, and exhibit higher training error when going deeper"
    RESIDUAL = "our ResNets manage to overcome the optimization difficulty"
    name = "degradation"
    title = "Degradation: plain and residual networks at growing depth"
    claim = f"{PLAIN} ... {RESIDUAL} and demonstrate accuracy gains when the depth increases"
    source = "section 4.2, Fig. 1 and 6 (CIFAR-10); Fig. 4 (ImageNet); Table 6"
    curves = (("train_error", "training error, %", 100), ("test_error", "test error, %", 100))

    def networks(self, preset: Preset) -> list[Network]:
        return [Network(depth, shortcut) for shortcut in (None, "A") for depth in preset.depths]

    def measure(self, lab: Laboratory) -> Figures:
        return super().measure(lab) | parts.published(lab)

    def judge(self, figures: Figures) -> list[Verdict]:
        verdicts = []
        for claim, plain in ((self.PLAIN, True), (self.RESIDUAL, False)):
            family = [n for n in figures["networks"].values() if (n["network"]["shortcut"] is None) is plain]
            shallow, deep = (pick(family, key=lambda n: n["network"]["depth"]) for pick in (min, max))
            a, b = finals(deep, "train_loss"), finals(shallow, "train_loss")
            rise, name = Difference.of(a, b), "plain" if plain else "ResNet"
            errors = [f"{spread(finals(n, 'train_error'), 100)} %" for n in (deep, shallow)]
            sentence = (
                f"{name}-{deep['network']['depth']} ends with a training loss of {spread(a)}, "
                f"{name}-{shallow['network']['depth']} with {spread(b)} (difference {rise}); "
                f"training error {errors[0]} and {errors[1]}."
            )
            sentence += "" if plain else parts.beside_published(figures["networks"], figures)
            verdicts.append(Verdict(claim, rise.positive is plain, sentence))
        return verdicts

    def draw(self, figures: Figures, figure: Figure) -> None:
        super().draw(figures, figure)
        for name, error in figures[parts.PUBLISHED].items():
            if name in figures["networks"]:
                figure.axes[1].axhline(error, color=parts.GREY, linewidth=0.6)
                figure.axes[1].annotate(f"paper: {name} {error} %", (1, error), fontsize=6)


class Shortcuts(parts.Study):
    """Options A, B and C: zero-padding, projections where the shape changes, projections everywhere."""

    BETTER = "all three options are considerably better than the plain counterpart"
    SMALL = "the small differences among A/B/C indicate that projection shortcuts are not essential"
    name = "shortcuts"
    title = "Shortcuts of option A, B and C"
    claim = f"{BETTER} ... {SMALL} for addressing the degradation problem"
    source = "section 4.1, Table 3 (ImageNet, 34 layers; the paper's CIFAR-10 networks are all of option A)"

    def networks(self, preset: Preset) -> list[Network]:
        return [Network(preset.shortcut_depth, shortcut) for shortcut in (None, *OPTIONS)]  # type: ignore[arg-type]

    def measure(self, lab: Laboratory) -> Figures:
        return super().measure(lab) | {"published_imagenet_top1_top5_percent": paper.IMAGENET_SHORTCUTS}

    def judge(self, figures: Figures) -> list[Verdict]:
        by_option = {n["network"]["shortcut"]: n for n in figures["networks"].values()}
        losses, errors = (
            {option: finals(n, key) for option, n in by_option.items()} for key in ("train_loss", "test_error")
        )

        def listed(values: dict[str | None, list[float]], scale: float) -> str:
            return ", ".join(f"{option or 'plain'} {spread(v, scale)}" for option, v in values.items())

        numbers = f"Final training loss: {listed(losses, 1)}; test error in %: {listed(errors, 100)}"
        gaps = {option: Difference.of(losses[None], losses[option]) for option in OPTIONS}
        said = ", ".join(f"{option} {gap}" for option, gap in gaps.items())
        held = all(gap.positive for gap in gaps.values())
        means = [statistics.fmean(losses[option]) for option in OPTIONS]
        among, to_plain = max(means) - min(means), statistics.fmean(losses[None]) - statistics.fmean(means)
        sentence = f"A, B and C lie within {among:.3g} of training loss, and {to_plain:.3g} below the plain network."
        return [
            Verdict(self.BETTER, held, f"{numbers}. Plain is above by {said}."),
            Verdict(self.SMALL, among < to_plain, sentence),
        ]

    def draw(self, figures: Figures, figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        parts.draw_curves(left, figures["networks"], "train_loss", "training loss")
        for i, (name, network) in enumerate(figures["networks"].items()):
            values = [100 * v for v in finals(network, "test_error")]
            right.bar(name, statistics.fmean(values), 0.6, color=parts.COLOURS[i], alpha=0.6)
            right.plot([name] * len(values), values, "k.", markersize=4)
        right.tick_params("x", labelsize=8)
        parts.tidy(right, y="final test error, % (dots: seeds)", legend=False)


class Projection(parts.Study):
    """Zero-padding against 1x1 projections of stride 2, where the shape changes: the cost and the gain of each."""

    name = "projection"
    title = "Zero-padding (A) and projection (B) where the shape changes"
    claim = (
        "B is slightly better than A. We argue that this is because the zero-padded dimensions in A indeed have no "
        "residual learning"
    )
    source = "section 4.1, Table 3 (ImageNet, 34 layers: 25.03 % and 24.52 % top-1 error)"

    def networks(self, preset: Preset) -> list[Network]:
        return [Network(preset.shortcut_depth, "A"), Network(preset.shortcut_depth, "B")]

    def measure(self, lab: Laboratory) -> Figures:
        return {"networks": costs.beside(super().measure(lab)["networks"], self.networks(lab.preset), lab.data)}

    def judge(self, figures: Figures) -> list[Verdict]:
        a, b = figures["networks"].values()
        loss, error = (Difference.of(finals(a, key), finals(b, key)) for key in ("train_loss", "test_error"))
        more = [100 * (b[key] / a[key] - 1) for key in ("parameters", "multiply_adds")]
        errors = f"{spread(finals(a, 'test_error'), 100)} % and {spread(finals(b, 'test_error'), 100)} %"
        sentence = (
            f"A's test error minus B's: {error.points} ({errors}); A's final training loss minus B's: {loss}. B has "
            f"{more[0]:.1f} % more parameters, {more[1]:.1f} % more multiply-adds."
        )
        return [Verdict(self.claim, error.positive, sentence)]


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


class Bottlenecks(parts.Study):
    """Bottleneck blocks: three layers for the price of two."""

    SIMILAR = "both designs have similar time complexity"
    BETTER = "The 50/101/152-layer ResNets are more accurate than the 34-layer ones by considerable margins"
    name = "bottleneck"
    title = "Bottleneck and basic blocks"
    claim = f"{SIMILAR} ... {BETTER}"
    source = "section 4.1, Fig. 5, Tables 1 and 3 (ImageNet)"

    def networks(self, preset: Preset) -> list[Network]:
        blocks = (preset.bottleneck_depth - 2) // 9
        return [Network(6 * blocks + 2, "A"), Network(preset.bottleneck_depth, "A", bottleneck=True)]

    def measure(self, lab: Laboratory) -> Figures:
        return {
            "imagenet": imagenet_costs(),
            "networks": costs.beside(super().measure(lab)["networks"], self.networks(lab.preset), lab.data),
            "published_imagenet_top1_top5_percent": paper.IMAGENET_SHORTCUTS,
        }

    def judge(self, figures: Figures) -> list[Verdict]:
        (basic_name, basic), (name, bottleneck) = figures["networks"].items()
        imagenet = {k: n["multiply_adds"] for k, n in figures["imagenet"].items()}
        ratios = {
            "ResNet-50 over ResNet-34": imagenet["ResNet-50"] / imagenet["ResNet-34"],
            f"{name} over {basic_name}": bottleneck["multiply_adds"] / basic["multiply_adds"],
        }
        counted = ", ".join(f"{k} {n / 1e9:.2f}" for k, n in imagenet.items())
        similar = all(1 - SIMILAR_WITHIN <= ratio <= 1 + SIMILAR_WITHIN for ratio in ratios.values())
        said = f"Multiply-adds: {', '.join(f'{k} {v:.2f}×' for k, v in ratios.items())}; in 10^9: {counted}."
        loss, error = (
            Difference.of(finals(basic, key), finals(bottleneck, key)) for key in ("train_loss", "test_error")
        )
        sentence = (
            f"{basic_name} ends with a test error of {spread(finals(basic, 'test_error'), 100)} %, {name} with "
            f"{spread(finals(bottleneck, 'test_error'), 100)} % (difference {error.points}); the difference of the "
            f"training losses is {loss}."
        )
        return [Verdict(self.SIMILAR, similar, said), Verdict(self.BETTER, error.positive, sentence)]

    def draw(self, figures: Figures, figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for i, n in enumerate(figures["imagenet"].values()):
            left.bar(i, n["multiply_adds"] / 1e9, 0.6, color=parts.COLOURS[1 if n["bottleneck"] else 0], alpha=0.7)
            left.plot([i - 0.35, i + 0.35], [n["published_multiply_adds"] / 1e9] * 2, "k-", linewidth=1)
            left.annotate(f"{n['parameters'] / 1e6:.1f} M", (i, 0.1), ha="center", fontsize=7)
        left.set_xticks(range(len(figures["imagenet"])), [k.removeprefix("ResNet-") for k in figures["imagenet"]])
        x, y = "layers of the ImageNet ResNet (orange: bottlenecks)", "multiply-adds, 10⁹ (line: the paper's Table 1)"
        parts.tidy(left, x, y, legend=False)
        parts.draw_curves(right, figures["networks"], "test_error", "test error, %", 100)
        best = min(statistics.fmean(finals(n, "test_error")) for n in figures["networks"].values())
        right.axhline(100 * best, color=parts.GREY, linewidth=0.6)
