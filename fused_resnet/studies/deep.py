"""110 and 1202 layers: gradients that are finite and reach every layer, and the memory that a step holds."""

from __future__ import annotations

import math
import statistics

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from fused_resnet import measure as measuring
from fused_resnet.studies import costs
from fused_resnet.studies import study as parts
from fused_resnet.studies.study import Figures, Laboratory, Network, Preset, Verdict, finals, spread, summary
from fused_resnet.studies.trainings import weight_gradients

STEPS = 8
# A network has converged if its training error is below this. The paper gives no figure; guessing has 90 %.
CONVERGED = 0.1


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


def _mb(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:.3g} MB"


class Deep(parts.Study):
    """110 and 1202 layers: gradients that are finite and reach every layer, and the memory that a step holds."""

    CONVERGES = "This 110-layer network converges well"
    NO_DIFFICULTY = "Our method shows no optimization difficulty [with 1202 layers]"
    MEMORY = "a fused network keeps less for backward than a plain one (this package's claim, not the paper's)"
    name = "deep"
    title = "110 and 1202 layers"
    claim = f"{CONVERGES} ... {NO_DIFFICULTY}"
    source = "section 4.2, Fig. 6, Table 6"

    def work(self, preset: Preset) -> float:
        return 3 * (preset.deepest + preset.extreme)

    def networks(self, preset: Preset) -> list[Network]:
        return [Network(preset.deepest, "A"), *([Network(preset.extreme, "A")] if preset.train_extreme else [])]

    def measure(self, lab: Laboratory) -> Figures:
        preset, found = lab.preset, {}
        for depth in (preset.deepest, preset.extreme):
            network = Network(depth, "A")
            x, y = lab.images(preset.extreme_batch)
            start = (lab.seeds[0], lab.data, lab.device)
            model = network.seeded(*start)
            memory: Figures = {}
            for variant, m in (
                ("fused", model),
                ("plain", network.seeded(*start, fused=False)),
            ):
                m.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                memory[variant] = _memory(m, x, y)
                lab.advance(depth, f"memory of {network.name}")
            del m
            entry = {"depth": depth, "batch": len(x), "parameters": costs.parameters(model), "memory": memory}
            found[network.name] = entry | _few_steps(model, x, y)
            lab.advance(depth, f"steps of {network.name}")
        trained = {n.name: summary(lab.runs(n)) for n in self.networks(preset)}
        return {"few_steps": found, "trained": trained} | parts.published(lab)

    def judge(self, figures: Figures) -> list[Verdict]:
        converged, said = {}, {}
        for name, trained in figures["trained"].items():
            errors = finals(trained, "train_error")
            converged[name] = statistics.fmean(errors) < CONVERGED
            losses, tests = spread(finals(trained, "train_loss")), spread(finals(trained, "test_error"), 100)
            said[name] = (
                f"{name} ends with a training error of {spread(errors, 100)} %, a training loss of {losses} and a "
                f"test error of {tests} %." + parts.beside_published({name: trained}, figures)
            )
        first, *others = converged
        fine, steps, less, memory = all(converged[name] for name in others), [], True, []
        for network, entry in figures["few_steps"].items():
            norms = [v for step in entry["gradients"] for v in step]
            finite = all(map(math.isfinite, [*norms, *entry["losses"]])) and min(norms) > 0
            fine = fine and finite and entry["losses"][-1] < entry["losses"][0]
            losses = " → ".join(f"{loss:.3g}" for loss in entry["losses"])
            finite_text = "finite and not zero in every layer" if finite else "zero or not finite somewhere"
            steps.append(
                f"{network} ({entry['parameters'] / 1e6:.3g} M parameters), {len(entry['losses'])} steps on "
                f"{entry['batch']} images: loss {losses}, gradients {finite_text} "
                f"({min(norms):.1e} to {max(norms):.1e})"
            )
            (saved, peak), (plain_saved, plain_peak) = (entry["memory"][v].values() for v in ("fused", "plain"))
            less = less and saved < plain_saved
            memory.append(
                f"{network} keeps {_mb(saved)} per image fused, {_mb(plain_saved)} plain; a step on {entry['batch']} "
                f"images takes {_mb(peak)} and {_mb(plain_peak)}"
            )
        return [
            Verdict(self.CONVERGES, converged[first], said[first]),
            Verdict(self.NO_DIFFICULTY, fine, " ".join([f"{'; '.join(steps)}.", *(said[name] for name in others)])),
            Verdict(self.MEMORY, less, f"{'; '.join(memory)}."),
        ]

    def draw(self, figures: Figures, figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for (name, entry), colour in zip(figures["few_steps"].items(), parts.COLOURS, strict=False):
            norms = entry["gradients"][0]
            left.plot([i / (len(norms) - 1) for i in range(len(norms))], norms, color=colour, linewidth=0.8, label=name)
        left.set_yscale("log")
        parts.tidy(left, "layer, first (0) to last (1)", "gradient's norm at the first step")
        for variant, colour in (("plain", parts.GREY), ("fused", parts.COLOURS[1])):
            memory = {
                k: entry["memory"][variant]["saved_bytes_per_image"] / 1e6 for k, entry in figures["few_steps"].items()
            }
            at = [i + 0.3 * (variant == "fused") for i in range(len(memory))]
            bars = right.bar(at, memory.values(), 0.28, color=colour, label=variant)
            right.bar_label(bars, fmt="%.3g", fontsize=7)
            right.set_xticks([i + 0.15 for i in range(len(memory))], list(memory))
        right.set_yscale("log")
        parts.tidy(right, y="kept for backward, MB per image")
