"""What is to be known of one GPU, in ten minutes: stages in order of value, each in a process with a time limit.

    python benchmarks/first_light.py --output first-light       on a GPU; `make gpu-bundle` packs all that it needs
    python benchmarks/first_light.py --stages kernels,planned   some stages; the others keep their results
    python benchmarks/first_light.py --dry-run                  every stage, at toy size, on a CPU

A stage runs in a process group of its own, which is killed at the stage's limit. So a kernel that hangs costs no other
stage its time. Stages of one group run side by side: they compare numbers and measure no time. A stage writes each
result to results.json at once, so that a stage that is killed keeps what it had. results.md shows the results. log.txt
has the output of all stages. The exit code is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What a killed process may take to end: the driver first stops its kernel.
PATIENCE_S = 10.0


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        function: of first_light_stages.py; argument: what it is called with. group: neighbours of one group run side by
            side. sanitizer: compute-sanitizer's tool under which it runs. default: it runs without being asked for.
    """

    name: str
    limit_s: float
    function: str
    argument: str = ""
    group: str = ""
    sanitizer: str = ""
    default: bool = True


STAGES = (
    Stage("machine", 20, "machine"),
    Stage("compile", 90, "compile_kernels", group="numbers"),
    *(Stage(f"numbers_{name}", 90, "numbers", name, "numbers") for name in ("cuda", "cudnn", "triton")),
    Stage("headline", 150, "headline"),
    Stage("kernels", 90, "kernels"),
    Stage("planned", 40, "planned"),
    *(
        Stage(f"{tool}_{name}", 100, "primitives", name, "sanitizer", tool)
        for tool in ("memcheck", "racecheck")
        for name in ("cuda", "triton")
    ),
    *(Stage(f"replays_{name}", 100, "replays", name, "sanitizer") for name in ("cuda", "cudnn", "triton")),
    Stage("sm90_conv", 60, "sm90_conv"),
    Stage("tests", 280, "tests", default=False),
    Stage("hang", 5, "hang", default=False),
)


