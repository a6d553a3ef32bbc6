"""Tests that need several processes: they are started once, run all their cases, and leave a verdict on each.

A case is a function of (rank, world). In all processes the same cases run in the same order, from the same seed; after
one that failed the processes are out of step, so the rest is not run. What hangs is killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from source_tree import ROOT

Case = Callable[[int, int], None]
# How long a process waits for the others in a collective; ``ended`` is what ends a hang.
PATIENCE = timedelta(hours=1)


def environment(**more: str) -> dict[str, str]:
    """For a child process: one thread, this package."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def ended(children: Sequence[subprocess.Popen[str]], timeout_s: float) -> bool:
    """Whether all of them end in so many seconds, a time in which the whole machine is stopped not counted."""
    tick = 0.1
    for _ in range(int(timeout_s / tick)):
        if all(child.poll() is not None for child in children):
            return True
        time.sleep(tick)
    return False


def launch(script: Path, world: int, folder: Path, timeout_s: float) -> dict[str, list[str]]:
    """Runs ``script``, which calls ``work``, in ``world`` processes.

    Returns:
        case -> "ok", or what went wrong, of each process that came to it.
    """
    children = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=environment(RANK=str(rank), WORLD_SIZE=str(world), FOLDER=str(folder), TRITON_INTERPRET="1"),
            stdout=(folder / f"log{rank}").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    if not ended(children, timeout_s):
        for child in children:
            child.kill()
            child.wait()
    verdicts: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.verdict")):
        verdicts.setdefault(file.stem.split("-", 1)[1], []).append(file.read_text())
    logs = [f"process {rank}: {(folder / f'log{rank}').read_text()[-2000:]}" for rank in range(world)]
    verdicts["(log)"] = logs
    return verdicts


def work(cases: Mapping[str, Case]) -> None:
    """What a process started by ``launch`` does."""
    import any_size  # noqa: F401
    import captures

    captures.cheaper()
    rank, world, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(os.environ["FOLDER"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", PATIENCE, rank=rank, world_size=world)
    for name, case in cases.items():
        torch.manual_seed(zlib.crc32(name.encode()))
        start = time.perf_counter()
        verdict = folder / f"{rank}-{name}.verdict"
        try:
            case(rank, world)
        except BaseException:
            verdict.write_text(traceback.format_exc())
            os._exit(1)  # the others must not wait for this one
        verdict.write_text("ok")
        print(f"{name}: {time.perf_counter() - start:.2f} s", flush=True)
        dist.barrier()
    leave()


def leave() -> NoReturn:
    """Ends this process of a group without the interpreter's finalization.

    DistributedDataParallel keeps the group after ``destroy_process_group``. A thread of gloo that still holds a tensor
    during the finalization aborts the process (pytorch#179291).
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
