"""One case of the benchmark (a model x mode x dtype): each variant is validated, then all are measured in turns."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import measure, models
from fused_resnet.cli import data, validate, variants
from fused_resnet.cli.validate import Finding, Tensors
from fused_resnet.cli.variants import CompileBudget, Skipped, Variant

VALIDATED_IMAGES = 8  # in float64, where a GPU's whole batch would need too much memory


@dataclass
class Row:
    """The results of one variant of one case.

    Attributes:
        status: "measured"; "failed": its numbers differ from plain PyTorch's, so it was not timed; "skipped".
        note: why it failed or was skipped, or how it was run. error: ``validate.summary`` against float64.
        worst: the tensor that uses most of its bound. times_s: seconds per step, one value per round.
        saved_bytes: kept for the backward pass of the batch. peak_bytes: memory above the model and its images.
    """

    variant: str
    status: str = "measured"
    note: str = ""
    error: dict[str, float] = field(default_factory=dict)
    worst: Finding | None = None
    times_s: list[float] = field(default_factory=list)
    saved_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass
class Case:
    """A model x mode x dtype and its rows, "plain" first."""

    model: str
    mode: str
    dtype: str
    batch_size: int
    rows: list[Row] = field(default_factory=list)

    def row(self, variant: str) -> Row | None:
        """The row of a variant, if it was measured."""
        return next((r for r in self.rows if r.variant == variant and r.status == "measured"), None)

    @property
    def ok(self) -> bool:
        """Whether no variant failed its validation."""
        return all(r.status != "failed" for r in self.rows)

    def numbers(self, row: Row) -> dict[str, Any]:
        """The row as JSON, with the figures derived from its times. They are derived nowhere else."""
        found: dict[str, Any] = {"variant": row.variant, "status": row.status, "note": row.note, "error": row.error}
        found["worst"] = row.worst.to_json() if row.worst is not None else None
        if row.status != "measured":
            return found
        plain = self.row("plain")
        found |= measure.figures(row.times_s, self.batch_size, plain.times_s if plain else [])
        found |= {"rounds": len(row.times_s), "times_s": row.times_s, "peak_bytes": row.peak_bytes}
        if row.saved_bytes is not None:
            found["saved_bytes_per_image"] = row.saved_bytes / self.batch_size
        return found

    def to_json(self) -> dict[str, Any]:
        """All fields and rows."""
        head = {"model": self.model, "mode": self.mode, "dtype": self.dtype, "batch_size": self.batch_size}
        return head | {"ok": self.ok, "variants": [self.numbers(r) for r in self.rows]}


@dataclass(frozen=True)
class Settings:
    """The settings that all cases share."""

    device: torch.device
    batch_size: int
    size: int
    seed: int
    repeats: tuple[int, int]
    case_budget_s: float

    @staticmethod
    def of(args: Namespace, device: torch.device, repeats: tuple[int, int], case_budget_s: float) -> Settings:
        """The settings that the command's arguments ask for."""
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # plain PyTorch at its fastest: the shapes never change
        batch_size = args.batch_size or (8 if device.type == "cpu" else 256)
        return Settings(device, batch_size, args.size, args.seed, repeats, case_budget_s)


def network(name: str, settings: Settings, few: Tensor, generator: torch.Generator) -> nn.Module:
    """A plain model, channels_last, with weights that expose mistakes, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model: nn.Module = getattr(models, name)(fused=False)
    model = validate.in_layout(model.to(settings.device), torch.channels_last)
    validate.randomise(model, few, generator, validate.BRANCH)
    return model


class Subject:
    """A model with weights that expose mistakes, its images, and its float64 results on them."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.settings = name, settings
        x, labels = data.photographs(settings.batch_size, settings.size, settings.seed)
        self.x, self.labels = x.to(settings.device), labels.to(settings.device)
        generator = torch.Generator().manual_seed(settings.seed)
        few = self.x[:VALIDATED_IMAGES]
        self.model = model = network(name, settings, few, generator)
        # contiguous: faster in float64 on a CPU
        truth = validate.in_layout(copy.deepcopy(model).double(), torch.contiguous_format)
        wide = few.double().contiguous()
        with torch.no_grad():
            out = copy.deepcopy(truth).eval()(wide)
        self.dout = validate.exact(out.shape, generator).to(settings.device)
        self.relus = min(n for n, _ in validate.relu_inputs(model, few))
        self.ref = {
            "inference": {"out": out},
            "training": validate.run(truth, truth, wide, self.dout, train=True, input_gradient=False),
        }

    def run(self, variant: Variant, mode: str) -> Tensors:
        """The results of ``variant`` on the images that the float64 run had."""
        train = mode == "training"
        x, dout = variant.x[:VALIDATED_IMAGES], self.dout if train else None
        found = validate.run(
            variant.forward, variant.model, x, dout, train=train, dtype=variant.autocast, input_gradient=False
        )
        return {name: found[name] for name in self.ref[mode] if name in found}

    def explanation(self) -> str:
        """Says which blocks are fused, and on which backend."""
        return str(fr.explain(self.model, self.x[:VALIDATED_IMAGES]))


