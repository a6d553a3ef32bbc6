"""Files of at most 450 lines; functions of at most 60 lines, but for kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from source_tree import ROOT

FOLDERS = ("fused_resnet", "tests", "benchmarks")
FILE, FUNCTION = 450, 60


def too_long(text: str) -> Iterator[str]:
    """What in a source file exceeds its limit. Functions that a decorator compiles (triton.jit) are kernels."""
    if (lines := text.count("\n")) > FILE:
        yield f"{lines} lines"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any(".jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        assert node.end_lineno is not None
        if (lines := node.end_lineno - node.lineno + 1) > FUNCTION:
            yield f"{node.name}, line {node.lineno}: {lines} lines"


def test_files_and_functions() -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 100
    found = {str(path.relative_to(ROOT)): list(too_long(path.read_text())) for path in paths}
    assert not {path: texts for path, texts in found.items() if texts}


def test_what_is_too_long() -> None:
    kernel = "@triton.jit\ndef kernel():\n" + "    pass\n" * FUNCTION
    method = "class A:\n    async def f(self):\n" + "        pass\n" * FUNCTION
    assert not list(too_long(kernel + "def f():\n" + "    pass\n" * (FUNCTION - 1)))
    assert list(too_long(method)) == [f"f, line 2: {FUNCTION + 1} lines"]
    assert list(too_long("\n" * (FILE + 1))) == [f"{FILE + 1} lines"]
