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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fused_resnet as fr
from fused_resnet import measure, models
from fused_resnet.cli import data, validate
from fused_resnet.cli.console import console, pick_device, table, write_json
from fused_resnet.cli.env import describe, device_name
from fused_resnet.cli.options import UsageError
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
COLUMNS = (
    "model", "dtype", "variant", "processes", "images/s (p20–p80)", "ms/step", "efficiency", "× plain", "note",
)  # fmt: skip
VALIDATED_IMAGES = 2  # per process
# The other processes wait this long for the one that computes in float64.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class Settings:
    """The settings that all cases share. ``batch_size`` is that of one process."""

    device: torch.device
    batch_size: int
    size: int
    seed: int
    repeats: tuple[int, int]
    case_budget_s: float


@dataclass
class Row:
    """One variant on one number of processes. ``times_s``: the slowest process's step time, one value per round."""

    variant: str
    processes: int
    status: str = "measured"
    note: str = ""
    times_s: list[float] = field(default_factory=list)


@dataclass
class Case:
    """A model x dtype: the worst finding of its validation (on the first process only), and its rows."""

    model: str
    dtype: str
    batch_size: int
    worst: Finding | None
    rows: list[Row] = field(default_factory=list)

    def _times(self, variant: str, processes: int) -> list[float]:
        return next((r.times_s for r in self.rows if (r.variant, r.processes) == (variant, processes)), [])

    def numbers(self, row: Row) -> dict[str, Any]:
        """The row as JSON, with the figures derived from its times."""
        found: dict[str, Any] = asdict(row)
        if row.status != "measured":
            return found
        found["images_per_s"] = measure.quantiles([row.processes * self.batch_size / t for t in row.times_s])
        found["ms_per_step"] = measure.quantiles([1e3 * t for t in row.times_s])
        # each process has as much work as a single one has: with linear scaling a step takes no longer
        alone = measure.quantiles(self._times(row.variant, 1))["median"]
        found["efficiency"] = alone / measure.quantiles(row.times_s)["median"]
        found["speedup"] = measure.quantiles(measure.ratios(self._times("plain", row.processes), row.times_s))
        return found

    def to_json(self) -> dict[str, Any]:
        """All fields and rows."""
        head = {"model": self.model, "dtype": self.dtype, "batch_size_per_process": self.batch_size}
        worst = self.worst.to_json() if self.worst is not None else None
        return head | {"worst": worst, "variants": [self.numbers(row) for row in self.rows]}


# ---------------------------------------------------------------------------------------------------- processes
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