def _build(name: str, subject: Subject, train: bool, dtype: torch.dtype, budget: CompileBudget | None) -> Variant:
    model = copy.deepcopy(subject.model)
    if name == "plain":
        return variants.plain(model, subject.x, train, dtype)
    if name == "fused":
        return variants.fused(model, subject.x, train, dtype)
    if budget is None:
        raise Skipped("not compiled: --no-compile")
    budget.check(model, train)
    return variants.compiled(model, subject.x, train, dtype)


def _variants(
    subject: Subject, case: Case, dtype: torch.dtype, budget: CompileBudget | None
) -> Iterator[tuple[Variant, Row]]:
    """Builds and validates each variant and appends its row to the case. Yields the variants that may be timed."""
    train = case.mode == "training"
    plain: Tensors = {}
    for name in variants.VARIANTS:
        row = Row(name)
        case.rows.append(row)
        compiles = name == "compile"
        try:
            variant = _build(name, subject, train, dtype, budget)
            row.note = variant.note
            before = budget.spent_s if budget else 0.0
            with budget.compiling(variant.model, train) if compiles and budget else nullcontext():
                if compiles and len(variant.x) > VALIDATED_IMAGES:  # fewer images would mean another compilation
                    variant.train(subject.labels) if train else variant.infer()
                else:
                    got = subject.run(variant, case.mode)
                    plain = plain or got
                    findings = validate.compare(got, plain, subject.ref[case.mode], dtype, relus=subject.relus)
                    row.error, row.worst = dict(validate.summary(findings)), validate.worst(findings)
        except Skipped as reason:
            row.status, row.note = "skipped", str(reason)
            continue
        if compiles and budget:
            row.note = f"compiled in {budget.spent_s - before:.0f} s"
        if row.worst is not None and not row.worst.ok:
            if not compiles:
                row.status, row.note = "failed", f"not timed, its numbers are wrong: {row.worst}"
                continue
            row.note += f"; beyond our bound: {row.worst}"  # not our kernels: reported, but still timed
        yield variant, row


def run_case(subject: Subject, mode: str, dtype: str, budget: CompileBudget | None) -> Case:
    """Validates and measures one case.

    Args:
        mode: "inference" or "training". dtype: "fp32" or "bf16". budget: for torch.compile; None leaves it out.
    """
    s = subject.settings
    case = Case(subject.name, mode, dtype, s.batch_size)
    ready = list(_variants(subject, case, validate.DTYPES[dtype], budget))
    steps: dict[str, Callable[[], object]] = {}
    for variant, row in ready:
        step = partial(variant.train, subject.labels) if mode == "training" else variant.infer
        step()  # makes the optimizer's state, and packs weights
        if mode == "training":
            existing = [*variant.model.parameters(), *variant.model.buffers()]
            row.saved_bytes = measure.saved_bytes(partial(variant.loss, subject.labels), existing)
            variant.model.zero_grad(set_to_none=True)
        row.peak_bytes = measure.peak_bytes(step, s.device)
        steps[variant.name] = step
    times = measure.interleaved(steps, s.device, repeats=s.repeats, budget_s=s.case_budget_s)
    for _, row in ready:
        row.times_s = times[row.variant]
    return case
