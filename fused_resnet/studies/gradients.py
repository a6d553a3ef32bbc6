"""Gradients per layer, at the start and during training: which vanish, which explode, and what prevents it."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from fused_resnet.models import BasicBlock
from fused_resnet.studies.study import COLOURS, Figures, Laboratory, Network, Preset, Study, Verdict, tidy
from fused_resnet.studies.trainings import weight_gradients

ACTIVATIONS = ("sigmoid", "relu", "leaky_relu", "elu")
SCALES = (0.5, 1.0, 2.0)
IMAGES = 64
# The largest ratio between the first and the last layer's gradient, either way, that counts as healthy; and the largest
# at which the gradient has not vanished. These bounds are ours; the paper gives none.
HEALTHY_WITHIN, VANISHED_BELOW = 1e2, 1e-3

_ACT: dict[str, Any] = {
    "sigmoid": nn.Sigmoid,
    "relu": partial(nn.ReLU, inplace=True),
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
}
KINDS = ("plain", "residual", "residual, open path")


class OpenBlock(BasicBlock):
    """BasicBlock without the activation after the addition, so that nothing interrupts the shortcuts.

    Source: He et al., arXiv 1603.05027, section 3 (f = identity).
    """

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return out + (x if self.downsample is None else self.downsample(x))


def _cases() -> list[tuple[str, bool, str, float]]:
    """The cases (kind, BN, activation, scale of the initialisation): every activation, and with ReLU every scale."""
    cases = [(kind, bn, act, 1.0) for kind in KINDS for bn in (False, True) for act in ACTIVATIONS]
    cases += [(kind, bn, "relu", s) for kind in KINDS[:2] for bn in (False, True) for s in SCALES if s != 1]
    return cases


def case_name(kind: str, bn: bool, act: str, scale: float = 1.0) -> str:
    """The key of a case in the figures."""
    return f"{kind}, {act}, {'BN' if bn else 'no BN'}{f', weights x{scale:g}' if scale != 1 else ''}"


def initial_gradients(
    lab: Laboratory, kind: str, bn: bool, act: str, scale: float, x: Tensor, y: Tensor
) -> list[float]:
    """The norm of each layer's weight gradient before any update, first layer first."""
    network = Network(lab.preset.depths[-1], None if kind == "plain" else "A")
    options: dict[str, Any] = {"act_layer": _ACT[act], "norm_layer": None if bn else nn.Identity}
    if kind == KINDS[2]:
        options["block"] = OpenBlock
    # nothing to fuse: there are no chains without BN, and OpenBlock stays plain
    model = network.seeded(lab.seeds[0], lab.data, lab.device, fused=bn and kind != KINDS[2], **options)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.mul_(scale)
    F.cross_entropy(model(x), y).backward()
    return weight_gradients(model)


def ratio(norms: list[float]) -> float:
    """The first layer's gradient over the last one's; 0 or infinite if one of them is."""
    first, last = norms[0], norms[-1]
    if not (math.isfinite(first) and math.isfinite(last)):
        return math.inf
    return first / last if last else math.inf if first else 0.0


def _lines(ax: Any, norms: dict[str, list[float]], dashed: Collection[str] = (), label: str = "") -> None:
    for (name, values), colour in zip(norms.items(), cycle(COLOURS), strict=False):
        shown = [v if v > 0 and math.isfinite(v) else math.nan for v in values]
        ax.plot(range(1, len(shown) + 1), shown, "--" if name in dashed else "-", color=colour, linewidth=1, label=name)
    ax.set_yscale("log")
    tidy(ax, "layer", label, legend=False)
    ax.legend(frameon=False, fontsize=6)