# ---------------------------------------------------------------------------------------------------- results
class Results:
    """results.json: {stage: what it found}, shared by the processes of the stages."""

    def __init__(self, output: Path) -> None:
        self.path, self.lock = output / "results.json", output / ".lock"

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def note(self, stage: str, found: dict[str, Any], afresh: bool = False) -> None:
        """Adds to what the stage found, or puts it in its place (``afresh``). The file is always whole."""
        with open(self.lock, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with a process that is killed
            everything = self.read()
            everything[stage] = found if afresh else everything.get(stage, {}) | found
            temporary = self.path.with_suffix(".part")
            temporary.write_text(json.dumps(everything, indent=1, default=str))
            temporary.replace(self.path)


# ---------------------------------------------------------------------------------------------------- stages
def sanitizer() -> str | None:
    """compute-sanitizer, if it is installed."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def command_of(stage: Stage, args: argparse.Namespace) -> list[str]:
    """The command line of the stage's process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--run", stage.name, "--output", str(args.output)]
    command += ["--batch-size", str(args.batch_size), *(["--dry-run"] if args.dry_run else [])]
    if not stage.sanitizer:
        return command
    ours = ["--kernel-name", "kernel_substring=fused_resnet"] if stage.argument == "cuda" else []
    options = ["--tool", stage.sanitizer, "--error-exitcode", "9", "--launch-timeout", "0", *ours]
    return [sanitizer() or "compute-sanitizer", *options, *command]


def environment(stage: Stage, output: Path) -> dict[str, str]:
    """The variables of the stage's process."""
    env = os.environ | {"FUSED_RESNET_CACHE": str(output / "plan"), "PYTHONUNBUFFERED": "1"}
    if stage.function == "compile_kernels":  # Triton's interpreter, which a dry run may ask for, compiles nothing
        env.pop("TRITON_INTERPRET", None)
    if stage.sanitizer:  # each tensor an allocation of its own, so that the tool sees where it ends
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return env


class Running:
    """The process of a stage."""

    def __init__(self, stage: Stage, args: argparse.Namespace, limit_s: float) -> None:
        self.stage, self.results, self.limit_s = stage, Results(args.output), limit_s
        self.results.note(stage.name, {}, afresh=True)
        self.log, self.start = open(args.output / f".{stage.name}.log", "w+b"), time.perf_counter()
        # a process group, not a session: what kills this process's session kills the stage, too
        self.process = subprocess.Popen(
            command_of(stage, args), stdout=self.log, stderr=subprocess.STDOUT, cwd=ROOT, process_group=0,
            env=environment(stage, args.output),
        )  # fmt: skip

    def end(self) -> str:
        """Waits until the limit at most, kills what is left of the group, and notes how the stage ended."""
        status = "killed"
        try:
            code = self.process.wait(max(0.0, self.start + self.limit_s - time.perf_counter()))
            status = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"killed after {self.limit_s:.0f} s"
        finally:
            self.note(status)
        return status

    def note(self, status: str) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # all of it has ended
            pass
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            status += f", still there {PATIENCE_S:.0f} s later"
        found: dict[str, Any] = {"status": status, "seconds": round(time.perf_counter() - self.start, 1)}
        found["group"] = self.process.pid
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        self.log.close()
        Path(self.log.name).unlink()
        if status != "ok":
            found["output"] = text[-4000:]
        self.results.note(self.stage.name, found)
        with open(self.results.path.with_name("log.txt"), "a") as log:
            log.write(f"==== {self.stage.name}: {status}, {found['seconds']} s\n{text}\n")


def run_group(stages: list[Stage], args: argparse.Namespace, deadline: float) -> bool:
    """Runs stages side by side. Returns whether all ended well."""
    started, good = [], True
    try:
        for stage in stages:
            left = deadline - time.perf_counter()
            reason = "no time is left" if left < 2 else ""
            if stage.sanitizer and sanitizer() is None:
                reason = "compute-sanitizer is not installed"
            if reason:
                good &= left >= 2
                Results(args.output).note(stage.name, {"status": f"skipped: {reason}"}, afresh=True)
                print(f"{stage.name}: skipped: {reason}", flush=True)
                continue
            # a toy's stages share their cores with other work
            limit_s = stage.limit_s * (10 if args.dry_run and stage.function != "hang" else 1)
            started.append(Running(stage, args, min(limit_s, left)))
        while started:
            running = started.pop(0)
            status = running.end()
            good &= status == "ok"
            print(f"{running.stage.name}: {status}, {time.perf_counter() - running.start:.0f} s", flush=True)
    finally:  # this process is to end: so must they
        for running in started:
            running.note("stopped")
    return good


def run_stage(name: str, args: argparse.Namespace) -> int:
    """In the stage's own process: calls its function."""
    stage = next(s for s in STAGES if s.name == name)
    if stage.function == "hang":  # what the time limits are tested with
        Results(args.output).note(name, {"found": "before it hung"})
        return subprocess.run(["sleep", "600"]).returncode
    import first_light_stages as stages

    run = stages.Run(Results(args.output), name, args.dry_run, args.batch_size)
    getattr(stages, stage.function)(run, *([stage.argument] if stage.argument else []))
    return 0 if run.ok else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--output", type=Path, default=Path("first-light"))
    parser.add_argument("--stages", help=f"of {', '.join(names)}; all but {', '.join(names[-2:])} by default")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=570, help="for all stages together")
    parser.add_argument("--dry-run", action="store_true", help="every stage at toy size on the CPU, and one that hangs")
    parser.add_argument("--run", choices=names, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    if args.run:
        return run_stage(args.run, args)
    wanted = args.stages.split(",") if args.stages else [s.name for s in STAGES if s.default]
    if args.dry_run and not args.stages:
        wanted.append("hang")
    if unknown := set(wanted) - set(names):
        parser.error(f"--stages: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    args.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs what kills the stages
    deadline, good = time.perf_counter() + args.seconds * (10 if args.dry_run else 1), True
    picked = [stage for stage in STAGES if stage.name in wanted]
    for _, group in groupby(picked, key=lambda stage: stage.group or stage.name):
        good &= run_group(list(group), args, deadline)
        from first_light_page import markdown

        page = markdown(Results(args.output).read())
        (args.output / "results.md").write_text(page)
    print(page)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
