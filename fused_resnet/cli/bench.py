"""``fused-resnet bench``, the main job: validate, measure, train on digits, print the table and write the report.

With ``--distributed`` it runs scaling.py instead.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fused_resnet.cli import report, scaling
from fused_resnet.cli.cases import Settings, Subject, run_case
from fused_resnet.cli.console import console, pick_device, pick_models, progress, table, write_json
from fused_resnet.cli.digits import train_both
from fused_resnet.cli.env import head
from fused_resnet.cli.variants import CompileBudget

MODES = ("inference", "training")
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Preset:
    """The amount of work. ``compile_s``: seconds that torch.compile may take in all, with empty caches."""

    models: tuple[str, ...]
    repeats: tuple[int, int]
    case_budget_s: float
    compile_s: float
    epochs: int


PRESETS = {
    "quick": Preset(("resnet18", "resnet50"), (4, 30), 6.0, 80.0, 8),
    "full": Preset(
        ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d"),
        (10, 50),
        60.0,
        float("inf"),
        20,
    ),
}


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark. Returns 0 if every validation and both trainings hold."""
    start = time.perf_counter()
    preset = PRESETS[args.preset]
    names = pick_models(args.models, preset.models)
    repeats = (args.repeats, args.repeats) if args.repeats else preset.repeats
    if args.distributed:
        return scaling.run(args, names, repeats, preset.case_budget_s)
    device = pick_device(args.device)
    settings = Settings.of(args, device, repeats, preset.case_budget_s)
    budget = None if args.no_compile else CompileBudget(preset.compile_s)
    epochs = 0 if args.no_digits else preset.epochs
    cases = []
    trainings = []
    with progress() as bar:
        total = len(names) * (1 + len(MODES) * len(DTYPES)) + 2 * epochs
        task = bar.add_task("", total=total)
        subjects = []
        for name in names:
            bar.update(task, description=f"{name} in float64")
            subjects.append(Subject(name, settings))
            bar.advance(task)
        for mode in MODES:  # inference first: torch.compile takes least time there, and its time is limited
            for subject in subjects:
                for dtype in DTYPES:
                    bar.update(task, description=f"{subject.name} {mode} {dtype}")
                    cases.append(run_case(subject, mode, dtype, budget))
                    bar.advance(task)
        if epochs:
            bar.update(task, description="resnet20 on digits, plain and fused")
            trainings = train_both(epochs, device, args.seed, lambda: bar.advance(task))

    config: dict[str, Any] = {"preset": args.preset, "models": names, "compile": budget is not None}
    config |= asdict(settings) | {"device": str(device), "digits_epochs": epochs}
    found = {
        "ok": all(found["ok"] for found in (*cases, *trainings)),
        **head(device),
        "config": config,
        "cases": cases,
        "digits": {"epochs": epochs, "trainings": trainings} if trainings else None,
        "explain": {s.name: s.explanation() for s in subjects},
        "elapsed_s": round(time.perf_counter() - start, 1),
    }
    found["verdicts"] = report.verdicts(found)
    written = report.write(found, Path(args.output))
    if args.json:
        write_json(args.json, found)
    _print(found, written)
    return 0 if found["ok"] else 1


def _print(found: report.Report, written: list[Path]) -> None:
    out = console()
    title = f"{found['device']}, batch {found['config']['batch_size']}, torch {found['versions']['torch']}"
    out.print(table(title, report.COLUMNS, report.lines(found), left=4))
    for good, text in found["verdicts"]:
        out.print(f"[{'green' if good else 'red'}]{'+' if good else '-'}[/] {text}")
    out.print(f"{found['elapsed_s']:.0f} s; written: {', '.join(str(path) for path in written)}")
