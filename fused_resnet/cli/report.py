"""The benchmark's report: the table, the verdicts in sentences, the folder with JSON, pictures and HTML."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from fused_resnet.cli import plots
from fused_resnet.cli.console import write_json
from fused_resnet.cli.variants import TITLES

Report = dict[str, Any]
COLUMNS = (
    "model", "mode", "dtype", "variant", "images/s (p20–p80)", "ms/step", "× plain", "saved MB/image", "peak MB",
    "error vs fp64", "note",
)  # fmt: skip
NOISE = 0.03  # speed-ups closer to 1 than this count as equal


def cells(case: Report, row: Report) -> list[str]:
    """One line of the table, as text."""
    head = [case["model"], case["mode"], case["dtype"], row["variant"]]
    error = row["error"].get("gradients", row["error"].get("out"))
    shown = "–" if error is None else f"{error:.1e}"
    if row["status"] != "measured":
        return [*head, row["status"], "–", "–", "–", "–", shown, row["note"]]
    rate, ms, speedup = row["images_per_s"], row["ms_per_step"]["median"], row["speedup"]
    saved, peak = row.get("saved_bytes_per_image"), row["peak_bytes"]
    return [
        *head,
        f"{rate['median']:.1f} ({rate['p20']:.1f}–{rate['p80']:.1f})",
        f"{ms:.0f}" if ms >= 10 else f"{ms:.2f}",
        f"{speedup['median']:.2f}" if speedup else "–",
        f"{saved / 1e6:.1f}" if saved is not None else "–",
        f"{peak / 1e6:.0f}" if peak is not None else "–",
        shown,
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


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color: #202124; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: left; border-bottom: 2px solid #5f6368; } td, th { padding: .3rem .6rem; vertical-align: top; }
td { border-bottom: 1px solid #e8eaed; }
tr.fused td { background: #fdf1ed; } tr.first td { border-top: 2px solid #bdc1c6; }
td.number { text-align: right; white-space: nowrap; } .bad { color: #b3261e; } .good { color: #1e6b34; }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption { color: #5f6368; font-size: 13px; }
pre { background: #f6f7f8; padding: .8rem; overflow-x: auto; font-size: 12px; }
"""


def _flat(entries: Report) -> str:
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in entries.items())
    return f"<table>{rows}</table>"


def _table(report: Report) -> str:
    body = []
    for case in report["cases"]:
        for i, row in enumerate(case["variants"]):
            text = cells(case, row)
            marks = [*(["first"] if i == 0 else []), row["variant"], *(["bad"] if row["status"] == "failed" else [])]
            classes = [' class="number"' if 4 <= j <= 9 else "" for j in range(len(text))]
            tds = "".join(f"<td{c}>{escape(t)}</td>" for c, t in zip(classes, text, strict=True))
            body.append(f'<tr class="{" ".join(marks)}">{tds}</tr>')
    head = "".join(f"<th>{escape(c)}</th>" for c in COLUMNS)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _html(report: Report, pictures: dict[str, str], folder: Path) -> str:
    figures = []
    for name, caption in pictures.items():
        image = base64.b64encode((folder / name).read_bytes()).decode()
        figures.append(
            f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{image}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    said = "".join(f'<li class="{"good" if good else "bad"}">{escape(text)}</li>' for good, text in report["verdicts"])
    explained = "".join(f"<h3>{escape(k)}</h3><pre>{escape(v)}</pre>" for k, v in report["explain"].items())
    config = report["config"]
    what = (
        f"Input: crops of two photographs (scikit-learn's china.jpg and flower.jpg), {config['batch_size']} × 3 × "
        f"{config['size']} × {config['size']}, normalised as for ImageNet. A training step is zero_grad, forward, "
        "cross-entropy, backward and SGD with momentum. All variants of a case run in one process, in turns, each "
        "round starting with another one; figures are medians over the rounds with 20th and 80th percentiles. × plain "
        "is the median of the rounds' own ratios. The error is relative to float64, ‖·−ref‖/‖ref‖: of the output in "
        "inference, the root mean square over all gradients in training; bf16 is autocast in training."
    )
    names = "".join(f"<li><b>{escape(k)}</b>: {escape(v)}</li>" for k, v in TITLES.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fused_resnet benchmark</title><style>{_STYLE}</style></head><body>
<h1>fused_resnet {escape(report["versions"]["fused_resnet"])}: benchmark</h1>
<p><b>{escape(report["device"])}</b>, {escape(report["date"])}, preset {escape(config["preset"])},
{report["elapsed_s"]:.0f} s.</p>
<h2>Verdict</h2><ul>{said}</ul>
<h2>Measured</h2><p>{escape(what)}</p><ul>{names}</ul>{_table(report)}
<h2>Pictures</h2>{"".join(figures)}
<h2>Machine</h2>{_flat(report["machine"])}
<h2>Versions</h2>{_flat(report["versions"] | {"extension": report["extension"]})}
<h2>Backends</h2>{_flat(report["backends"])}
<h2>Settings</h2>{_flat(config)}
<h2>What is fused</h2>
<details><summary>Each block, and which backend serves which of its primitives</summary>{explained}</details>
</body></html>
"""


def write(report: Report, folder: Path) -> list[Path]:
    """Writes results.json, the pictures and report.html (self-contained) to ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", report)
    pictures = plots.draw(report, folder)
    (folder / "report.html").write_text(_html(report, pictures, folder), encoding="utf-8")
    return [folder / name for name in ("results.json", *pictures, "report.html")]
