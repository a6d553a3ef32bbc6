"""One case of the benchmark, a model x mode x dtype: validate every variant, then measure those that hold, interleaved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import models
from fused_resnet.cli import data, measure, validate, variants
from fused_resnet.cli.validate import Finding, Tensors
from fused_resnet.cli.variants import CompileBudget, Skipped, Variant

VALIDATED_IMAGES = 8  # in float64, of which a GPU's batch would be too much


@dataclass
class Row:
    """One variant of one case: what was validated and measured of it.

    Attributes:
        status: "measured"; "failed", it does not compute what plain PyTorch does and was not timed; "skipped".
        note: why it failed or was skipped, or how it was run. error: ``validate.summary`` against float64.
        worst: the tensor that uses most of its bound. times_s: of each round, seconds per step.
        saved_bytes: for the backward pass, of the batch. peak_bytes: of memory, above the model and its images.
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

    @property
    def title(self) -> str:
        """For headings and sentences."""
        return f"{self.model} {self.mode} {self.dtype}"

    def row(self, variant: str) -> Row | None:
        """The row of a variant, if it was measured."""
        return next((r for r in self.rows if r.variant == variant and r.status == "measured"), None)

    @property
    def ok(self) -> bool:
        """Nothing failed its validation."""
        return all(r.status != "failed" for r in self.rows)

    def numbers(self, row: Row) -> dict[str, Any]:
        """The row as JSON, with everything that is derived from its times: the one place where that is done."""
        found: dict[str, Any] = {"variant": row.variant, "status": row.status, "note": row.note, "error": row.error}
        found["worst"] = row.worst.to_json() if row.worst is not None else None
        if row.status != "measured":
            return found
        plain = self.row("plain")
        found |= {
            "rounds": len(row.times_s),
            "images_per_s": measure.quantiles([self.batch_size / t for t in row.times_s]),
            "ms_per_step": measure.quantiles([1e3 * t for t in row.times_s]),
            "speedup": measure.quantiles(measure.ratios(plain.times_s, row.times_s)) if plain else None,
            "times_s": row.times_s,
            "peak_bytes": row.peak_bytes,
        }
        if row.saved_bytes is not None:
            found["saved_bytes_per_image"] = row.saved_bytes / self.batch_size
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        head = {"model": self.model, "mode": self.mode, "dtype": self.dtype, "batch_size": self.batch_size}
        return head | {"ok": self.ok, "variants": [self.numbers(r) for r in self.rows]}


@dataclass(frozen=True)
class Settings:
    """What all cases share."""

    device: torch.device
    batch_size: int
    size: int
    seed: int
    repeats: tuple[int, int]
    case_budget_s: float


class Subject:
    """A model with telling weights, its images, and what it makes of them in float64."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.settings = name, settings
        x, labels = data.photographs(settings.batch_size, settings.size, settings.seed)
        self.x, self.labels = x.to(settings.device), labels.to(settings.device)
        generator = torch.Generator().manual_seed(settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model: nn.Module = getattr(models, name)(fused=False)
        model = model.to(settings.device, memory_format=torch.channels_last)
        few = self.x[:VALIDATED_IMAGES]
        validate.randomise(model, few, generator)
        self.model = model
        truth = copy.deepcopy(model).double().to(memory_format=torch.contiguous_format)  # faster in float64 on a CPU
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
        """What ``variant`` makes of the images that were given to float64."""
        train = mode == "training"
        x, dout = variant.x[:VALIDATED_IMAGES], self.dout if train else None
        found = validate.run(
            variant.forward, variant.model, x, dout, train=train, dtype=variant.autocast, input_gradient=False
        )
        return {name: found[name] for name in self.ref[mode] if name in found}

    def explanation(self) -> str:
        """Which blocks are fused, and on which backend."""
        return str(fr.explain(fr.fuse(copy.deepcopy(self.model))))


def _validate(subject: Subject, variant: Variant, row: Row, mode: str, dtype: torch.dtype, plain: Tensors) -> Tensors:
    """Fills in the row's error against float64; marks it failed where the rule does not hold."""
    got = subject.run(variant, mode)
    findings = validate.compare(got, plain or got, subject.ref[mode], dtype, relus=subject.relus)
    row.error, row.worst = dict(validate.summary(findings)), validate.worst(findings)
    if not row.worst.ok:
        row.status, row.note = "failed", f"not timed, as it does not compute what plain PyTorch does: {row.worst}"
    return got


def _variants(
    subject: Subject, case: Case, dtype: torch.dtype, budget: CompileBudget | None
) -> Iterator[tuple[Variant, Row]]:
    """Builds and validates each variant; appends its row to the case, yields those that may be timed."""
    train, x = case.mode == "training", subject.x
    whole_batch = len(x) <= VALIDATED_IMAGES  # else a compiled model would be compiled again for another batch size
    expected: Tensors = {}
    for name in variants.VARIANTS:
        row = Row(name)
        case.rows.append(row)
        try:
            model = copy.deepcopy(subject.model)
            if name == "plain":
                variant = variants.plain(model, x, train, dtype)
            elif name == "fused":
                variant = variants.fused(model, x, train, dtype)
            elif budget is None:
                raise Skipped("not compiled: --no-compile")
            else:
                budget.check(model, train)
                variant = variants.compiled(model, x, train, dtype)
                before = budget.spent_s
                first: Callable[[], Any] = (
                    (lambda v=variant, r=row: _validate(subject, v, r, case.mode, dtype, expected))
                    if whole_batch
                    else (lambda v=variant: v.train(subject.labels) if train else v.infer())
                )
                budget.first_call(first, model, train)
                variant.note = f"compiled in {budget.spent_s - before:.0f} s"
        except Skipped as reason:
            row.status, row.note = "skipped", str(reason)
            continue
        if name != "compile":
            got = _validate(subject, variant, row, case.mode, dtype, expected)
            expected = expected or got
        elif row.status == "failed":  # somebody else's numbers: reported, and timed all the same
            row.status, variant.note = "measured", f"{variant.note}; beyond our bound: {row.worst}"
        if row.status == "measured":
            row.note = variant.note
            yield variant, row


def run_case(
    subject: Subject, mode: str, dtype: str, budget: CompileBudget | None, tick: Callable[[], object] = lambda: None
) -> Case:
    """Validates and measures one case.

    Args:
        mode: "inference" or "training". dtype: "fp32" or "bf16". budget: for torch.compile; None leaves it out.
        tick: called after each round of the timing.
    """
    s = subject.settings
    case = Case(subject.name, mode, dtype, s.batch_size)
    ready = list(_variants(subject, case, validate.DTYPES[dtype], budget))
    steps: dict[str, measure.Step] = {}
    for variant, row in ready:
        if mode == "training":
            step = lambda v=variant: v.train(subject.labels)  # noqa: E731
            step()  # the optimizer's state is there from now on
            tensors = [*variant.model.parameters(), *variant.model.buffers()]
            row.saved_bytes = measure.saved_bytes(lambda v=variant: v.loss(subject.labels), tensors)  # type: ignore[misc]
            variant.model.zero_grad(set_to_none=True)
        else:
            step = variant.infer
            step()
        row.peak_bytes = measure.peak_bytes(step, s.device)
        steps[variant.name] = step
    times = measure.interleaved(steps, s.device, repeats=s.repeats, budget_s=s.case_budget_s, tick=tick)
    for _, row in ready:
        row.times_s = times[row.variant]
    return case
