"""Whole networks, fused and frozen, beside plain ones: out, dx, every gradient and every statistic of their runs."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from itertools import chain, count, islice

import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.cli import validate
from fused_resnet.cli.check import _all_runs, _smooth
from fused_resnet.cli.subjects import OneTensor
from fused_resnet.explanation import captured_closing_norms
from fused_resnet.fusion.classes import FusedModule

Build = Callable[[], nn.Module]
IMAGES = (4, 3, 48, 64)
LAYOUTS = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
Case = tuple[nn.Module, Tensor, Tensor]


def subject(build: Build, seed: int, closing: set[str], shape: tuple[int, ...] = IMAGES) -> Case:
    """A network in float64 with telling weights; an input of it, and a gradient of its output; ``closing``: the norms
    at the end of its residual branches."""
    generator = torch.Generator().manual_seed(seed)
    plain = OneTensor(build()).double()

    def images() -> Tensor:
        return validate.exact(shape, generator, 0.5, 2.0)

    validate.randomise(plain, images(), generator, validate.BRANCH, closing)
    for t in [*plain.parameters(), *plain.buffers()]:
        t.data = t.data.float().to(t.dtype)  # values that float32 holds, too
    with torch.no_grad():
        out = copy.deepcopy(plain).eval()(images())
    return plain, images(), validate.exact(out.shape, generator)


class Compared:
    """All tensors of three runs, fused beside plain. One fused network, of ``dtype``, serves all cases: what dynamo
    captured of it holds for other weights."""

    def __init__(self, plain: nn.Module, dtype: torch.dtype, ill_conditioned: bool = False) -> None:
        self.dtype, self.ill_conditioned = dtype, ill_conditioned
        own = copy.deepcopy(plain).to(dtype)
        self.nets = [fr.fuse(copy.deepcopy(own)), own]
        if dtype == torch.float32:
            self.nets = [validate.in_layout(m, torch.channels_last) for m in self.nets]
        assert list(self.nets[0].state_dict()) == list(plain.state_dict())

    @torch.no_grad()
    def closing(self, shape: tuple[int, ...] = IMAGES) -> set[str]:
        """The norms at the end of the residual branches, from the graph that inference runs later."""
        self.nets[0].eval()(torch.zeros(shape, dtype=self.dtype))
        return captured_closing_norms(self.nets[0])

    def __call__(self, case: Case, dtypes: tuple[torch.dtype | None, ...] = (None,)) -> list[validate.Finding]:
        """What a case, whose network is in float64, gives; ``dtypes``: to compute in, None for the networks' own."""
        plain, x, dout = case
        ref = _all_runs(plain, x, dout, None)
        findings = []
        for dtype in dtypes:
            for net in self.nets:
                net.load_state_dict(plain.state_dict())
            got, expected = (_all_runs(net, x.to(self.dtype), dout, dtype) for net in self.nets)
            if dtype is None:
                findings += validate.compare(got, ref, ref, self.dtype, validate.reduction_length(plain, x))
                continue
            found = validate.compare(got, expected, ref, dtype)
            if self.ill_conditioned and dtype == torch.float32:  # also beside what half an ulp in the parameters does
                other = _all_runs(validate.in_layout(shaken(plain), torch.channels_last), x.float(), dout, dtype)
                pairs = zip(found, validate.compare(got, other, ref, dtype), strict=True)
                found = [min(pair, key=lambda f: f.used) for pair in pairs]
            findings += found
        return findings

    def in_narrow(self, cases: Iterator[Case]) -> list[str]:
        """What exceeds its bound: in float32 in the first case; in bfloat16, and in ``ILL_CONDITIONED`` networks,
        there and by the median of five cases, and again by the median of fifteen, as in tolerances.py: of hundreds of
        tensors, each the sum of other roundings than plain PyTorch's, some exceed it in three draws of five."""
        dtypes = (torch.float32, torch.bfloat16)
        found = self(next(cases), dtypes)
        strict = 0 if self.ill_conditioned else len(found) // len(dtypes)
        suspects = {i: [f.used] for i, f in enumerate(found) if not f.ok}
        if any(i < strict for i in suspects):
            return [str(found[i]) for i in suspects if i < strict]
        for more in (4, 10):
            for case in islice(cases, more if suspects else 0):
                again = self(case, dtypes if self.ill_conditioned else dtypes[1:])
                for i, used in suspects.items():
                    used.append(again[i - strict].used)
            suspects = {i: used for i, used in suspects.items() if statistics.median(used) > 1}
        return [f"{found[i]}, median {statistics.median(used):.2f}" for i, used in suspects.items()]


@torch.no_grad()
def shaken(plain: nn.Module) -> nn.Module:
    """A float32 copy whose parameters are off by up to half an ulp."""
    copied, half = copy.deepcopy(plain).float(), torch.finfo(torch.float32).eps / 2
    for p in copied.parameters():
        p.mul_(1 + half * torch.empty_like(p, dtype=torch.float64).uniform_(-1, 1))
    return copied


@torch.no_grad()
def frozen(plain: nn.Module, x: Tensor) -> list[validate.Finding]:
    """The output of the network frozen in float32; ``plain`` is in float64."""
    ref = {"frozen: out": copy.deepcopy(plain).eval()(x)}
    layout = LAYOUTS[x.dim()]
    narrow = validate.in_layout(copy.deepcopy(plain).float().eval(), layout)
    image = x.float().contiguous(memory_format=layout)
    got = {"frozen: out": fr.freeze(narrow, image)(image)}
    return validate.compare(got, {"frozen: out": narrow(image)}, ref, torch.float32)


def check(
    build: Build, shape: tuple[int, ...] = IMAGES, narrow: bool = False, ill_conditioned: bool = False
) -> list[validate.Finding]:
    """A network, fused and frozen, beside plain, and back as it was. ``narrow``: in float32 and bfloat16 as well.

    Returns:
        What was found in float64.
    """
    compared = Compared(OneTensor(build()).double(), torch.float64)
    closing = compared.closing(shape)
    plain, x, dout = subject(build, 11, closing, shape)
    classes = {n: type(m) for n, m in plain.named_modules()}
    objects = {n: id(t) for n, t in [*plain.named_parameters(), *plain.named_buffers()]}

    exact = compared((plain, x, dout))
    failed = [str(f) for f in [*exact, *frozen(plain, x)] if not f.ok]
    if narrow:
        others = (subject(build, seed, closing, shape) for seed in count(12))
        cases = ((_smooth(m), *rest) for m, *rest in chain([(plain, x, dout)], others))
        failed += Compared(_smooth(plain), torch.float32, ill_conditioned).in_narrow(cases)
    assert not failed, failed

    fr.fuse(plain)
    assert any(isinstance(m, FusedModule) for m in plain.modules())
    fr.unfuse(plain)
    assert {n: type(m) for n, m in plain.named_modules()} == classes
    assert {n: id(t) for n, t in [*plain.named_parameters(), *plain.named_buffers()]} == objects
    return exact
