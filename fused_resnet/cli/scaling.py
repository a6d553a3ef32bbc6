"""``fused-resnet bench --distributed``, under torchrun: how networks in DistributedDataParallel scale.

It measures images per second and the share of linear scaling that is left: plain and fused, with and without
SyncBatchNorm, on 1, 2, 4 ... of the processes. Each process trains on ``--batch-size`` images of its own, however many
processes there are. Before the timing, the fused network with SyncBatchNorm is validated on all processes: output,
gradients and running statistics are compared with one process's float64 run of the joint batch, by the rule of
validate.py. A step's time is that of the slowest process.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fused_resnet as fr
from fused_resnet import measure
from fused_resnet.cli import data, validate
from fused_resnet.cli.cases import Settings, network
from fused_resnet.cli.console import console, pick_device, process_group, table, write_json
from fused_resnet.cli.env import head
from fused_resnet.cli.options import UsageError
from fused_resnet.cli.report import rate_cells
from fused_resnet.cli.validate import Finding
from fused_resnet.cli.variants import Variant

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# name -> (fused, with SyncBatchNorm); the others are compared with the first.
VARIANTS = {
    "plain": (False, False),
    "fused": (True, False),
    "plain, SyncBN": (False, True),
    "fused, SyncBN": (True, True),
}
DTYPES = ("fp32", "bf16")
COLUMNS = ("model", "dtype", "variant", "processes", "images/s (p20–p80)", "ms/step", "× plain", "efficiency", "note")
VALIDATED_IMAGES = 2  # per process
# The other processes wait this long for the one that computes in float64.
PATIENCE = timedelta(hours=1)


class Processes:
    """torchrun's processes by rank, and groups of the first n of them: one for gradients and statistics, and one on the
    CPU for the benchmark's own messages."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.counts = sorted({2**i for i in range(self.world.bit_length()) if 2**i <= self.world} | {self.world})
        self.groups: dict[int, ProcessGroup] = {}
        self.control: dict[int, ProcessGroup] = {}
        for n in self.counts:
            self.groups[n] = dist.new_group(list(range(n)))
            self.control[n] = dist.new_group(list(range(n)), backend="gloo", timeout=PATIENCE)

    def largest(self, value: float, n: int) -> float:
        """The largest of the first n processes' values. Waits for all n."""
        t = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(t, dist.ReduceOp.MAX, self.control[n])
        return t.item()


def _wrapped(model: nn.Module, fused: bool, sync: bool, group: ProcessGroup, device: torch.device) -> nn.Module:
    """A copy under DDP. SyncBatchNorm comes last, because on a CPU DDP refuses a module that has one."""
    model = copy.deepcopy(model)
    if fused:
        fr.fuse(model)
    devices = [device.index] if device.type == "cuda" else None
    wrapped: nn.Module = DistributedDataParallel(model, device_ids=devices, process_group=group)
    return nn.SyncBatchNorm.convert_sync_batchnorm(wrapped, group) if sync else wrapped


def _validate(model: nn.Module, few: Tensor, dtype: torch.dtype, all_: Processes) -> Finding | None:
    """Compares the fused network with SyncBatchNorm on all processes with float64 on the joint batch.

    Returns the finding that uses most of its bound on the first process, None on the others.
    """
    device, n = few.device, all_.world
    with torch.no_grad():
        shape = copy.deepcopy(model).eval()(few[:1]).shape
    dout = validate.exact((len(few), *shape[1:]), torch.Generator().manual_seed(0)).to(device)
    mine = slice(all_.rank * VALIDATED_IMAGES, (all_.rank + 1) * VALIDATED_IMAGES)
    wrapped = _wrapped(model, True, True, all_.groups[n], device)
    found = validate.run(wrapped, few[mine], dout[mine], train=True, dtype=dtype, input_gradient=False)
    # the processes' gradients add up to the joint batch's, and DDP has averaged them
    got = {k.replace("module.", ""): v * n if k.startswith("d ") else v for k, v in found.items()}
    if all_.rank:
        return None
    plain = validate.run(copy.deepcopy(model), few, dout, train=True, dtype=dtype, input_gradient=False)
    truth = validate.in_layout(copy.deepcopy(model).double(), torch.contiguous_format)
    ref = validate.run(truth, few.double().contiguous(), dout, train=True, input_gradient=False)
    ref["out"], plain["out"] = ref["out"][mine], plain["out"][mine]
    relus = min(values for values, _ in validate.relu_inputs(model, few))
    return validate.worst(validate.compare(got, plain, ref, dtype, relus=relus))


