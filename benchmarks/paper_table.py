"""Writes what the quick preset found into docs/paper.md, from the newest committed run: no figure is typed by hand.

python benchmarks/paper_table.py           # rewrites docs/paper.md between its markers
python benchmarks/paper_table.py --check   # exit code 1 if docs/paper.md says something else
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from fused_resnet.studies import STUDIES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "paper.md"
MARKERS = re.compile(r"(<!-- studies -->\n).*?(<!-- /studies -->)", re.DOTALL)


def sections(folder: Path) -> str:
    """The Markdown of one run: where it was measured, then each study's verdicts and picture."""
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in STUDIES}
    link = Path(os.path.relpath(folder, PAGE.parent)).as_posix()
    first = next(iter(found.values()))
    training, measuring = max(f["training_s"] for f in found.values()), sum(f["elapsed_s"] for f in found.values())
    lines = [
        f"{first['device']}, torch {first['versions']['torch']}, {first['date']}, seeds "
        f"{', '.join(map(str, first['seeds']))}: {training:.0f} s for the trainings, {first['processes']} at a time, "
        f"and {measuring:.0f} s for what the studies measure beyond them. [The files]({link}), written by "
        f"`fused-resnet study all`.",
    ]
    for name, f in found.items():
        lines += ["", f"### {name}", ""]
        lines += [
            f"- **{'held' if v['held'] else 'did not hold'}**: *{v['claim']}*. {v['sentence']}" for v in f["verdicts"]
        ]
        lines += ["", f"![{STUDIES[name].title}]({link}/{name}.png)"]
    return "\n".join(lines)


def main() -> int:
    """Returns 0 when docs/paper.md is (now) what the newest run says."""
    newest = max((ROOT / "benchmarks" / "results").glob("study-quick-*"))
    text = PAGE.read_text()
    expected = MARKERS.sub(lambda m: f"{m[1]}{sections(newest)}\n{m[2]}", text)
    if "--check" in sys.argv[1:]:
        return int(text != expected)
    PAGE.write_text(expected)
    return 0


if __name__ == "__main__":
    sys.exit(main())
