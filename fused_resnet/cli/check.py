"""``fused-resnet check``: fused and frozen models beside plain PyTorch, block by block and as whole networks."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import models
from fused_resnet.cli import validate
from fused_resnet.cli.console import console, pick_device, pick_models, progress, table, write_json
from fused_resnet.cli.env import describe, device_name
from fused_resnet.cli.options import DTYPES, UsageError
from fused_resnet.cli.subjects import LIBRARIES, Subject, subjects
from fused_resnet.cli.validate import Finding, Tensors
from fused_resnet.planner.sizes import chains_always


@dataclass(frozen=True)
class Result:
    """The findings for one subject in one dtype. ``problem`` says why nothing could be compared, or is empty."""

    subject: Subject
    dtype: str
    findings: list[Finding]
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything was compared, and every tensor is within its bound."""
        return not self.problem and all(f.ok for f in self.findings)

    def cell(self) -> str:
        """The table's cell: the share of its bound that the worst tensor uses, and its name if that is over 1."""
        if self.problem:
            return f"[red]{self.problem}[/]"
        found = validate.worst(self.findings)
        return f"{found.used:.2f}" if self.ok else f"[red]{found}[/]"

    def to_json(self) -> dict[str, Any]:
        """The worst finding, and every one that fails."""
        found = {"subject": self.subject.label, "model": self.subject.model, "dtype": self.dtype, "ok": self.ok}
        if self.problem:
            return found | {"problem": self.problem}
        failed, worst = [f.to_json() for f in self.findings if not f.ok], validate.worst(self.findings).to_json()
        return found | {"compared": len(self.findings), "worst": worst, "failed": failed}


class _Given(NamedTuple):
    """A plain float64 model, an input, the gradient of the output, the results, and the length of the longest sum."""

    truth: nn.Module
    x: Tensor
    dout: Tensor
    ref: Tensors
    length: int


def _all_runs(model: nn.Module, x: Tensor, dout: Tensor, dtype: torch.dtype | None) -> Tensors:
    """A training step, a step with frozen statistics, and inference; the mode before each tensor's name.

    Each starts from the same running statistics. ``model`` has them again afterwards.
    """
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    found: Tensors = {}
    for mode in ("train", "eval", "inference"):
        seed = None if mode == "inference" else dout
        tensors = validate.run(model, x, seed, train=mode == "train", dtype=dtype)
        found |= {f"{mode}: {name}": t for name, t in tensors.items()}
        for buffer, value in buffers:
            buffer.detach().copy_(value)
    return found


def _smooth(model: nn.Module) -> nn.Module:
    """A copy with SiLU in the place of ReLU."""
    model = copy.deepcopy(model)
    for m in list(model.modules()):
        for name, child in m.named_children():
            if isinstance(child, nn.ReLU):
                setattr(m, name, nn.SiLU())
    return model


def _not_fused(model: nn.Module, ours: bool) -> str:
    """Says which blocks of a fused model run plain, and why: comparing plain with plain would prove nothing.

    In networks of other libraries some blocks may run plain.
    """
    rows = fr.explain(model).rows
    plain = [f"{row.name}: {row.reason}" for row in rows if not row.fused]
    if not ours and len(plain) < len(rows):
        return ""
    return f"not fused: {'; '.join(plain)}" if plain else "" if rows else "nothing was fused"


