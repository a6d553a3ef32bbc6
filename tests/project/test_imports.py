"""Who may import whom: a module imports from its own tier or a lower one, and files form no cycle; and what ``import
fused_resnet`` costs."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from source_tree import PACKAGE, ROOT, run

TIERS = (
    {"_version", "base"},
    {"reference", "spec"},
    {"backends"},
    {"planner"},
    {"chain"},
    {"functional", "fusion"},
    {"modules", "models"},
    {"frozen"},
    {"explanation", "measure", "traffic"},
    {""},  # fused_resnet/__init__.py: the public names
    {"training"},
    {"studies"},
    {"cli"},
    {"__main__"},
)
# Seen by anybody, themselves seeing torch and the standard library only.
TORCH_ONLY = {"_version", "base.arguments", "base.locks", "reference"}


def tier(module: str) -> int | None:
    """The tier of "fused_resnet.backends.cpu" is that of its first part, "backends"."""
    part = module.removeprefix(PACKAGE).lstrip(".").split(".")[0]
    return next((level for level, parts in enumerate(TIERS) if part in parts), None)


def module_name(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, without the bodies of ``if TYPE_CHECKING``: what is not run can't make a cycle."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield child
        yield from runtime_nodes(child)


def absolute(name: str, module: str, is_package: bool, level: int) -> str:
    """``from ..name`` inside ``module``, spelled out."""
    if not level:
        return name
    parts = module.split(".")
    base = parts[: len(parts) - level + is_package]
    return ".".join([*base, *([name] if name else [])])


def imported(source: str, path: str, known: set[str]) -> Iterator[str]:
    """Absolute names of the modules that a source imports; functions' late imports and importlib's count too."""
    module, is_package = module_name(path), path.endswith("/__init__.py")
    for node in runtime_nodes(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", module, is_package, node.level)
            for alias in node.names:
                # "from fused_resnet.backends import cpu" imports a module if there is one of that name, else a value.
                below = f"{base}.{alias.name}"
                yield below if below in known else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    yield absolute(name.lstrip("."), module, is_package, len(name) - len(name.lstrip(".")))


def cycles(graph: Mapping[str, set[str]]) -> Iterator[str]:
    """Each cycle that a depth-first walk closes, as "a -> b -> a"."""
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> Iterator[str]:
        if node in trail:
            yield " -> ".join([*trail[trail.index(node) :], node])
        elif node not in done:
            for successor in sorted(graph.get(node, ())):
                yield from walk(successor, [*trail, node])
            done.add(node)

    for start in sorted(graph):
        yield from walk(start, [])


def violations(sources: Mapping[str, str]) -> list[str]:
    """What breaks the import rule in {path: source}, one sentence each."""
    known = {module_name(path) for path in sources}
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for path, source in sorted(sources.items()):
        module = module_name(path)
        mine = tier(module)
        if mine is None:
            found.append(f"{module} has no tier: give it one in TIERS, and in the design's list")
            continue
        graph[module] = set()
        for name in imported(source, path, known):
            first = name.split(".")[0]
            if first != PACKAGE:
                if module.removeprefix(f"{PACKAGE}.") in TORCH_ONLY and first not in sys.stdlib_module_names | {
                    "torch"
                }:
                    found.append(f"{module} imports {name}, it may import torch only")
                continue
            if module.removeprefix(f"{PACKAGE}.") in TORCH_ONLY:
                found.append(f"{module} imports {name}, it may import torch only")
            theirs = tier(name)
            if theirs is None or theirs > mine:
                found.append(f"{module} imports {name}, which is above it")
            if name != module:
                graph[module].add(name)
    return found + [f"cycle: {cycle}" for cycle in cycles(graph)]


def test_import_rule_holds() -> None:
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / PACKAGE).rglob("*.py")}
    assert len(sources) > 1
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"spec.py": "from fused_resnet.chain import run", "chain.py": ""}, "fused_resnet.spec imports"),
        (
            {"backends/cpu.py": "from ..planner import pick", "planner.py": ""},
            "backends.cpu imports fused_resnet.planner",
        ),
        ({"backends/__init__.py": "from .. import planner", "planner.py": ""}, "backends imports fused_resnet.planner"),
        ({"chain.py": "def f():\n    import fused_resnet.modules", "modules.py": ""}, "which is above it"),
        ({"spec.py": "import importlib\nimportlib.import_module('fused_resnet.frozen')"}, "which is above it"),
        ({"models/resnet.py": "import fused_resnet", "__init__.py": ""}, "models.resnet imports fused_resnet,"),
        (
            {"__init__.py": "from fused_resnet import cli", "cli/__init__.py": ""},
            "fused_resnet imports fused_resnet.cli",
        ),
        ({"reference.py": "import numpy"}, "may import torch only"),
        ({"reference.py": "from fused_resnet.spec import Act", "spec.py": ""}, "may import torch only"),
        ({"helpers.py": ""}, "fused_resnet.helpers has no tier"),
        (
            {"modules.py": "from .models import resnet", "models/resnet.py": "from fused_resnet import modules"},
            "cycle: ",
        ),
        ({"cli/__init__.py": "from .env import run", "cli/env.py": "from . import main"}, "cycle: "),
    ],
)
def test_import_rule_checker_finds(sources: dict[str, str], expected: str) -> None:
    assert any(expected in line for line in violations({f"{PACKAGE}/{path}": text for path, text in sources.items()}))


def test_import_rule_checker_allows() -> None:
    sources = {
        "__init__.py": "from fused_resnet import models\nfrom fused_resnet.frozen.freezing import freeze",
        "_version.py": "",
        "base/library.py": "import torch",
        "spec.py": "import math",
        "reference.py": "import torch\nif TYPE_CHECKING:\n    from fused_resnet.spec import Act",
        "backends/__init__.py": "from fused_resnet.spec import Act\nimport importlib\nimportlib.import_module(name)",
        "backends/cpu.py": "from fused_resnet.base import library\nfrom . import Case\nfrom .aten import conv",
        "backends/aten.py": "from ..spec import Act",
        "frozen/freezing.py": "from ..models import resnet\nfrom fused_resnet.modules import Chain",
        "models/__init__.py": "from .resnet import resnet18",
        "models/resnet.py": "import numpy",
        "modules.py": "from fused_resnet.spec import Act",
        "cli/__init__.py": "import fused_resnet\nfrom fused_resnet.reference import chain",
    }
    assert violations({f"{PACKAGE}/{path}": text for path, text in sources.items()}) == []


# ------------------------------------------------------------------------------------------------ import
IMPORT_COST = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import fused_resnet
seconds = time.process_time() - start
new = set(sys.modules) - before
found = {name.split(".")[0] for name in new} | {name for name in new if name == "torch._dynamo"}
print(json.dumps({"seconds": seconds, "modules": sorted(found)}))
"""


