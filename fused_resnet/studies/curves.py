"""What the curves of a training show: faster convergence, and the fall where the rate is divided by ten."""

from __future__ import annotations

import math
import statistics

from matplotlib.figure import Figure

from fused_resnet.studies import study as parts
from fused_resnet.studies.study import Difference, Figures, Laboratory, Network, Preset, Verdict, finals, spread

# Shares of the loss of guessing at which convergences are compared; the second decides.
SHARES = (0.5, 0.25, 0.125)
# Steps over which a loss is averaged.
SMOOTH = 10
# Epochs on either side of a division of the rate that are averaged.
WINDOW = 2
# A fall is sudden if the loss of the epochs before, over that of the epochs after, is at least this.
SUDDEN = 1.25


def smooth(losses: list[float], window: int = SMOOTH) -> list[float]:
    """The mean of the last ``window`` steps; of fewer steps at the start."""
    return [statistics.fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]


def reached(losses: list[float], threshold: float) -> int:
    """The first step at which the smooth loss is below the level; the number of steps if it never is."""
    return next((i + 1 for i, loss in enumerate(smooth(losses)) if loss < threshold), len(losses))


class Convergence(parts.Study):
    """Shallow residual networks converge faster than plain ones that reach the same loss."""

    name = "convergence"
    title = "Convergence of a shallow plain and a shallow residual network"
    claim = (
        'When the net is "not overly deep" (18 layers here), the current SGD solver is still able to find good '
        "solutions to the plain net. In this case, the ResNet eases the optimization by providing faster convergence "
        "at the early stage"
    )
    source = "section 4.1, Fig. 4 (ImageNet, 18 layers)"

    def networks(self, preset: Preset) -> list[Network]:
        return [Network(preset.depths[0], None), Network(preset.depths[0], "A")]

    def measure(self, lab: Laboratory) -> Figures:
        guessing, networks = math.log(len(lab.data.classes)), self.networks(lab.preset)
        losses = {n.name: [[s["loss"] for s in run.history.steps] for run in lab.runs(n)] for n in networks}
        steps = {n: {s: [reached(run, s * guessing) for run in runs] for s in SHARES} for n, runs in losses.items()}
        # a curve keeps at most some hundred points per seed: CIFAR-10's 64,000 steps would take megabytes
        stride = max(1, len(next(iter(losses.values()))[0]) // 400)
        curves = {n: [smooth(run)[::stride] for run in runs] for n, runs in losses.items()}
        return {"guessing": guessing, "steps_to_reach": steps, "stride": stride, "smooth_loss": curves}

    def judge(self, figures: Figures) -> list[Verdict]:
        (plain_name, plain), (name, residual) = figures["steps_to_reach"].items()
        decides = str(SHARES[1])
        saved = Difference.of(plain[decides], residual[decides])
        others = "; ".join(
            f"{float(share):.3g} of guessing: {spread(plain[share])} and {spread(residual[share])}"
            for share in residual
            if share != decides
        )
        sentence = (
            f"{plain_name} needs {spread(plain[decides])} steps to a quarter of the loss of guessing, {name} "
            f"{spread(residual[decides])} (difference {saved}); to {others}."
        )
        return [Verdict(self.claim, saved.positive, sentence)]

    def draw(self, figures: Figures, figure: Figure) -> None:
        ax = figure.add_subplot()
        for (name, runs), style in zip(figures["smooth_loss"].items(), ("--", "-"), strict=True):
            for i, run in enumerate(runs):
                steps = [1 + figures["stride"] * j for j in range(len(run))]
                colour = parts.COLOURS[style == "-"]
                ax.plot(steps, run, style, color=colour, linewidth=1, label=None if i else name)
        for share in SHARES:
            ax.axhline(share * figures["guessing"], color=parts.GREY, linewidth=0.6)
        ax.set_yscale("log")
        parts.tidy(ax, "step", f"training loss, mean of {SMOOTH} steps (a line per seed)")


def divisions(rates: list[float]) -> list[int]:
    """The epochs before which the rate was at least halved."""
    return [e for e in range(1, len(rates)) if rates[e] <= rates[e - 1] / 2]


def falls(curve: list[float], epoch: int) -> tuple[float, float]:
    """The mean of WINDOW epochs before ``epoch`` over the mean after it; and the same ratio one WINDOW earlier."""
    starts = (epoch - 2 * WINDOW, epoch - WINDOW, epoch)
    means = [statistics.fmean(curve[max(0, e) : max(1, e + WINDOW)]) for e in starts]
    return means[1] / max(means[2], 1e-12), means[0] / max(means[1], 1e-12)


class LrDrop(parts.Study):
    """The error falls at once where the rate is divided by ten; augmented images are harder than test images."""

    FALL = "the error falls suddenly where the learning rate is divided by ten"
    ABOVE = "under augmentation the training error stays above the test error while the learning rate is high"
    name = "lr-drop"
    title = "The learning rate divided by ten"
    claim = f"{FALL}; {ABOVE} (what the curves show; the paper says it in no sentence)"
    source = "section 4.2, Fig. 6 (CIFAR-10) and section 4.1, Fig. 4 (ImageNet)"

    def networks(self, preset: Preset) -> list[Network]:
        return [Network(preset.depths[0], "A")]

    def measure(self, lab: Laboratory) -> Figures:
        (network,) = self.networks(lab.preset)
        rates: dict[int, float] = {}
        for step in lab.runs(network)[0].history.steps:
            rates.setdefault(step["epoch"], step["lr"])
        augmented = lab.preset.recipe_of(network).augment
        return super().measure(lab) | {"lr": list(rates.values()), "augmented": augmented}

    def judge(self, figures: Figures) -> list[Verdict]:
        (network,) = figures["networks"].values()
        at = next(iter(divisions(figures["lr"])), None)
        if at is None:
            text = "The rate was never divided in so few epochs."
            return [Verdict(claim, False, text) for claim in (self.FALL, self.ABOVE)]
        ratios = [falls(curve, at) for curve in network["train_loss"]]
        now, before = (statistics.geometric_mean(max(r, 1e-12) for r in column) for column in zip(*ratios, strict=True))
        tests = [falls(curve, at)[0] for curve in network["test_error"] if statistics.fmean(curve[at:]) > 0]
        fall = (
            f"At the first division (epoch {at + 1}) the training loss falls by a factor of {now:.2f} from the "
            f"{WINDOW} epochs before to the {WINDOW} after; one such spell earlier it was {before:.2f}. The test error "
            f"falls by {statistics.fmean(tests) if tests else math.inf:.2f}; in the end it is "
            f"{spread(finals(network, 'test_error'), 100)} %."
        )
        pairs = [
            (a, b)
            for train, test in zip(network["train_loss"], network["test_loss"], strict=True)
            for a, b in zip(train[:at], test[:at], strict=True)
        ]
        share = statistics.fmean(a > b for a, b in pairs)
        above = (
            f"Before the first division the training loss is above the test loss in {100 * share:.0f} % of the epochs; "
            f"at the end it is {spread(finals(network, 'train_loss'))} beside {spread(finals(network, 'test_loss'))}. "
            f"(The training loss is that of an epoch's batches as they were trained on, the test loss is measured "
            f"after the epoch.)"
        )
        held = bool(figures["augmented"]) and share > 0.5
        return [Verdict(self.FALL, now > SUDDEN and now > before, fall), Verdict(self.ABOVE, held, above)]

    def draw(self, figures: Figures, figure: Figure) -> None:
        name, network = next(iter(figures["networks"].items()))
        for ax, what, scale in zip(figure.subplots(1, 2), ("loss", "error"), (1, 100), strict=True):
            for part, label, colour in zip(("train", "test"), ("training, augmented", "test"), parts.COLOURS):
                for j, curve in enumerate(network[f"{part}_{what}"]):
                    values = [scale * v for v in curve]
                    ax.plot(range(1, len(curve) + 1), values, color=colour, linewidth=1, label=None if j else label)
            for e in divisions(figures["lr"]):
                ax.axvline(e + 0.5, color=parts.GREY, linewidth=0.8, linestyle=":")
            ax.set_yscale("log" if what == "loss" else "symlog")
            if what == "error":
                ax.set_ylim(bottom=0)
            unit = ", %" if scale == 100 else ""
            parts.tidy(ax, "epoch (dotted: rate divided by ten)", f"{what}{unit}, {name}")