def _rows(model: nn.Module, low: torch.dtype, settings: Settings, all_: Processes, batch: tuple[Tensor, Tensor],
          n: int) -> list[dict[str, Any]]:  # fmt: skip
    """Measures every variant of a model on the first n processes. The others get rows without times."""
    x, labels = batch
    rows = {name: {"variant": name, "processes": n, "status": "measured", "note": ""} for name in VARIANTS}
    steps = {}
    for name, (fused, sync) in VARIANTS.items():
        if sync and not fused and settings.device.type == "cpu":
            rows[name] |= {"status": "skipped", "note": "torch's SyncBatchNorm takes no CPU tensors"}
        elif all_.rank < n:
            wrapped = _wrapped(model, fused, sync, all_.groups[n], settings.device).train()
            steps[name] = partial(Variant(name, wrapped, wrapped, x, low).train, labels)
    for step in steps.values():  # in the first step DDP orders its buckets and kernels are chosen
        step()
    times = measure.interleaved(
        steps,
        settings.device,
        repeats=settings.repeats,
        budget_s=settings.case_budget_s,
        sample_s=0,
        agreed=lambda value: all_.largest(value, n),
    ) if steps else {}  # fmt: skip
    for name in VARIANTS:
        rows[name]["times_s"] = times.get(name, [])
    return list(rows.values())


def _case(
    name: str, dtype: str, settings: Settings, all_: Processes, batch: tuple[Tensor, Tensor], few: Tensor
) -> tuple[Finding | None, dict[str, Any]]:
    """Validates and measures one model in one dtype, on every number of processes: the worst finding, and the JSON."""
    model = network(name, settings, few, torch.Generator().manual_seed(settings.seed))
    low = validate.DTYPES[dtype]
    worst = _validate(model, few, low, all_)
    rows = []
    for n in all_.counts:
        rows += _rows(model, low, settings, all_, batch, n)
        all_.largest(0, all_.world)
    times = {(row["variant"], row["processes"]): row["times_s"] for row in rows}
    for row in rows:
        if (own := row["times_s"]) and not all_.rank:  # the others took no part in the smaller groups
            row |= measure.figures(own, row["processes"] * settings.batch_size, times["plain", row["processes"]])
            # each process has as much work as a single one has: with linear scaling a step takes no longer
            alone = measure.quantiles(times[row["variant"], 1])["median"]
            row["efficiency"] = alone / measure.quantiles(own)["median"]
    case = {"model": name, "dtype": dtype, "batch_size_per_process": settings.batch_size}
    return worst, case | {"worst": worst.to_json() if worst is not None else None, "variants": rows}


def run(args: argparse.Namespace, names: Sequence[str], repeats: tuple[int, int], case_budget_s: float) -> int:
    """Runs in each of torchrun's processes. The first one prints and writes ``--json``.

    ``repeats`` and ``case_budget_s`` (see ``measure.interleaved``) hold for each number of processes. Returns 0 if
    every validation holds, the same in all processes.
    """
    start = time.perf_counter()
    if not dist.is_available():
        raise UsageError("--distributed: this torch was built without torch.distributed")
    if missing := [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]:
        example = "torchrun --nproc-per-node 2 -m fused_resnet bench --distributed"
        raise UsageError(f"--distributed: expected to be started by torchrun, got no {', '.join(missing)}: {example}")
    with process_group(pick_device(args.device), PATIENCE) as device:
        all_ = Processes()
        settings = Settings.of(args, device, repeats, case_budget_s)
        x, labels = data.photographs(settings.batch_size, settings.size, settings.seed + all_.rank)
        few, _ = data.photographs(VALIDATED_IMAGES * all_.world, settings.size, settings.seed)
        batch = x.to(device), labels.to(device)
        found = [_case(name, dtype, settings, all_, batch, few.to(device)) for name in names for dtype in DTYPES]
        failed = all_.largest(any(worst is not None and not worst.ok for worst, _ in found), all_.world)
        if not all_.rank:
            config = asdict(settings) | {"models": list(names), "device": str(device), "processes": all_.world}
            report = {
                "ok": not failed,
                **head(device),
                "config": config | {"transport": dist.get_backend()},
                "cases": [case for _, case in found],
                "elapsed_s": round(time.perf_counter() - start, 1),
            }
            if args.json:
                write_json(args.json, report)
            _print(report, [worst for worst, _ in found])
    return 1 if failed else 0


def _print(report: dict[str, Any], worst: Sequence[Finding | None]) -> None:
    config, out = report["config"], console()
    where = f"{report['device']} per process, {config['processes']} processes over {config['transport']}"
    title = f"{where}, batch {config['batch_size']} each, torch {report['versions']['torch']}"
    out.print(table(title, COLUMNS, list(_lines(report)), left=3))
    for case, finding in zip(report["cases"], worst, strict=True):
        mark = "[green]+[/]" if finding is not None and finding.ok else "[red]-[/]"
        out.print(f"{mark} {case['model']} in {case['dtype']}, SyncBN on all processes: {finding}")
    out.print(f"{report['elapsed_s']:.0f} s")


def _lines(report: dict[str, Any]) -> Iterator[list[str]]:
    for case in report["cases"]:
        for row in sorted(case["variants"], key=lambda r: list(VARIANTS).index(r["variant"])):
            efficiency = f"{row['efficiency']:.0%}" if "efficiency" in row else "–"
            name = [case["model"], case["dtype"], row["variant"], str(row["processes"])]
            yield [*name, *rate_cells(row), efficiency, row["note"]]
