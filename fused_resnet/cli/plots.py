"""The benchmark's pictures, as PNG."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fused_resnet.cli.variants import TITLES

COLOURS = {"plain": "#9aa0a6", "compile": "#4c78a8", "fused": "#e4572e"}
Report = dict[str, Any]


def _throughput(row: Report) -> tuple[float, float, float]:
    """Height, low end and high end of a bar."""
    q = row["images_per_s"]
    return q["median"], q["p20"], q["p80"]


def _megabytes(key: str) -> Callable[[Report], tuple[float, float, float] | None]:
    return lambda row: (row[key] / 1e6,) * 3 if row.get(key) else None


def _bars(
    report: Report, label: str, value: Callable[[Report], tuple[float, float, float] | None], *modes: str
) -> Figure | None:
    """One panel per model and mode, a group of bars per dtype. ``value``: height, low and high of a row, or None."""
    panels: dict[tuple[str, str], list[Report]] = {}
    for case in report["cases"]:
        if case["mode"] in modes:
            panels.setdefault((case["model"], case["mode"]), []).append(case)
    if not panels:
        return None
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.0 * lines + 0.5), layout="constrained")
    for i, ((model, mode), cases) in enumerate(panels.items()):
        ax = figure.add_subplot(lines, columns, i + 1)
        for k, case in enumerate(cases):
            rows = [row for row in case["variants"] if row["status"] == "measured"]
            bars = [(row["variant"], found) for row in rows if (found := value(row)) is not None]
            for j, (variant, (height, low, high)) in enumerate(bars):
                at = k + (j - (len(bars) - 1) / 2) * 0.27
                error = [[max(0.0, height - low)], [max(0.0, high - height)]] if high > low else None
                ax.bar(at, height, 0.25, color=COLOURS[variant], yerr=error, ecolor="#202124", capsize=2)
                ax.annotate(f"{height:.3g}", (at, high), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        ax.set_xticks(range(len(cases)), [case["dtype"] for case in cases])
        ax.set_title(f"{model}, {mode}", fontsize=10)
        ax.set_ylabel(label if i % columns == 0 else "")
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(y=0.15)
    handles = [ax.bar(0, 0, color=COLOURS[v], label=title) for v, title in TITLES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _losses(digits: Report) -> Figure:
    """Both loss curves, with a smoothed line over the steps' values."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    ax = figure.add_subplot()
    for training, style in zip(digits["trainings"], ("-", "--"), strict=True):
        losses, colour = training["losses"], COLOURS[training["variant"]]
        smooth = [statistics.fmean(losses[max(0, i - 8) : i + 1]) for i in range(len(losses))]
        ax.plot(losses, color=colour, alpha=0.25, linewidth=0.8)
        name = f"{training['variant']}: {100 * training['accuracy']:.1f} % of the test digits right"
        ax.plot(smooth, color=colour, linestyle=style, label=name)
    title = "ResNet-20 on handwritten digits, same seed (thin: each step; thick: mean of nine)"
    ax.set(yscale="log", xlabel="step", ylabel="cross-entropy")
    ax.set_title(title, fontsize=10)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def draw(report: Report, folder: Path) -> dict[str, str]:
    """Writes every picture for which the report has numbers. Returns file name in ``folder`` -> caption."""
    figures = {
        "throughput.png": (
            _bars(report, "images/s", _throughput, "inference", "training"),
            "Images per second: median of all rounds, whiskers from the 20th to the 80th percentile. Higher is better.",
        ),
        "saved.png": (
            _bars(report, "MB per image", _megabytes("saved_bytes_per_image"), "training"),
            "Kept for the backward pass, MB per image, without parameters. Lower is better.",
        ),
        "peak.png": (
            _bars(report, "MB", _megabytes("peak_bytes"), "inference", "training"),
            "Peak memory of one step above the model and its images, MB. Lower is better.",
        ),
        "digits.png": (
            _losses(report["digits"]) if report["digits"] else None,
            "A whole training, fused beside plain, from the same seed.",
        ),
    }
    found = {name: (figure, caption) for name, (figure, caption) in figures.items() if figure is not None}
    for name, (figure, _) in found.items():
        figure.savefig(folder / name, dpi=130)
    return {name: caption for name, (_, caption) in found.items()}