class _Checker:
    """One subject's weights and, for each input that the dtypes need, the float64 results of plain PyTorch."""

    def __init__(self, subject: Subject, device: torch.device, seed: int) -> None:
        self.subject, self.device = subject, device
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.truth = subject.build().double()
        x = validate.exact(subject.shape, self.generator, 0.5, 2.0)
        validate.randomise(self.truth, x, self.generator, validate.BRANCH if subject.whole else 1.0)
        for t in [*self.truth.parameters(), *self.truth.buffers()]:
            t.data = t.data.float().to(t.dtype)  # values that float32 holds exactly
        self.truth.to(device)
        self.given: dict[tuple[bool, tuple[int, ...]], _Given] = {}

    def at(self, dtype: torch.dtype) -> _Given:
        """The reference run for a dtype.

        Whole networks in less than float64 get a smooth activation. Some of their many values lie at a ReLU's kink,
        where rounding alone decides a whole gradient element, here and in plain PyTorch. Blocks keep ReLU in every
        dtype. In float32 their input stays clear of the kinks. In 16 bits their input is so large that as many values
        fall on the wrong side here as in plain PyTorch.
        """
        shape = self.subject.shape16 if dtype.itemsize == 2 else self.subject.shape
        smooth = self.subject.whole and dtype != torch.float64
        if (smooth, shape) not in self.given:
            truth = _smooth(self.truth) if smooth else self.truth
            tries = 1 if self.subject.whole or dtype.itemsize == 2 else 16
            x = validate.draw(truth, shape, self.generator, self.device, tries)
            with torch.no_grad():
                size = truth.eval()(x).shape
            dout = validate.exact(size, self.generator).to(self.device)
            length = 0 if self.subject.whole else validate.reduction_length(truth, x)
            self.given[smooth, shape] = _Given(truth, x, dout, _all_runs(truth, x, dout, None), length)
        return self.given[smooth, shape]

    def result(self, name: str) -> Result:
        """Compares the subject, fused (and frozen, if a network), with plain PyTorch in one dtype."""
        dtype, whole = validate.DTYPES[name], self.subject.whole
        exactly = dtype == torch.float64
        given = self.at(dtype)
        wide = torch.float64 if exactly else torch.float32  # the dtype of parameters, and of a network's images
        layout = torch.contiguous_format if exactly else torch.channels_last
        plain = validate.in_layout(copy.deepcopy(given.truth).to(wide), layout)
        x = given.x.to(wide if whole else dtype, memory_format=layout)
        expected = given.ref if exactly else _all_runs(plain, x, given.dout, dtype)
        fused = fr.fuse(copy.deepcopy(plain))
        found = _all_runs(fused, x, given.dout, dtype)
        if problem := _not_fused(fused, ours="/" not in self.subject.model):
            return Result(self.subject, name, [], problem)
        findings = validate.compare(found, expected, given.ref, dtype, given.length)
        if whole:
            x = x.to(dtype)
            with torch.no_grad(), chains_always():  # the check is about chains
                out = validate.frozen(plain, x, dtype)(x)
            key = "inference: out"
            frozen = validate.compare({key: out}, expected, {key: given.ref[key]}, dtype)
            findings += [replace(f, name=f"frozen {f.name}") for f in frozen]
        return Result(self.subject, name, findings)


def check(subject: Subject, dtypes: Sequence[str], device: torch.device, seed: int) -> list[Result]:
    """Compares ``subject`` with plain PyTorch: one result per dtype.

    Every run starts from the same weights, running statistics, input and output gradient.
    """
    checker = _Checker(subject, device, seed)
    return [checker.result(name) for name in dtypes]


def run(args: argparse.Namespace) -> int:
    """Checks every subject and prints one line for each. Returns 0 if all hold."""
    names = pick_models(args.models, models.list_models(), tuple(LIBRARIES))
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
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 must not become TF32
                results += check(subject, args.dtypes, device, args.seed)
            bar.advance(task)
    elapsed, failed = time.perf_counter() - start, sum(not r.ok for r in results)
    rows = [(s.label, *(r.cell() for r in results if r.subject is s)) for s in todo]
    out = console()
    title = "Share of the error bound that the worst tensor uses (1 is the bound)"
    out.print(table(title, ("", *args.dtypes), rows))
    compared = sum(len(r.findings) for r in results)
    out.print(
        f"{compared} tensors of {sum(not s.whole for s in todo)} blocks and {sum(s.whole for s in todo)} networks "
        f"({len(names)} models) against plain PyTorch, on {device_name(device)}, in {elapsed:.0f} s: "
        + (f"[red]{failed} of {len(results)} checks failed[/]" if failed else "[green]all within their bounds[/]")
    )
    if args.json:
        found = {"ok": not failed, "device": str(device), "models": names, "results": [r.to_json() for r in results]}
        write_json(args.json, describe() | found | {"elapsed_s": round(elapsed, 1)})
    return 1 if failed else 0