@contextmanager
def _processes(device: str) -> Iterator[tuple[Processes, torch.device]]:
    """Joins torchrun's processes: by NCCL between GPUs, one per process, otherwise by gloo.

    Raises:
        UsageError: torchrun did not start this process, or this machine has fewer GPUs than processes.
    """
    example = "torchrun --nproc-per-node 2 -m fused_resnet bench --distributed"
    if not dist.is_available():
        raise UsageError("--distributed: this torch was built without torch.distributed")
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise UsageError(f"--distributed: expected to be started by torchrun, got no {', '.join(missing)}: {example}")
    picked = pick_device(device)
    if picked.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UsageError(f"--distributed: expected a GPU per process, got {torch.cuda.device_count()} GPUs")
        picked = torch.device("cuda", local)
        torch.cuda.set_device(picked)
    dist.init_process_group("nccl" if picked.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(), picked
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- models
def _network(name: str, settings: Settings, few: Tensor) -> nn.Module:
    """A model with weights that expose mistakes, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model: nn.Module = getattr(models, name)(fused=False)
    model = validate.in_layout(model.to(settings.device), torch.channels_last)
    validate.randomise(model, few, torch.Generator().manual_seed(settings.seed), validate.BRANCH)
    return model


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
    found = validate.run(wrapped, wrapped, few[mine], dout[mine], train=True, dtype=dtype, input_gradient=False)
    # the processes' gradients add up to the joint batch's, and DDP has averaged them
    got = {k.replace("module.", ""): v * n if k.startswith("d ") else v for k, v in found.items()}
    if all_.rank:
        return None
    plain = copy.deepcopy(model)
    plain_found = validate.run(plain, plain, few, dout, train=True, dtype=dtype, input_gradient=False)
    truth = validate.in_layout(copy.deepcopy(model).double(), torch.contiguous_format)
    ref = validate.run(truth, truth, few.double().contiguous(), dout, train=True, input_gradient=False)
    ref["out"], plain_found["out"] = ref["out"][mine], plain_found["out"][mine]
    relus = min(values for values, _ in validate.relu_inputs(model, few))
    return validate.worst(validate.compare(got, plain_found, ref, dtype, relus=relus))


# ---------------------------------------------------------------------------------------------------- measuring
def _rounds(
    steps: Mapping[str, Callable[[], object]], settings: Settings, all_: Processes, n: int
) -> dict[str, list[float]]:
    """As ``measure.interleaved``, but n processes take every step and every decision together."""
    names = list(steps)
    found: dict[str, list[float]] = {name: [] for name in names}
    for step in steps.values():  # in the first step DDP orders its buckets and kernels are chosen
        step()
        step()
    start = time.perf_counter()
    for done in range(settings.repeats[1]):
        spent = all_.largest(time.perf_counter() - start, n)
        if done >= settings.repeats[0] and spent > settings.case_budget_s:
            break
        for i in range(len(names)):
            name = names[(done + i) % len(names)]
            all_.largest(0, n)  # all processes start together
            found[name].append(all_.largest(measure.seconds(steps[name], settings.device), n))
    return found


def _case(
    name: str, dtype: str, settings: Settings, all_: Processes, batch: tuple[Tensor, Tensor], few: Tensor
) -> Case:
    """Validates and measures one model in one dtype, on every number of processes."""
    model = _network(name, settings, few)
    low = validate.DTYPES[dtype]
    case = Case(name, dtype, settings.batch_size, _validate(model, few, low, all_))
    x, labels = batch
    for n in all_.counts:
        steps, rows = {}, {}
        for variant, (fused, sync) in VARIANTS.items():
            rows[variant] = row = Row(variant, n)
            if sync and not fused and settings.device.type == "cpu":
                row.status, row.note = "skipped", "torch's SyncBatchNorm takes no CPU tensors"
            elif all_.rank < n:
                wrapped = _wrapped(model, fused, sync, all_.groups[n], settings.device).train()
                steps[variant] = partial(Variant(variant, wrapped, wrapped, x, low).train, labels)
        if all_.rank < n:
            for variant, times in _rounds(steps, settings, all_, n).items():
                rows[variant].times_s = times
        case.rows += rows.values()
        all_.largest(0, all_.world)
    return case


def run(args: argparse.Namespace, names: Sequence[str], repeats: tuple[int, int], case_budget_s: float) -> int:
    """Runs in each of torchrun's processes. The first one prints and writes ``--json``.

    Args:
        args: the command's arguments. names: the models' names. repeats, case_budget_s: see ``measure.interleaved``;
            they hold for each number of processes.

    Returns:
        0 if every validation holds, the same in all processes.
    """
    start = time.perf_counter()
    with _processes(args.device) as (all_, device):
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        batch_size = args.batch_size or (8 if device.type == "cpu" else 256)
        settings = Settings(device, batch_size, args.size, args.seed, repeats, case_budget_s)
        x, labels = data.photographs(batch_size, settings.size, settings.seed + all_.rank)
        few, _ = data.photographs(VALIDATED_IMAGES * all_.world, settings.size, settings.seed)
        batch = x.to(device), labels.to(device)
        cases = [_case(name, dtype, settings, all_, batch, few.to(device)) for name in names for dtype in DTYPES]
        failed = all_.largest(any(c.worst is not None and not c.worst.ok for c in cases), all_.world)
        config = asdict(settings) | {"models": list(names), "device": str(device), "processes": all_.world}
        if not all_.rank:
            found = {
                "ok": not failed,
                "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
                "device": device_name(device),
                **describe(),
                "config": config | {"transport": dist.get_backend()},
                "cases": [c.to_json() for c in cases],
                "elapsed_s": round(time.perf_counter() - start, 1),
            }
            if args.json:
                write_json(args.json, found)
            _print(found, cases)
    return 1 if failed else 0


def _print(found: dict[str, Any], cases: Sequence[Case]) -> None:
    config, out = found["config"], console()
    where = f"{found['device']} per process, {config['processes']} processes over {config['transport']}"
    title = f"{where}, batch {config['batch_size']} each, torch {found['versions']['torch']}"
    out.print(table(title, COLUMNS, list(_lines(found)), left=3))
    for case in cases:
        mark = "[green]+[/]" if case.worst is not None and case.worst.ok else "[red]-[/]"
        out.print(f"{mark} {case.model} in {case.dtype}, SyncBN on all processes: {case.worst}")
    out.print(f"{found['elapsed_s']:.0f} s")


def _lines(found: dict[str, Any]) -> Iterator[list[str]]:
    for case in found["cases"]:
        for row in sorted(case["variants"], key=lambda r: list(VARIANTS).index(r["variant"])):
            head = [case["model"], case["dtype"], row["variant"], str(row["processes"])]
            if row["status"] != "measured":
                yield [*head, row["status"], "–", "–", "–", row["note"]]
                continue
            rate, ms = row["images_per_s"], row["ms_per_step"]["median"]
            yield [
                *head,
                f"{rate['median']:.1f} ({rate['p20']:.1f}–{rate['p80']:.1f})",
                f"{ms:.0f}" if ms >= 10 else f"{ms:.2f}",
                f"{row['efficiency']:.0%}",
                f"{row['speedup']['median']:.2f}",
                row["note"],
            ]