def test_import_is_cheap_and_light(tmp_path: Path) -> None:
    seconds = []
    for _ in range(5):
        # bytecode is kept, as where users install
        result = run(["-c", IMPORT_COST], ROOT, PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(tmp_path))
        assert result.returncode == 0, result.stderr
        seen = json.loads(result.stdout)
        heavy = {"triton", "torchvision", "timm", "transformers", "rich", "matplotlib", "sklearn", "torch._dynamo"}
        assert not heavy & set(seen["modules"])
        seconds.append(seen["seconds"])
        if seconds[-1] < 0.05:  # the best of five decides: a first run compiles bytecode, a busy machine delays any
            return
    raise AssertionError(f"import fused_resnet took {min(seconds):.3f} s beyond import torch, expected < 0.050 s")


def test_the_rest_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, fused_resnet; print([n for n in sys.modules if n.startswith('fused_resnet.models')]); "
        "from fused_resnet import *; "
        "print(fused_resnet.models is models, freeze.__name__, 'explain' in dir(fused_resnet)); "
        "fused_resnet.nothing"
    )
    result = run(["-c", code], ROOT)
    assert result.stdout == "[]\nTrue freeze True\n"
    assert result.stderr.endswith("AttributeError: module 'fused_resnet' has no attribute 'nothing'\n")


def test_import_works_without_the_library() -> None:
    code = (
        "import pathlib, fused_resnet; from fused_resnet.base import library; library.PATH = pathlib.Path('none.so'); "
        "print(fused_resnet.backends()['aten'], '|', fused_resnet.backends()['cpu'])"
    )
    result = run(["-c", code], ROOT)
    assert result.returncode == 0, result.stderr
    aten, cpu = result.stdout.strip().split(" | ")
    assert aten == "ok"
    assert cpu != "ok"
