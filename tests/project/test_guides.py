"""The guides in docs/ run as they stand: their Python blocks, one after the other, are one script."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT, SUPPORT

PAGES = sorted((ROOT / "docs").glob("*.md"))
GUIDES = [page for page in PAGES if "```python" in page.read_text()]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# An HTML comment of its own line, right before a block: <!-- not run: the reason -->
SKIP = re.compile(r"<!-- not run: (.+) -->\s*\Z")
# The same, where packages are missing: <!-- needs package, package -->
NEEDS = re.compile(r"<!-- needs (.+) -->\s*\Z")
# How a guide tells to start it, where it is not "python": torchrun and its options
START = re.compile(r"^    (torchrun .+) \w+\.py$", re.M)


def script(text: str) -> str:
    """The guide's blocks at the lines where they stand in it, so that a traceback names the guide's own line."""
    lines = [""] * (text.count("\n") + 1)
    for block in FENCE.finditer(text):
        if block[1] == "python" and not SKIP.search(text, 0, block.start()) and not lacking(text, block):
            first = text.count("\n", 0, block.start(2))
            for i, line in enumerate(block[2].splitlines()):
                lines[first + i] = line
    return "\n".join(lines)


def lacking(text: str, block: re.Match[str]) -> list[str]:
    """The packages that a block needs and that are not installed."""
    needs = NEEDS.search(text, 0, block.start())
    names = needs[1].split(", ") if needs is not None else []
    return [name for name in names if importlib.util.find_spec(name) is None]


def command(text: str, path: Path) -> list[str]:
    started = START.search(text)
    if started is None:
        return [sys.executable, str(path)]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", *started[1].split()[1:], str(path)]


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_guide(guide: Path, tmp_path: Path) -> None:
    text = guide.read_text()
    code = script(text)
    assert not code.partition("\n")[0], "a guide's first line is its title"
    code = f"import any_size{code}"
    if "torchvision" in code:
        import torchvision_shim  # noqa: F401  (skips where there is none)

        code = f"import torchvision_shim, {code.removeprefix('import ')}"
    if "import triton" in code:
        pytest.importorskip("triton", reason="needs Triton")
    path = tmp_path / f"{guide.stem}_guide.py"
    path.write_text(code)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]),
        "FUSED_RESNET_CACHE": str(tmp_path / "cache"),
    }
    ran = subprocess.run(command(text, path), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=550)
    assert ran.returncode == 0, f"{guide.name}, lines as in the guide:\n{ran.stdout}{ran.stderr}"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_what_a_guide_leaves_out(guide: Path) -> None:
    """Every fence closes and names its language, every marker stands before a block, and most of a guide runs."""
    text = guide.read_text()
    blocks = list(FENCE.finditer(text))
    assert text.count("```") == 2 * len(blocks) and all(block[1] for block in blocks)
    python = [block for block in blocks if block[1] == "python"]
    skipped = [block for block in python if SKIP.search(text, 0, block.start())]
    needing = [block for block in python if NEEDS.search(text, 0, block.start())]
    for marker, marked in (("not run", skipped), ("needs", needing)):
        assert len(re.findall(f"<!-- {marker}", text)) == len(marked), "a marker without a reason, or without a block"
    assert len(python) > 2 * len(skipped)


def test_links() -> None:
    """What the README and docs/ link to is there, and the README names every page of docs/."""
    readme = ROOT / "README.md"
    for page in [readme, *PAGES]:
        for target in re.findall(r"\]\(([^)#:\s]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    for page in PAGES:
        assert f"(docs/{page.name})" in readme.read_text(), page.name


def test_blocks_are_found() -> None:
    skipped = "<!-- not run: no GPU -->\n\n```python\nb\n```\n"
    text = f"# t\n\n```python\na = 1\n```\nx\n{skipped}```sh\nc\n```\n```python\nd = 2\n```\n"
    text += "<!-- needs no_such_package -->\n\n```python\ne\n```\n<!-- needs os -->\n```python\nf = 3\n```\n"
    places = {i: line for i, line in enumerate(text.splitlines()) if line in ("a = 1", "d = 2", "f = 3")}
    assert {i: line for i, line in enumerate(script(text).splitlines()) if line} == places and len(places) == 3
    assert command(text, Path("p.py")) == [sys.executable, "p.py"]
    torchrun = command(text + "\n    torchrun --nproc-per-node 2 train.py\n", Path("p.py"))
    assert torchrun[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "p.py"]
