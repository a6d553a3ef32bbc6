"""``fused-resnet check``: fused and frozen models beside plain PyTorch, block by block and as whole networks."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import models
from fused_resnet.cli import validate
from fused_resnet.cli.console import console, pick_device, pick_models, progress, table, write_json
from fused_resnet.cli.env import describe, device_name
from fused_resnet.cli.options import DTYPES, UsageError
from fused_resnet.cli.subjects import Subject, subjects
from fused_resnet.cli.validate import Finding, Tensors


@dataclass(frozen=True)
class Result:
    """What was found of one subject in one dtype; ``problem`` says why nothing could be compared, or is empty."""

    subject: Subject
    dtype: str
    findings: list[Finding]
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Everything was compared, and every tensor is within its bound."""
        return not self.problem and all(f.ok for f in self.findings)

    def cell(self) -> str:
        """For the table: the share of the bound that the worst tensor uses, and its name when it is too much."""
        if self.problem:
            return f"[red]{self.problem}[/]"
        found = validate.worst(self.findings)
        return f"{found.used:.2f}" if self.ok else f"[red]{found}[/]"

    def to_json(self) -> dict[str, Any]:
        """The worst finding, and every one that fails."""
        found = {"subject": self.subject.label, "model": self.subject.model, "dtype": self.dtype, "ok": self.ok}
        if self.problem:
            return found | {"problem": self.problem}
        failed = [f.to_json() for f in self.findings if not f.ok]
        return found | {"compared": len(self.findings), "worst": validate.worst(self.findings).to_json(), "failed": failed}


def _all_runs(model: nn.Module, x: Tensor, dout: Tensor, dtype: torch.dtype | None) -> Tensors:
    """A training step, a step with frozen statistics, and inference; the mode before each tensor's name."""
    state = copy.deepcopy(model.state_dict())
    found: Tensors = {}
    for mode in ("train", "eval", "inference"):
        model.load_state_dict(state)
        seed = None if mode == "inference" else dout
        tensors = validate.run(model, model, x, seed, train=mode == "train", dtype=dtype)
        found |= {f"{mode}: {name}": t for name, t in tensors.items()}
    return found


def _not_fused(model: nn.Module) -> str:
    """Which blocks of a fused model run plain and why; a comparison of plain with plain would say nothing."""
    rows = fr.explain(model).rows
    plain = [f"{row.name}: {row.reason}" for row in rows if not row.fused]
    return f"not fused: {'; '.join(plain)}" if plain else "" if rows else "nothing was fused"


def check(subject: Subject, dtypes: Sequence[str], device: torch.device, seed: int) -> list[Result]:
    """Compares ``subject``, fused (and frozen, if a network), with plain PyTorch.

    Every run starts from the same weights, running statistics, input and output gradient, whatever the dtype.

    Returns:
        One result per dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        truth = subject.build().double()
    validate.randomise(truth, validate.exact(subject.shape, generator, 0.5, 2.0), generator)
    for t in [*truth.parameters(), *truth.buffers()]:
        t.data = t.data.float().to(t.dtype)  # values that float32 holds, too
    truth.to(device)
    given: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensors]] = {}  # shape -> input, gradient of the output, truth

    def at(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensors]:
        if shape not in given:
            x = validate.draw(truth, shape, generator, device, tries=1 if subject.whole else 16)
            with torch.no_grad():
                dout = validate.exact(copy.deepcopy(truth)(x).shape, generator).to(device)
            given[shape] = x, dout, _all_runs(copy.deepcopy(truth), x, dout, None)
        return given[shape]

    results = []
    for name in dtypes:
        dtype = validate.DTYPES[name]
        exactly = dtype == torch.float64
        x64, dout, ref = at(subject.shape16 if dtype.itemsize == 2 else subject.shape)
        wide = torch.float64 if exactly else torch.float32  # of parameters, and of a network's images
        layout = torch.contiguous_format if exactly else torch.channels_last
        plain = copy.deepcopy(truth).to(wide).to(memory_format=layout)
        fused = fr.fuse(copy.deepcopy(plain))
        if problem := _not_fused(fused):
            results.append(Result(subject, name, [], problem))
            continue
        x = x64.to(wide if subject.whole else dtype, memory_format=layout)
        length = None if subject.whole else validate.reduction_length(truth, x)
        expected = ref if exactly else _all_runs(copy.deepcopy(plain), x, dout, dtype)
        findings = validate.compare(_all_runs(fused, x, dout, dtype), expected, ref, dtype, length)
        if subject.whole:
            frozen = fr.freeze(plain, x.to(dtype), dtype=dtype)
            with torch.no_grad():
                out = {"inference: out": frozen(x.to(dtype))}
            of = {"inference: out": ref["inference: out"]}
            findings += [
                Finding(f"frozen {f.name}", f.error, f.plain_error, f.used)
                for f in validate.compare(out, expected, of, dtype, length)
            ]
        results.append(Result(subject, name, findings))
    return results


def run(args: argparse.Namespace) -> int:
    """Checks everything, prints one line per subject; 0 when all of it holds."""
    names = pick_models(args.models, models.list_models())
    device = pick_device(args.device)
    unknown = [d for d in args.dtypes if d not in DTYPES]
    if unknown or not args.dtypes:
        raise UsageError(f"--dtypes: expected some of {', '.join(DTYPES)}, got {', '.join(unknown) or 'nothing'}")
    start = time.perf_counter()
    todo = list(subjects(names))
    results: list[Result] = []
    with progress() as bar:
        task = bar.add_task("check", total=len(todo))
        for subject in todo:
            bar.update(task, description=f"{subject.label:<40.40}")
            results += check(subject, args.dtypes, device, args.seed)
            bar.advance(task)
    elapsed = time.perf_counter() - start
    ok = all(r.ok for r in results)

    rows = [
        (s.label, *(r.cell() for d in args.dtypes for r in results if r.subject is s and r.dtype == d)) for s in todo
    ]
    out = console()
    title = "Share of the error bound that the worst tensor uses (1 is the bound)"
    out.print(table(title, ("", *args.dtypes), rows))
    compared = sum(len(r.findings) for r in results)
    failed = [r for r in results if not r.ok]
    out.print(
        f"{compared} tensors of {sum(not s.whole for s in todo)} blocks and {sum(s.whole for s in todo)} networks "
        f"({len(names)} models) against plain PyTorch, on {device_name(device)}, in {elapsed:.0f} s: "
        + ("[green]all within their bounds[/]" if ok else f"[red]{len(failed)} of {len(results)} checks failed[/]")
    )
    if args.json:
        found = {"ok": ok, "device": str(device), "models": names, "results": [r.to_json() for r in results]}
        write_json(args.json, describe() | found | {"elapsed_s": round(elapsed, 1)})
    return 0 if ok else 1
