"""Writes the README's results from the committed results.json, so that no figure in it is typed by hand: of each device
the newest, and of these the ``MOST`` newest.

python benchmarks/readme_table.py           # rewrites README.md between its markers
python benchmarks/readme_table.py --check   # exit code 1 if README.md says something else
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MOST = 2  # devices
MARKERS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)


def cell(variant: dict[str, Any] | None) -> str:
    """images/s and the speed-up of one variant."""
    if variant is None or variant["status"] != "measured":
        return "–"
    return f"{variant['images_per_s']['median']:.1f} ({variant['speedup']['median']:.2f}×)"


def table(path: Path) -> str:
    """The Markdown of one results.json."""
    results = json.loads(path.read_text())
    lines = [
        f"{results['device']}, batch {results['config']['batch_size']}, {results['config']['size']}×"
        f"{results['config']['size']}, channels_last, torch {results['versions']['torch']}, {results['date']}: images "
        "per second, median, and in brackets the median of the paired ratios to plain PyTorch "
        f"([all figures]({path.relative_to(ROOT).as_posix()}), written by `make bench`).",
        "",
        f"![images per second]({path.parent.relative_to(ROOT).as_posix()}/throughput.png)",
        "",
        "| model | mode | dtype | plain | torch.compile | fused | kept for backward, MB/image |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        v = {variant["variant"]: variant for variant in case["variants"]}
        saved = [v[name].get("saved_bytes_per_image") for name in ("plain", "fused")]
        kept = " → ".join(f"{s / 1e6:.1f}" for s in saved if s) or "–"
        lines.append(
            f"| {case['model']} | {case['mode']} | {case['dtype']} | {cell(v['plain'])} | {cell(v.get('compile'))} "
            f"| **{cell(v['fused'])}** | {kept} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    found = [(json.loads(p.read_text()), p) for p in (ROOT / "benchmarks" / "results").glob("*/results.json")]
    newest = {raw["device"]: path for raw, path in sorted(found, key=lambda f: f[0]["date"])}
    readme = ROOT / "README.md"
    text = readme.read_text()
    made = MARKERS.sub(lambda m: m[1] + "\n".join(map(table, list(newest.values())[-MOST:])) + m[2], text)
    if "--check" in sys.argv:
        return int(made != text)
    readme.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
