"""The benchmark's report: the table, the verdicts in sentences, the folder with JSON, pictures and HTML."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment

from fused_resnet.cli import plots
from fused_resnet.cli.console import write_json
from fused_resnet.cli.variants import TITLES

Report = dict[str, Any]
COLUMNS = (
    "model", "mode", "dtype", "variant", "images/s (p20–p80)", "ms/step", "× plain", "saved MB/image", "peak MB",
    "error vs fp64", "note",
)  # fmt: skip
NOISE = 0.03  # speed-ups closer to 1 than this count as equal


def rate_cells(row: Report) -> list[str]:
    """Images per second, milliseconds per step and the factor over plain, as text; the status of an unmeasured row."""
    if "images_per_s" not in row:
        return [row["status"], "–", "–"]
    rate, ms, speedup = row["images_per_s"], row["ms_per_step"]["median"], row["speedup"]
    return [
        f"{rate['median']:.1f} ({rate['p20']:.1f}–{rate['p80']:.1f})",
        f"{ms:.0f}" if ms >= 10 else f"{ms:.2f}",
        f"{speedup['median']:.2f}" if speedup else "–",
    ]


def cells(case: Report, row: Report) -> list[str]:
    """One line of the table, as text."""
    error = row["error"].get("gradients", row["error"].get("out"))
    saved, peak = row.get("saved_bytes_per_image"), row.get("peak_bytes")
    return [
        *(case["model"], case["mode"], case["dtype"], row["variant"]),
        *rate_cells(row),
        f"{saved / 1e6:.1f}" if saved is not None else "–",
        f"{peak / 1e6:.0f}" if peak is not None else "–",
        f"{error:.1e}" if error is not None else "–",
        row["note"],
    ]


def lines(report: Report) -> list[list[str]]:
    """The whole table."""
    return [cells(case, row) for case in report["cases"] for row in case["variants"]]


def _case_verdicts(case: Report) -> Iterator[tuple[bool, str]]:
    rows = {row["variant"]: row for row in case["variants"]}
    title = f"{case['model']} {case['mode']} in {case['dtype']}"
    fused, plain = rows["fused"], rows["plain"]
    if fused["status"] != "measured" or plain["status"] != "measured":
        broken = fused if fused["status"] != "measured" else plain
        yield False, f"{title}: no figure for {broken['variant']}; {broken['note']}."
        return
    q = fused["speedup"]
    span = f"{q['median']:.2f}× plain PyTorch (p20–p80: {q['p20']:.2f}–{q['p80']:.2f})"
    if q["median"] < 1 - NOISE:
        yield False, f"{title}: REGRESSED, fused runs at {span}."
    elif q["median"] <= 1 + NOISE:
        yield True, f"{title}: no faster, fused runs at {span}."
    else:
        yield True, f"{title}: fused runs at {span}."
    other = rows.get("compile")
    if other is not None and other["status"] == "measured":
        ratio = fused["images_per_s"]["median"] / other["images_per_s"]["median"]
        if ratio < 1 - NOISE:
            yield False, f"{title}: torch.compile is faster than fused, by {1 / ratio:.2f}×."
    before, after = plain.get("saved_bytes_per_image"), fused.get("saved_bytes_per_image")
    if before and after:
        change = f"{before / 1e6:.1f} → {after / 1e6:.1f} MB per image"
        kept = f"{title}: kept for the backward pass {change}, {100 * (1 - after / before):.0f} % less"
        yield after < before, f"{kept}." if after < before else f"{title}: REGRESSED, kept for backward {change}."


def verdicts(report: Report) -> list[tuple[bool, str]]:
    """Pairs (whether the result is good, a sentence), one per case and one for the digits."""
    found = [verdict for case in report["cases"] for verdict in _case_verdicts(case)]
    failed = [f"{c['model']} {c['mode']} {c['dtype']}" for c in report["cases"] if not c["ok"]]
    numbers = f"all {len(report['cases'])} cases compute what plain PyTorch computes, within the error bound"
    found.insert(0, (not failed, f"validation FAILED: {', '.join(failed)}." if failed else f"Validation: {numbers}."))
    for t in report["digits"]["trainings"] if report["digits"] else []:
        score = f"{100 * t['accuracy']:.1f} % of the test digits right, required {100 * t['required_accuracy']:.0f} %"
        found.append((t["ok"], f"ResNet-20 on digits, {t['variant']}: {score}."))
    return found


def write(report: Report, folder: Path) -> list[Path]:
    """Writes results.json, the pictures and report.html (self-contained) to ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", report)
    captions = plots.draw(report, folder)
    pictures = [(text, base64.b64encode((folder / name).read_bytes()).decode()) for name, text in captions.items()]
    template = Environment(autoescape=True).from_string(Path(__file__).with_name("report.html").read_text("utf-8"))
    page = template.render(report, cells=cells, columns=COLUMNS, titles=TITLES, pictures=pictures)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return [folder / name for name in ("results.json", *captions, "report.html")]
