"""Everything that is to be known of a GPU, in one run: tests, sanitizer, limits, passes, kernels, networks.

    python benchmarks/gpu_report.py --output gpu-report            on a GPU; `make gpu-report` sets up what it needs
    python benchmarks/gpu_report.py --dry-run                      every step, at toy size, on a CPU
    python benchmarks/gpu_report.py --steps limits,kernels         some of them

Writes report.json, report.md and PNGs. A step that fails is written down as such, the others go on; the exit code is 1
if one failed. report.json is what benchmarks/results/ keeps: machine, versions and date are in it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_report_page import markdown, plot
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import fused_resnet as fr
from fused_resnet import measure, planner
from fused_resnet.backends import (
    BnAct,
    BnActBackward,
    BnActMaxPool,
    BnActMaxPoolBackward,
    BnBackward,
    BnStats,
    Call,
    ConvBackward,
    ConvBiasAct,
    ConvStats,
    DyCoefficients,
    Norm,
    load,
    loaded,
)
from fused_resnet.cli import cases, variants
from fused_resnet.cli.env import describe, device_name
from fused_resnet.cli.variants import CompileBudget, Variant
from fused_resnet.spec import Act, PoolSpec

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """One report in the making.

    Attributes:
        found: what report.json becomes. sizes: of networks and batches, a GPU's or a toy's.
    """

    device: torch.device
    output: Path
    models: list[str]
    batch: int
    size: int
    minutes: float
    autotune: bool = False
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def toy(self) -> bool:
        return self.device.type != "cuda"


# ---------------------------------------------------------------------------------------------------- steps
def limits(run: Run) -> dict[str, Any]:
    """What this device reaches: bytes per second of a copy, operations per second of a bf16 matrix product."""
    n, side = (1 << 22, 512) if run.toy else (1 << 29, 8192)
    source = torch.empty(n, dtype=torch.bfloat16, device=run.device).normal_()
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=run.device, dtype=torch.bfloat16)
    copy_ms = planner.milliseconds(lambda: target.copy_(source), run.device)
    product_ms = planner.milliseconds(lambda: a @ a, run.device)
    return {"bytes_per_s": 4 * n / copy_ms * 1e3, "flops_per_s": 2 * side**3 / product_ms * 1e3}


def tests(run: Run) -> dict[str, Any]:
    """The tests that need a GPU, and those of the CUDA kernels, which run on one where there is one."""
    names = ("project/test_gpu", "backends/test_cuda_kernels", "backends/test_cuda_conv")
    files = [f"tests/{name}.py" for name in (names[:1] if run.toy else names)]
    return _command(run, [sys.executable, "-m", "pytest", *files, "-q", "--no-header", "-rf"], timeout_s=500)


def sanitizer(run: Run) -> dict[str, Any]:
    """compute-sanitizer: memcheck over chains of the Triton kernels and over CUTLASS's convolutions; memcheck,
    racecheck and initcheck over every CUDA kernel that memory bounds."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {"ok": True, "skipped": "compute-sanitizer is not installed here"}
    picked = "(test_small_chains and triton and (basic or bottleneck_projection or stem) and batch) or odd_channels"
    chains = [sys.executable, "-m", "pytest", "tests/project/test_gpu.py", "-q", "--no-header", "-k", picked]
    jobs = {"triton memcheck": ("memcheck", [], chains)}
    if load("cuda")[0] is not None:
        # ours alone: what PyTorch's kernels read and write is its own affair
        ours, cases = (
            ["--kernel-name", "kernel_substring=fused_resnet"],
            [sys.executable, "tests/support/cuda_cases.py", "cuda"],
        )
        jobs |= {f"cuda {name}": (name, ours, cases) for name in ("memcheck", "racecheck", "initcheck")}
        picked = "test_activations or test_backward or test_misaligned"
        tiles = [sys.executable, "-m", "pytest", "tests/backends/test_cuda_conv.py", "-q", "--no-header", "-k", picked]
        jobs["cutlass memcheck"] = ("memcheck", ["--kernel-name", "kernel_substring=ConvUniversal"], tiles)
    found = {}
    for name, (which, options, command) in jobs.items():
        check = [tool, "--tool", which, "--error-exitcode", "9", "--launch-timeout", "0", *options]
        found[name] = _command(run, [*check, *command], timeout_s=300)
    output = "\n".join(f"{name}:\n{result['output'][-3000:]}" for name, result in found.items() if not result["ok"])
    return {"ok": all(result["ok"] for result in found.values()), "runs": found, "output": output}


def _command(run: Run, command: list[str], timeout_s: float) -> dict[str, Any]:
    start = time.perf_counter()
    # each tensor an allocation of its own, so that a sanitizer sees where it ends
    env = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "compute-sanitizer" in command[0] else {})
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, env=env)
        code, out = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        code, out = -1, f"{(late.stdout or b'').decode(errors='replace')}\nstopped after {timeout_s:.0f} s"
    return {"ok": code == 0, "seconds": round(time.perf_counter() - start, 1), "output": out[-6000:]}


