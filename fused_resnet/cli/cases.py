"""One case of the benchmark (a model x mode x dtype): each variant is validated, then all are measured in turns."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import measure, models
from fused_resnet.cli import data, validate, variants
from fused_resnet.cli.validate import Finding, Tensors
from fused_resnet.cli.variants import CompileBudget, Skipped, Variant

Row = dict[str, Any]
VALIDATED_IMAGES = 8  # in float64, where a GPU's whole batch would need too much memory


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
    """A model with weights that expose mistakes, its images, and its float64 results on them.

    Args:
        images: with their labels; None: photographs.
    """

    def __init__(self, name: str, settings: Settings, images: tuple[Tensor, Tensor] | None = None) -> None:
        self.name, self.settings = name, settings
        x, labels = images or data.photographs(settings.batch_size, settings.size, settings.seed)
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
            "training": validate.run(truth, wide, self.dout, train=True, input_gradient=False),
        }

    def run(self, variant: Variant, mode: str) -> Tensors:
        """The results of ``variant`` on the images that the float64 run had."""
        train = mode == "training"
        x, dout = variant.x[:VALIDATED_IMAGES], self.dout if train else None
        found = validate.run(
            variant.model, x, dout, train=train, dtype=variant.autocast, input_gradient=False, forward=variant.forward
        )
        return {name: found[name] for name in self.ref[mode] if name in found}

    def explanation(self) -> str:
        """Says which blocks are fused, and on which backend."""
        return str(fr.explain(self.model, self.x[:VALIDATED_IMAGES]))


def validated(
    name: str, subject: Subject, mode: str, dtype: torch.dtype, budget: CompileBudget | None, plain: Tensors
) -> tuple[Variant | None, Row]:
    """Builds a variant and compares it with float64 and with ``plain``, which the first variant fills.

    Returns:
        The variant, None if it can't be timed; and its row: "status" is "measured", "failed" (its numbers differ from
        plain PyTorch's) or "skipped", "note" says why, "error" is ``validate.summary``, "worst" the worst finding.
    """
    train, compiles = mode == "training", name == "compile"
    row: Row = {"variant": name, "status": "measured", "note": "", "error": {}, "worst": None}
    worst: Finding | None = None
    try:
        if compiles and budget is None:
            raise Skipped("not compiled: --no-compile")
        variant = variants.VARIANTS[name](copy.deepcopy(subject.model), subject.x, train, dtype)
        row["note"] = variant.note
        before = budget.spent_s if budget else 0.0
        with budget.compiling(variant.model, train) if compiles and budget else nullcontext():
            if compiles and len(variant.x) > VALIDATED_IMAGES:  # fewer images would mean another compilation
                variant.train(subject.labels) if train else variant.infer()
            else:
                got = subject.run(variant, mode)
                plain |= {} if plain else got
                findings = validate.compare(got, plain, subject.ref[mode], dtype, relus=subject.relus)
                worst = validate.worst(findings)
                row |= {"error": dict(validate.summary(findings)), "worst": worst.to_json()}
    except Skipped as reason:
        return None, row | {"status": "skipped", "note": str(reason)}
    if compiles and budget:
        row["note"] = f"compiled in {budget.spent_s - before:.0f} s"
    if worst is not None and not worst.ok:
        if not compiles:
            return None, row | {"status": "failed", "note": f"not timed, its numbers are wrong: {worst}"}
        row["note"] += f"; beyond our bound: {worst}"  # not our kernels: reported, but still timed
    return variant, row


def prepared(variant: Variant, subject: Subject, mode: str, row: Row) -> Callable[[], object]:
    """The step to be timed, after a first call; adds to ``row`` the memory that it needs."""
    step = partial(variant.train, subject.labels) if mode == "training" else variant.infer
    step()  # makes the optimizer's state, and packs weights
    if mode == "training":
        existing = [*variant.model.parameters(), *variant.model.buffers()]
        saved = measure.saved_bytes(partial(variant.loss, subject.labels), existing)
        row["saved_bytes_per_image"] = saved / subject.settings.batch_size
        variant.model.zero_grad(set_to_none=True)
    row["peak_bytes"] = measure.peak_bytes(step, subject.settings.device)
    return step


def run_case(subject: Subject, mode: str, dtype: str, budget: CompileBudget | None) -> dict[str, Any]:
    """Validates each variant of a model x mode x dtype, then measures all that hold. Returns what the report holds.

    Args:
        mode: "inference" or "training". dtype: "fp32" or "bf16". budget: for torch.compile; None leaves it out.
    """
    s, plain = subject.settings, Tensors()
    made = [validated(name, subject, mode, validate.DTYPES[dtype], budget, plain) for name in variants.VARIANTS]
    steps: dict[str, Callable[[], object]] = {}
    for variant, row in made:
        if variant is None:
            continue
        steps[variant.name] = prepared(variant, subject, mode, row)
    times = measure.interleaved(steps, s.device, repeats=s.repeats, budget_s=s.case_budget_s)
    rows = [row for _, row in made]
    for row in rows:
        if own := times.get(row["variant"]):
            row |= measure.figures(own, s.batch_size, times.get("plain", [])) | {"rounds": len(own), "times_s": own}
    ok = all(row["status"] != "failed" for row in rows)
    head = {"model": subject.name, "mode": mode, "dtype": dtype, "batch_size": s.batch_size}
    return head | {"ok": ok, "variants": rows}
