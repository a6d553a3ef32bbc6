"""What gpu_report.py writes of what it found: report.md and kernels.png."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fused_resnet import planner

CONVOLUTIONS = ("conv_bias_act", "conv_stats", "conv_backward")


def markdown(found: dict[str, Any], steps: Iterable[str]) -> str:
    """The report as text: what was reached, and of what; ``steps``: their names, in order."""
    lines = [f"# {found['device']}", "", f"{found['date']}, torch {found['versions']['torch']}, "]
    lines[-1] += f"triton {found['versions']['triton']}, batch {found['config']['batch']}, {found['config']['size']} px"
    bound = found.get("limits") or {}
    if "bytes_per_s" in bound:
        lines += [
            "",
            f"Copy {bound['bytes_per_s'] / 1e12:.2f} TB/s, bf16 product {bound['flops_per_s'] / 1e12:.0f} TFLOP/s.",
        ]
    for step in steps:
        result = found.get(step)
        if result is not None and (not result.get("ok", True) or "skipped" in result):
            lines += [
                "",
                f"**{step}**: {result.get('skipped') or result.get('error') or result.get('output', '')[-1500:]}",
            ]
    rows = (found.get("passes") or {}).get("rows", [])
    if rows:
        lines += ["", "| pass | images | shape | backend | ms | of a copy's bandwidth |", "|---|---|---|---|---|---|"]
    for row in rows:
        share = f"{row['of_copy']:.0%}" if "of_copy" in row else "–"
        shape = "x".join(map(str, row["shape"]))
        lines.append(
            f"| {row['primitive']} | {row['operands']} | {shape} | {row['backend']} | {row['ms']:.4f} | {share} |"
        )
    rows = (found.get("kernels") or {}).get("rows", [])
    if rows:
        lines += ["", "| signature | chosen | ms | roofline ms | share | aten ms |", "|---|---|---|---|---|---|"]
    for row in rows:
        choice = planner.Choice.decode(row["choice"])
        ms, ideal = row["ms"][planner.label(choice)], row.get("roofline_ms")
        share = f"{ideal:.4f} | {ideal / ms:.0%}" if ideal is not None else "– | –"
        lines.append(f"| {row['signature']} | {choice} | {ms:.4f} | {share} | {row['ms']['aten']:.4f} |")
    lines += convolutions(rows)
    networks_found = (found.get("networks") or {}).get("cases", [])
    if networks_found:
        lines += ["", "| network | mode | variant | images/s | x plain |", "|---|---|---|---|---|"]
    for case in networks_found:
        for row in case["variants"]:
            if row["status"] != "measured":
                lines.append(
                    f"| {case['model']} | {case['mode']} | {row['variant']} | {row['status']}: {row['note']} | |"
                )
                continue
            speedup = row["speedup"]["median"]
            lines.append(
                f"| {case['model']} | {case['mode']} | {row['variant']} "
                f"| {row['images_per_s']['median']:.1f} | {speedup:.2f} |"
            )
        for key, variant in (("cuda_graph", "fused, CUDA graph"), ("max_autotune", "compile, max-autotune")):
            if f"{key}_images_per_s" in case:
                rate = case[f"{key}_images_per_s"]
                lines.append(f"| {case['model']} | {case['mode']} | {variant} | {rate:.1f} | |")
    return "\n".join(lines) + "\n"


def convolutions(rows: list[dict[str, Any]]) -> list[str]:
    """The best time of every backend for each convolution, side by side."""
    table = [(row["signature"], by_backend(row["ms"])) for row in rows if row["primitive"] in CONVOLUTIONS]
    names = sorted({name for _, best in table for name in best})
    if not table:
        return []
    lines = ["", f"| convolution, ms | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for signature, best in table:
        times = (f"{best[name]:.4f}" if name in best else "–" for name in names)
        lines.append(f"| {signature} | {' | '.join(times)} |")
    return lines


def by_backend(ms: dict[str, float]) -> dict[str, float]:
    """The best of a backend's configurations; CUTLASS's tiles, which are those of ``cuda``, by themselves. A gradient
    of conv_backward that was measured by itself comes as "input: triton", the best pair as "apart"."""
    best: dict[str, float] = {}
    for label, time_ms in ms.items():
        part, _, choice = label.rpartition(": ")
        name = "cutlass" if "cutlass" in choice else choice.split(" ")[0]
        name = "apart" if part == "apart" else f"{part}: {name}" if part else name
        best[name] = min(time_ms, best.get(name, time_ms))
    return best


def plot(found: dict[str, Any], output: Path) -> None:
    """kernels.png: the share of its roofline that each signature reaches."""
    from matplotlib.figure import Figure

    rows = [r for r in (found.get("kernels") or {}).get("rows", []) if r.get("roofline_ms")]
    if not rows:
        return
    figure = Figure(figsize=(8, 0.2 * len(rows) + 1.5), layout="constrained")
    ax = figure.add_subplot()
    for i, row in enumerate(rows):
        ms = row["ms"][planner.label(planner.Choice.decode(row["choice"]))]
        ax.barh(i, 100 * row["roofline_ms"] / ms, color="#e4572e")
        ax.plot(100 * row["roofline_ms"] / row["ms"]["aten"], i, "|", color="#202124")
    ax.set_yticks(range(len(rows)), [r["signature"][:70] for r in rows], fontsize=5)
    ax.invert_yaxis()
    ax.set_xlabel("% of roofline (bar: chosen, line: aten)")
    figure.savefig(output / "kernels.png", dpi=130)