def passes(run: Run) -> dict[str, Any]:
    """Each memory-bound primitive on each backend: bytes per second, and as a share of a copy's."""
    bound = run.found.get("limits") or limits(run)
    shapes = [(2, 64, 16, 16)] if run.toy else [(run.batch, c, s, s) for c, s in ((64, 112), (256, 56), (2048, 7))]
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for call in pass_calls(shape, run.device):
            _, moved = account(call)
            for name in planner.measuring.candidates_for(call):
                ms = planner.milliseconds(partial(call.on, loaded(name)), run.device)
                row = {"primitive": call.name, "operands": len(images_of(call)), "shape": shape, "backend": name}
                row |= {"ms": ms, "bytes": moved}
                if moved is not None:
                    row["of_copy"] = moved / ms * 1e3 / bound["bytes_per_s"]
                rows.append(row)
    return {"ok": bool(rows), "rows": rows}


def images_of(call: Call[Any]) -> list[Tensor]:
    """The images among the arguments."""
    return [t for t in call.arguments if isinstance(t, Tensor) and t.dim() == 4]


def pass_calls(shape: tuple[int, ...], device: torch.device) -> list[Call[Any]]:
    """Every memory-bound primitive, in bfloat16, with and without a summand; the pool where it stands in a network."""

    def image(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    y, r, g = (image(*shape) for _ in range(3))
    norm, other = (Norm(*(torch.rand(shape[1], device=device) + 0.5 for _ in range(4))) for _ in range(2))
    relu = Act("relu")
    calls: list[Call[Any]] = [
        BnStats(y),
        BnAct(y, norm, relu),
        BnAct(y, norm, relu, r),
        BnAct(y, norm, relu, r, other),
        BnActBackward(g, y, norm, relu),
        BnActBackward(g, y, norm, relu, r),
        BnActBackward(g, y, norm, relu, r, other),
        BnBackward(g, y, DyCoefficients(*other)),
    ]
    if shape[1] == 64:
        pooled = BnActMaxPool(y, norm, relu, PoolSpec.make(3, 2, 1))
        calls += [pooled, BnActMaxPoolBackward(*pooled.on(loaded("aten")), y, norm, relu, pooled.pool)]
    return calls


def kernels(run: Run) -> dict[str, Any]:
    """Every signature of a training step and of inference: all candidates' times beside the roofline's."""
    bound = run.found.get("limits") or limits(run)
    rows: list[dict[str, Any]] = []

    def note(call: Call[Any], entry: dict[str, Any]) -> None:
        flops, moved = account(call)
        row = {"primitive": call.name, "signature": call.signature, **entry}
        row |= {"flops": flops, "bytes": moved}
        if moved is not None:
            row["roofline_ms"] = 1e3 * max(moved / bound["bytes_per_s"], flops / bound["flops_per_s"])
        rows.append(row)

    with measuring(run, note):
        for name in run.models:
            model, x = network(run, name)
            model.train()
            with torch.autocast(run.device.type, torch.bfloat16):
                loss = model(x).float().sum()
            loss.backward()
            infer = fr.freeze(model, x, dtype=torch.bfloat16)
            infer(x.bfloat16())
    return {"ok": bool(rows), "rows": rows}


@contextmanager
def measuring(run: Run, note: Callable[..., None]) -> Any:
    """A plan measured from nothing, and ``note`` called for every signature of it."""
    folder = run.output / "plan"
    shutil.rmtree(folder, ignore_errors=True)
    before = {name: os.environ.get(name) for name in ("FUSED_RESNET_PLAN", "FUSED_RESNET_CACHE")}
    os.environ |= {"FUSED_RESNET_PLAN": "measure", "FUSED_RESNET_CACHE": str(folder)}
    planner.forget()
    planner.listeners.append(note)
    try:
        yield
    finally:
        planner.listeners.remove(note)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        planner.forget()


def account(call: Call[Any]) -> tuple[float, int | None]:
    """Operations of the convolutions (additions and multiplications), and the bytes that our fused kernels move."""
    flops = 0.0
    if isinstance(call, ConvBiasAct | ConvStats | ConvBackward):
        h, w = call.conv.out_size(call.x.shape[2:], call.weight.shape[2:])
        products = call.need_input + call.need_weight if isinstance(call, ConvBackward) else 1
        flops = 2.0 * call.x.shape[0] * h * w * call.weight.numel() * products
    triton, _ = load("triton", to_run=False)
    if triton is None:
        return flops, None
    from fused_resnet.backends.triton.runtime import traffic

    def meta(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    with traffic() as record:
        type(call)(*tree_map_only(Tensor, meta, call.arguments)).on(triton)
    return flops, record.total


def network(run: Run, name: str) -> tuple[nn.Module, Tensor]:
    """A fused network and a batch for it, channels_last, on the device."""
    torch.manual_seed(0)
    model = fr.fuse(getattr(fr.models, name)()).to(run.device, memory_format=torch.channels_last)
    x = torch.randn(run.batch, 3, run.size, run.size, device=run.device).to(memory_format=torch.channels_last)
    return model, x


def networks(run: Run) -> dict[str, Any]:
    """Images per second of networks: plain, compiled, fused, fused in a CUDA graph; validated as ``bench`` does."""
    settings = cases.Settings(run.device, run.batch, run.size, 0, (3, 30), 3.0)
    budget = CompileBudget(60.0 * run.minutes)
    rows, ok = [], True
    for name in run.models:
        subject = cases.Subject(name, settings)
        for mode in ("training", "inference"):
            row = cases.run_case(subject, mode, "bf16", budget)
            ok &= row["ok"]
            if not run.toy:
                row["cuda_graph_images_per_s"] = _graphed(run, subject, mode)
            if run.autotune:
                row["max_autotune_images_per_s"] = _autotuned(run, subject, mode)
            rows.append(row)
    return {"ok": ok, "cases": rows}


def _autotuned(run: Run, subject: cases.Subject, mode: str) -> float:
    """Images per second of torch.compile's best, which takes minutes to find."""
    torch.compiler.reset()
    model = copy.deepcopy(subject.model).train(mode == "training")
    x, autocast = subject.x, torch.bfloat16 if mode == "training" else None
    if mode == "inference":
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    variant = Variant("compile", model, torch.compile(model, mode="max-autotune"), x, autocast)
    return _rate(run, partial(variant.train, subject.labels) if mode == "training" else variant.infer)


def _rate(run: Run, step: Callable[[], Any]) -> float:
    """Images per second: the median of five spells."""
    for _ in range(3):
        step()
    return run.batch / sorted(measure.seconds(step, run.device, 10) for _ in range(5))[2]


def _graphed(run: Run, subject: cases.Subject, mode: str) -> float:
    """Images per second of our network, a whole step captured as one CUDA graph."""
    train = mode == "training"
    variant = variants.fused(copy.deepcopy(subject.model), subject.x, train, torch.bfloat16)
    if train:
        variant.optimizer = torch.optim.SGD(variant.model.parameters(), lr=1e-3, momentum=0.9)
    step: Callable[[], Any] = partial(_step, variant, subject.labels) if train else variant.infer
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return _rate(run, graph.replay)


def _step(variant: Variant, labels: Tensor) -> None:
    """A training step whose gradients stay where they are, as a graph needs it."""
    assert variant.optimizer is not None
    variant.optimizer.zero_grad(set_to_none=False)
    variant.loss(labels).backward()
    variant.optimizer.step()


STEPS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "limits": limits,
    "tests": tests,
    "sanitizer": sanitizer,
    "passes": passes,
    "kernels": kernels,
    "networks": networks,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-report"))
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {', '.join(STEPS)}")
    parser.add_argument("--models", default="resnet50,resnet18")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--compile-minutes", type=float, default=3.0, help="for torch.compile, in all")
    parser.add_argument("--max-autotune", action="store_true", help="torch.compile(mode='max-autotune') too: minutes")
    parser.add_argument("--dry-run", action="store_true", help="every step at toy size on the CPU")
    args = parser.parse_args(argv)
    unknown = set(args.steps.split(",")) - set(STEPS)
    if unknown:
        parser.error(f"--steps: expected some of {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False (--dry-run walks through every step on the CPU)")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.dry_run:
        run = Run(torch.device("cpu"), args.output, ["resnet20"], 2, 32, 0.0)
    else:
        torch.backends.cudnn.benchmark = True  # plain PyTorch at its fastest: the shapes never change
        names = args.models.split(",")
        run = Run(
            torch.device("cuda"), args.output, names, args.batch_size, 224, args.compile_minutes, args.max_autotune
        )
    found = run.found
    found |= {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "device": device_name(run.device), **describe()}
    found["config"] = {"models": run.models, "batch": run.batch, "size": run.size, "dry_run": args.dry_run}
    ok = True
    for name in STEPS:
        if name not in args.steps.split(","):
            continue
        start = time.perf_counter()
        print(f"{name} ...", flush=True)
        try:
            found[name] = STEPS[name](run)
        except Exception as error:  # the other steps are worth having all the same
            found[name] = {"ok": False, "error": f"{type(error).__name__}: {error}", "output": traceback.format_exc()}
        ok &= found[name].get("ok", True)
        seconds = time.perf_counter() - start
        print(f"{name}: {'ok' if found[name].get('ok', True) else 'FAILED'}, {seconds:.0f} s", flush=True)
        found[name].setdefault("seconds", round(seconds, 1))
        (args.output / "report.json").write_text(json.dumps(found, indent=1, default=str))
        (args.output / "report.md").write_text(markdown(found, STEPS))
    plot(found, args.output)
    print(markdown(found, STEPS))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
