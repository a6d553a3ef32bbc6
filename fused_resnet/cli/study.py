"""``fused-resnet study``: the paper's experiments, each measured, drawn and judged."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import TimeRemainingColumn

from fused_resnet.cli.console import console, pick_device, progress, table, write_json
from fused_resnet.cli.env import cores, head
from fused_resnet.cli.options import UsageError, usage
from fused_resnet.studies import PRESETS, STUDIES, Laboratory, Result, Study, WorkerLost
from fused_resnet.training import DataError, ResumeError


def pick_studies(names: list[str]) -> list[Study]:
    """The named studies, in the order of ``STUDIES``; a UsageError if there is no such study."""
    unknown = [name for name in names if name not in (*STUDIES, "all")]
    if unknown:
        raise UsageError(f"NAME: expected all or some of {', '.join(STUDIES)}, got {', '.join(unknown)}")
    return [study for name, study in STUDIES.items() if "all" in names or name in names]


def run(args: argparse.Namespace) -> int:
    """Runs the studies and writes each one's JSON and picture as soon as it is done. Returns 0, whatever held."""
    device, preset, chosen = pick_device(args.device), PRESETS[args.preset], pick_studies(args.names)
    output, start = Path(args.output), time.perf_counter()
    with usage("--data: ", DataError, FileNotFoundError):
        data = preset.data(Path(args.data) if args.data else None)
    # on a GPU trainings would share the device; on a CPU each has a core
    processes = args.processes or (min(torch.get_num_threads(), cores()) if device.type == "cpu" else 1)
    if preset.keep and not args.resume and (output / "runs").exists():
        raise UsageError(f"--output {output} holds trainings: --resume continues them; or name another folder")
    environment: dict[str, Any] = {
        **head(device),
        "preset": preset.name,
        "seeds": args.seeds,
        "processes": processes,
        "data": {"name": data.name, "train_images": len(data.train_x), "test_images": len(data.test_x)},
        "recipe": asdict(preset.recipe),
        "recipe_of_deep_networks": asdict(preset.deep_recipe),
    }
    results: list[Result] = []
    with progress(TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=None)

        def advance(work: float, what: str) -> None:
            bar.update(task, advance=work, description=what)

        lab = Laboratory(preset, data, args.seeds, device, advance, output / "runs", args.resume, processes)
        networks = [network for study in chosen for network in study.networks(preset)]
        bar.update(task, total=lab.work(networks) + sum(study.work(preset) for study in chosen))
        lost = usage(f"--processes {processes}: ", WorkerLost)
        with usage("--resume: ", ResumeError), usage("--data: ", DataError), lost:
            if processes > 1:  # a single process trains when a study asks: results come sooner
                lab.prepare(networks)
            for study in chosen:
                begun, trained = time.perf_counter(), lab.training_s
                results.append(study.run(lab))
                measured = time.perf_counter() - begun - (lab.training_s - trained)
                spent = {"training_s": round(lab.training_s, 1), "elapsed_s": round(measured, 1)}
                results[-1].save(output, environment | spent)
    elapsed = round(time.perf_counter() - start, 1)
    trained = round(lab.training_s, 1)
    if args.json:
        found = [result.to_json() for result in results]
        write_json(args.json, environment | {"training_s": trained, "elapsed_s": elapsed, "studies": found})
    rows = [
        (r.study.name, "[green]held[/]" if v.held else "[red]did not hold[/]", v.claim, v.sentence)
        for r in results
        for v in r.verdicts
    ]
    where = f"{preset.name} preset, {data.name}, seeds {', '.join(map(str, args.seeds))}, {environment['device']}"
    console().print(table(where, ("study", "verdict", "the paper's claim", "what was found"), rows, left=4))
    console().print(f"{elapsed:.0f} s, of which training {trained:.0f} s; written: {output}/")
    return 0
