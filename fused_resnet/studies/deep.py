"""110 and 1202 layers: gradients that are finite and reach every layer, and the memory that a step holds."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from fused_resnet import measure as measuring
from fused_resnet.studies import costs, paper
from fused_resnet.studies.study import (
    Figures,
    Laboratory,
    Network,
    Preset,
    Study,
    Verdict,
    beside_published,
    finals,
    spread,
    summary,
    tidy,
)
from fused_resnet.studies.trainings import weight_gradients

CONVERGES = "This 110-layer network converges well"
NO_DIFFICULTY = "Our method shows no optimization difficulty [with 1202 layers]"
MEMORY = "a fused network keeps less for backward than a plain one (this package's claim, not the paper's)"
STEPS = 8
# A network has converged if its training error is below this. The paper gives no figure; guessing has 90 %.
CONVERGED = 0.1


def networks(preset: Preset) -> list[Network]:
    return [Network(preset.deepest, "A"), *([Network(preset.extreme, "A")] if preset.train_extreme else [])]


def _memory(model: nn.Module, x: Tensor, y: Tensor) -> Figures:
    """Bytes per image that are kept for the backward, and the rise of memory in a step."""

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()

    model.train()
    saved = measuring.saved_bytes(loss, [*model.parameters(), *model.buffers()])
    return {"saved_bytes_per_image": saved / len(x), "peak_bytes": measuring.peak_bytes(step, x.device)}


def _few_steps(model: nn.Module, x: Tensor, y: Tensor) -> Figures:
    """Updates on one batch at the warm-up's rate of 0.01, recording the norm of every layer's gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        norms.append(weight_gradients(model))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "gradients": norms}


def measure(lab: Laboratory) -> Figures:
    preset, found = lab.preset, {}
    for depth in (preset.deepest, preset.extreme):
        network = Network(depth, "A")
        x, y = lab.images(preset.extreme_batch)
        model = lab.build(network, lab.seeds[0])
        entry: dict[str, Any] = {"depth": depth, "batch": len(x), "parameters": costs.parameters(model)}
        entry["memory"] = {}
        for variant, m in (("fused", model), ("plain", lab.build(network, lab.seeds[0], fused=False))):
            m.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            entry["memory"][variant] = _memory(m, x, y)
            lab.advance(depth, f"memory of {network.name}")
        del m
        entry |= _few_steps(model, x, y)
        lab.advance(depth, f"steps of {network.name}")
        found[network.name] = entry
    trained = {n.name: summary(lab.runs(n)) for n in networks(preset)}
    published = {f"ResNet-{d}": e for d, e in paper.CIFAR10_ERROR.items()} if lab.data.name == "cifar10" else {}
    return {"few_steps": found, "trained": trained, "published_test_error_percent": published}


def _mb(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:.3g} MB"


def judge(figures: Figures) -> list[Verdict]:
    converged, said = {}, {}
    for name, trained in figures["trained"].items():
        errors = finals(trained, "train_error")
        converged[name] = statistics.fmean(errors) < CONVERGED
        losses, tests = spread(finals(trained, "train_loss")), spread(finals(trained, "test_error"), 100)
        said[name] = (
            f"{name} ends with a training error of {spread(errors, 100)} %, a training loss of {losses} and a test "
            f"error of {tests} %." + beside_published({name: trained}, figures["published_test_error_percent"])
        )
    first, *others = converged
    fine, parts, less, memory = all(converged[name] for name in others), [], True, []
    for network, entry in figures["few_steps"].items():
        norms = [v for step in entry["gradients"] for v in step]
        finite = all(map(math.isfinite, [*norms, *entry["losses"]])) and min(norms) > 0
        fine = fine and finite and entry["losses"][-1] < entry["losses"][0]
        losses = " → ".join(f"{loss:.3g}" for loss in entry["losses"])
        finite_text = "finite and not zero in every layer" if finite else "zero or not finite somewhere"
        parts.append(
            f"{network} ({entry['parameters'] / 1e6:.3g} M parameters), {len(entry['losses'])} steps on "
            f"{entry['batch']} images: loss {losses}, gradients {finite_text} ({min(norms):.1e} to {max(norms):.1e})"
        )
        fused, plain = entry["memory"]["fused"], entry["memory"]["plain"]
        less = less and fused["saved_bytes_per_image"] < plain["saved_bytes_per_image"]
        memory.append(
            f"{network} keeps {_mb(fused['saved_bytes_per_image'])} per image fused, "
            f"{_mb(plain['saved_bytes_per_image'])} plain; a step on {entry['batch']} images takes "
            f"{_mb(fused['peak_bytes'])} and {_mb(plain['peak_bytes'])}"
        )
    return [
        Verdict(CONVERGES, converged[first], said[first]),
        Verdict(NO_DIFFICULTY, fine, " ".join([f"{'; '.join(parts)}.", *(said[name] for name in others)])),
        Verdict(MEMORY, less, f"{'; '.join(memory)}."),
    ]


def draw(figures: Figures, figure: Figure) -> None:
    ax = figure.add_subplot(1, 2, 1)
    for (name, entry), colour in zip(figures["few_steps"].items(), ("#4c78a8", "#e4572e"), strict=True):
        norms = entry["gradients"][0]
        ax.plot([i / (len(norms) - 1) for i in range(len(norms))], norms, color=colour, linewidth=0.8, label=name)
    ax.set_yscale("log")
    ax.set_xlabel("layer, first (0) to last (1)")
    ax.set_ylabel("gradient's norm at the first step")
    tidy(ax)
    ax = figure.add_subplot(1, 2, 2)
    for i, (name, entry) in enumerate(figures["few_steps"].items()):
        for j, (variant, colour) in enumerate((("plain", "#9aa0a6"), ("fused", "#e4572e"))):
            height = entry["memory"][variant]["saved_bytes_per_image"] / 1e6
            ax.bar(i + 0.3 * j, height, 0.28, color=colour, label=None if i else variant)
            ax.annotate(f"{height:.3g}", (i + 0.3 * j, height), ha="center", va="bottom", fontsize=7)
        ax.annotate(name, (i + 0.15, 0), (0, -12), textcoords="offset points", ha="center", fontsize=8)
    ax.set_xticks([])
    ax.set_yscale("log")
    ax.set_ylabel("kept for backward, MB per image")
    tidy(ax)


STUDY = Study(
    "deep",
    "110 and 1202 layers",
    f"{CONVERGES} ... {NO_DIFFICULTY}",
    "section 4.2, Fig. 6, Table 6",
    networks,
    measure,
    judge,
    draw,
    work=lambda preset: 3 * (preset.deepest + preset.extreme),
)
