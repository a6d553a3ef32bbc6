"""Layer responses: smaller in residual networks than in plain ones, and smaller in deeper networks."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from itertools import cycle, pairwise

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fused_resnet.fusion.swap import unfuse
from fused_resnet.studies import study as parts
from fused_resnet.studies.study import Difference, Figures, Laboratory, Network, Preset, Verdict, spread

IMAGES = 256


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    """The norm after each 3x3 convolution, in order."""
    last: nn.Module | None = None
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            last = m
        elif isinstance(m, nn.BatchNorm2d) and isinstance(last, nn.Conv2d) and last.kernel_size == (3, 3):
            yield m


@torch.no_grad()
def responses(model: nn.Module, x: Tensor) -> list[float]:
    """The standard deviation of each 3x3 layer's output after BN, before activation and addition, in eval mode.

    Args:
        model: not changed. A copy runs in plain PyTorch, where hooks see tensors that a chain never writes.
        x: [N, C, H, W], normalised images.

    Source: arXiv 1512.03385, section 4.2, "Analysis of Layer Responses".
    """
    plain = unfuse(copy.deepcopy(model)).eval()
    found: list[float] = []
    for norm in _norms(plain):
        # copied, because an in-place activation changes it
        norm.register_forward_hook(lambda m, args, out: found.append(float(out.std())))
    plain(x)
    return found


class Responses(parts.Study):
    """Layer responses: smaller in residual networks than in plain ones, and smaller in deeper networks."""

    SMALLER = "ResNets have generally smaller responses than their plain counterparts"
    DEEPER = "the deeper ResNet has smaller magnitudes of responses"
    name = "responses"
    title = "Standard deviation of each layer's response"
    claim = f"{SMALLER} ... {DEEPER}"
    source = "section 4.2, Fig. 7"

    def networks(self, preset: Preset) -> list[Network]:
        plain, residual = preset.response_depths
        recipe = preset.response_recipe
        return [*(Network(d, None, recipe=recipe) for d in plain), *(Network(d, "A", recipe=recipe) for d in residual)]

    def measure(self, lab: Laboratory) -> Figures:
        x, _ = lab.images(IMAGES)
        found = {}
        for n in self.networks(lab.preset):
            std = [responses(run.model, x) for run in lab.runs(n)]
            found[n.name] = {"depth": n.depth, "plain": n.shortcut is None, "std": std}
        recipe = lab.preset.response_recipe
        return {"networks": found, "images": len(x), "recipe": asdict(recipe) if recipe else "the preset's"}

    def judge(self, figures: Figures) -> list[Verdict]:
        means = {name: [statistics.fmean(run) for run in n["std"]] for name, n in figures["networks"].items()}
        plain = {n["depth"]: means[name] for name, n in figures["networks"].items() if n["plain"]}
        residual = {n["depth"]: means[name] for name, n in figures["networks"].items() if not n["plain"]}
        numbers = f"Mean over layers: {', '.join(f'{name} {spread(mean, digits=4)}' for name, mean in means.items())}."
        in_order = [residual[depth] for depth in sorted(residual)]
        steps = [Difference.of(a, b) for a, b in pairwise(in_order)]
        ends = Difference.of(in_order[0], in_order[-1])
        # an order holds if every step goes as claimed and the ends differ by more than seeds do
        deeper = all(step.value > 0 for step in steps) and ends.positive
        each = ", ".join(map(str, steps))
        falls = f"From each depth to the next it falls by {each}; from the first to the last by {ends}."
        smaller = all(Difference.of(mean, residual[depth]).positive for depth, mean in plain.items())
        return [Verdict(self.SMALLER, smaller, numbers), Verdict(self.DEEPER, deeper, f"{numbers} {falls}")]

    def draw(self, figures: Figures, figure: Figure) -> None:
        labels = ("layer, first (0) to last (1)", "layers, largest response first")
        for ax, ranked, label in zip(figure.subplots(1, 2), (False, True), labels, strict=True):
            for (name, n), colour in zip(figures["networks"].items(), cycle(parts.COLOURS), strict=False):
                std = [statistics.fmean(layer) for layer in zip(*n["std"], strict=True)]
                layers = [j / (len(std) - 1) for j in range(len(std))]
                values = sorted(std, reverse=True) if ranked else std
                ax.plot(layers, values, "--" if n["plain"] else "-", color=colour, linewidth=1, label=name)
            parts.tidy(ax, label, "standard deviation of the response", legend=not ranked)