class Gradients(Study):
    """Gradients per layer, at the start and during training."""

    VANISH = "vanishing/exploding gradients, which hamper convergence from the beginning (sigmoid, no normalization)"
    CURED = "has been largely addressed by normalized initialization and intermediate normalization layers"
    HEALTHY = "We also verify that the backward propagated gradients exhibit healthy norms with BN (plain networks)"
    name = "gradients"
    title = "Gradients per layer"
    claim = f"the notorious problem of {VANISH} {CURED} ... {HEALTHY}"
    source = "sections 1 and 4.1"
    size = (12, 4.6)

    def work(self, preset: Preset) -> float:
        return preset.depths[-1] * len(_cases())

    def networks(self, preset: Preset) -> list[Network]:
        return [Network(preset.depths[-1], shortcut) for shortcut in (None, "A")]

    def measure(self, lab: Laboratory) -> Figures:
        x, y = lab.images(IMAGES)
        initial = {}
        for case in _cases():
            initial[case_name(*case)] = initial_gradients(lab, *case, x, y)
            lab.advance(lab.preset.depths[-1], "gradients at the start")
        training = {n.name: lab.train(n, lab.seeds[0]).gradients for n in self.networks(lab.preset)}
        return {"depth": lab.preset.depths[-1], "initial": initial, "training": training}

    def judge(self, figures: Figures) -> list[Verdict]:
        initial, depth = figures["initial"], figures["depth"]

        def of(kind: str, bn: bool, act: str = "relu", scale: float = 1.0) -> float:
            return ratio(initial[case_name(kind, bn, act, scale)])

        plain, block, open_path = (of(kind, False, "sigmoid") for kind in KINDS)
        vanish = Verdict(
            f"{self.VANISH}; a residual network's do not vanish",
            plain < VANISHED_BELOW <= open_path,
            f"{depth} layers, sigmoid, no BN, first layer's gradient over the last one's: plain {plain:.1e}, residual "
            f"with sigmoid in the branch alone {open_path:.1e}; with the sigmoid after the addition too, where the "
            f"paper's block has its ReLU, {block:.1e}: there each block multiplies what comes back by a slope of "
            f"at most 1/4.",
        )
        said, swings = [], {}
        for bn in (False, True):
            found = ", ".join(f"{of('plain', bn, scale=scale):.1e} at x{scale:g}" for scale in SCALES)
            sizes = [initial[case_name("plain", bn, "relu", scale)][0] for scale in SCALES]
            smallest, largest = min(sizes), max(sizes)
            swings[bn] = largest / smallest if smallest and math.isfinite(largest) else math.inf
            said.append(f"{'with' if bn else 'without'} BN {found} (its size changes by {swings[bn]:.1e})")
        cured = Verdict(
            self.CURED,
            swings[True] < 1e2 < swings[False],
            f"Plain, ReLU, He's initialisation times 0.5, 1 and 2; first layer's gradient over the last one's: "
            f"{'; '.join(said)}.",
        )
        ratios = {name: [ratio(r["norms"]) for r in records] for name, records in figures["training"].items()}
        parts = [
            f"{name} {start:.1e} at the first step, then {min(during):.1e} to {max(during):.1e}"
            for name, (start, *during) in ratios.items()
            if during
        ]
        _, *watched = next(iter(ratios.values()))
        healthy = bool(watched) and all(1 / HEALTHY_WITHIN <= r <= HEALTHY_WITHIN for r in watched)
        text = f"First layer's gradient over the last one's, with BN, during training: {'; '.join(parts)}."
        return [vanish, cured, Verdict(self.HEALTHY, healthy, text)]

    def draw(self, figures: Figures, figure: Figure) -> None:
        initial = figures["initial"]
        first, second, third = figure.subplots(1, 3)
        plain = [case_name("plain", False, act) for act in ACTIVATIONS]
        names = [
            *plain,
            *(case_name(kind, False, "sigmoid") for kind in KINDS[1:]),
            case_name("plain", True, "sigmoid"),
        ]
        _lines(first, {name: initial[name] for name in names}, plain, "gradient's norm at the start")
        names = [case_name("plain", bn, "relu", scale) for bn in (False, True) for scale in SCALES]
        _lines(second, {name: initial[name] for name in names}, [name for name in names if "no BN" in name])
        shown = {}
        for name, records in figures["training"].items():
            for record in (records[0], records[-1]):
                shown[f"{name}, step {record['step'] + 1}"] = record["norms"]
        _lines(third, shown)
