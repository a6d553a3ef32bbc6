"""Whether a model computes what plain PyTorch computes: how both are run, and the rules by which they are compared.

The reference is the plain model in float64. There are two rules:

    elementwise   |got - ref| <= sqrt(K) * (atol * rms(ref) + rtol * |ref|), torch.testing's atol and rtol of the
                  dtype, K the longest sum behind a value (``reduction_length``). For float64, and for single blocks in
                  float32, whose inputs are drawn so that no value lies at a ReLU's kink, where rounding alone decides.
    relative      e(got) <= 2 * e(plain in the same dtype) + FLOOR, e = ||. - ref|| / ||ref|| (flash-attention's rule).
                  For 16 bits, and for whole networks in float32. Some of the millions of values of a network lie at a
                  kink. Luck decides which of them fall on the wrong side, here and in plain PyTorch. Each one changes
                  a gradient by 1 of the n/2 values that passed, so the bound of a network's gradients is larger by
                  sqrt(2 * KINKS / n).

A gradient that is zero except for rounding (of a shift before another norm, say) has no meaningful relative error. Its
error is taken relative to the run's largest gradient instead.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.explanation import closing_norms
from fused_resnet.frozen.freezing import freeze
from fused_resnet.fusion.patterns import is_frozen_norm, looks_like_norm
from fused_resnet.planner.sizes import chains_always

Tensors = dict[str, Tensor]

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
# (rtol, atol) of torch.testing.assert_close for values of order one.
TOLERANCE = {torch.float64: (1e-7, 1e-7), torch.float32: (1.3e-6, 1e-5)}
# This many of the n values of a network's smallest ReLU may fall on the wrong side of a kink by luck. Their number is a
# Poisson variable of mean n * (relative error of the forward pass), well under 1.
KINKS = 4
# A float64 gradient smaller than this share of the largest is rounding.
NOTHING = 1e-9
# ``branch`` of ``randomise`` for whole networks.
BRANCH = 0.3
# Relative errors below these are rounding, even if plain PyTorch's error is smaller.
FLOOR = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}


# ---------------------------------------------------------------------------------------------------- the rule
@dataclass(frozen=True)
class Finding:
    """The comparison of one tensor: its relative error, plain PyTorch's in the same dtype, share of its bound used."""

    name: str
    error: float
    plain_error: float
    used: float

    @property
    def ok(self) -> bool:
        """Whether the tensor is within its bound; NaN is not."""
        return self.used <= 1

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.1e} (plain {self.plain_error:.1e}), {self.used:.2f} of the bound"

    def to_json(self) -> dict[str, Any]:
        """A dictionary, with infinities and NaN as text."""
        return {k: v if isinstance(v, str) or math.isfinite(v) else str(v) for k, v in asdict(self).items()}


def relative_error(got: Tensor, ref: Tensor) -> float:
    """||got - ref|| / ||ref|| in float64; ||got|| if ref is zero; infinite if got is not finite but ref is."""
    got, ref = got.double(), ref.double()
    if got.shape != ref.shape or bool(ref.isfinite().all()) > bool(got.isfinite().all()):
        return math.inf
    norm = float(torch.linalg.vector_norm(ref))
    return float(torch.linalg.vector_norm(got - ref)) / (norm or 1.0)


def elementwise_use(got: Tensor, ref: Tensor, dtype: torch.dtype, length: int) -> float:
    """The largest |got - ref| / bound of the elementwise rule; infinite for NaN."""
    got, ref = got.double(), ref.double()
    if got.shape != ref.shape:
        return math.inf
    if ref.numel() == 0:
        return 0.0
    rtol, atol = TOLERANCE[dtype]
    rms = float(ref.square().mean().sqrt()) or 1.0
    bound = math.sqrt(length) * (atol * rms + rtol * ref.abs())
    used = float(((got - ref).abs() / bound).max())
    return used if math.isfinite(used) else math.inf


def compare(
    got: Tensors, plain: Tensors, ref: Tensors, dtype: torch.dtype, length: int = 0, relus: int = 0
) -> list[Finding]:
    """Compares every tensor of ``ref`` by the rule for its dtype and kind.

    Args:
        got, plain, ref: results of ``run`` for the tested model, for plain PyTorch in ``dtype`` and in float64.
        length: a single block's ``reduction_length``. With it float32 is compared elementwise.
        relus: the number of values of a network's smallest ReLU (``relu_inputs``), if it has ReLUs.

    Returns:
        One finding per tensor. A tensor that ``got`` lacks uses an infinite share of its bound.
    """
    elementwise = dtype == torch.float64 or (dtype == torch.float32 and length > 0)
    largest: dict[str, float] = {}  # mode -> the root mean square of its largest gradient
    for name in filter(is_gradient, ref):
        mode = name.rpartition(": ")[0]
        largest[mode] = max(largest.get(mode, 0.0), _rms(ref[name]))
    findings = []
    for name, r in ref.items():
        if name not in got:
            findings.append(Finding(f"{name} (missing)", math.inf, 0.0, math.inf))
            continue
        tensors, luck = (got[name], plain[name]), 0.0
        if is_gradient(name):
            luck = math.sqrt(2 * KINKS / relus) if relus else 0.0
            scale = largest[name.rpartition(": ")[0]]
        if is_gradient(name) and got[name].shape == r.shape and _rms(r) < NOTHING * scale:
            error, plain_error = (_rms(t.double() - r.double()) / scale for t in tensors)
            used = error / (2 * plain_error + FLOOR[dtype])
        else:
            error, plain_error = (relative_error(t, r) for t in tensors)
            used = error / (2 * plain_error + FLOOR[dtype] + luck)
            if elementwise:
                used = elementwise_use(got[name], r, dtype, length or 1)
        findings.append(Finding(name, error, plain_error, used if not math.isnan(used) else math.inf))
    return findings


def _rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt()) if t.numel() else 0.0


def worst(findings: Iterable[Finding]) -> Finding:
    """The finding that uses most of its bound."""
    return max(findings, key=lambda f: f.used)


def reduction_length(model: nn.Module, x: Tensor) -> int:
    """K: the longest sum behind any value: fprop's C/g*kH*kW, dgrad's K/g*kH*kW, the statistics' and wgrad's N*H*W."""
    longest = x.numel() // x.shape[1]
    for m in model.modules():
        if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            longest = max(longest, max(m.in_channels, m.out_channels) // m.groups * math.prod(m.kernel_size))
    return longest


# ---------------------------------------------------------------------------------------------------- running a model
def frozen(model: nn.Module, x: Tensor, dtype: torch.dtype) -> nn.Module:
    """A frozen model that runs its captured network even if that differs from the plain one: it is compared here."""
    made = freeze(model, x, dtype=dtype)
    made.differs = False
    return made


def in_layout(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """``model`` with its weights in a memory format (torch's type stubs lack this call)."""
    return model.to(memory_format=layout)  # type: ignore[call-overload]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """``torch.autocast`` for 16-bit dtypes, otherwise a context that does nothing."""
    return torch.autocast(device.type, dtype) if dtype in (torch.bfloat16, torch.float16) else nullcontext()


def run(
    model: nn.Module,
    x: Tensor,
    dout: Tensor | None,
    *,
    train: bool,
    dtype: torch.dtype | None = None,
    input_gradient: bool = True,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Tensors:
    """Runs the forward and, with ``dout``, the backward; copies all results.

    Args:
        model: the module that owns parameters and buffers. forward: a compiled version of it that runs in its place.
        x: [N, C, H, W]. dout: the gradient of the output, of its shape; None: runs without gradients.
        train: training mode or eval mode. dtype: 16-bit dtypes run under autocast.

    Returns:
        "out"; with ``dout`` "dx" (unless not ``input_gradient``) and "d <parameter>"; and "<buffer>" of each floating
        buffer and counter, after the step.
    """
    model.train(train)
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_(dout is not None and input_gradient)
    with torch.set_grad_enabled(dout is not None), autocast(x.device, dtype), chains_always():
        out = model(x) if forward is None else forward(x)
    found = {"out": out.detach().clone()}
    if dout is not None:
        out.backward(dout.to(out.dtype))
        if x.grad is not None:
            found["dx"] = x.grad
        found |= {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    return found | {name: b.detach().clone() for name, b in model.named_buffers()}


# ---------------------------------------------------------------------------------------------------- telling inputs
@torch.no_grad()
def randomise(
    model: nn.Module, x: Tensor, generator: torch.Generator, branch: float = 1.0, closing: Collection[str] | None = None
) -> None:
    """Gives every norm values that hide no mistake: gamma of both signs, beta and mean not 0, var not 1.

    The running statistics are those of this batch, moved a little, so that deep networks stay in range in eval mode.
    Runs ``model`` once on ``x`` and leaves it in training mode.

    Args:
        branch: scales gamma and beta at the end of each residual branch. Under 1, as in trained networks, errors do
            not grow from block to block. At 1 they hide everything: 16 bits lose all of ResNet-50's gradient.
        closing: the names of the norms at the end of residual branches. None: one call is captured to find them.
    """
    norms: list[Any] = [m for m in model.modules() if looks_like_norm(m)]
    last = {id(model.get_submodule(name)) for name in (closing_norms(model, x) if closing is None else closing)}

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        values = torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low
        return values.to(like)

    def measure(bn: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        dims = [d for d in range(inputs[0].dim()) if d != 1]
        bn.running_mean.copy_(inputs[0].mean(dims))  # type: ignore[operator]
        bn.running_var.copy_(inputs[0].var(dims))  # type: ignore[operator]

    hooks = [bn.register_forward_pre_hook(measure) for bn in norms if is_frozen_norm(bn)]
    momenta = [getattr(bn, "momentum", None) for bn in norms]
    for bn in norms:
        if bn.weight is not None:
            sign = torch.where(uniform(bn.weight, 0, 1) < 0.2, -1.0, 1.0)
            bn.weight.copy_(uniform(bn.weight, 0.5, 1.5) * sign)
            bn.bias.copy_(uniform(bn.bias, -0.5, 0.5))
            if id(bn) in last:
                bn.weight.mul_(branch)
                bn.bias.mul_(branch)
        bn.momentum = 1.0
    model.train()
    model(x)
    for hook in hooks:
        hook.remove()
    for bn, momentum in zip(norms, momenta, strict=True):
        bn.momentum = momentum
        if bn.running_mean is not None and bn.running_var is not None:
            bn.running_mean += uniform(bn.running_mean, -0.3, 0.3) * bn.running_var.sqrt()
            bn.running_var *= uniform(bn.running_var, 0.7, 1.4)


def exact(shape: Sequence[int], generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Normally distributed float64 values that bfloat16 holds exactly: every dtype starts from the same input."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean
    return values.to(torch.bfloat16).double()


def relu_inputs(plain: nn.Module, x: Tensor) -> list[tuple[int, float]]:
    """(number of values, smallest |z|) of each ReLU's input in a plain model, in eval and training mode."""
    plain = copy.deepcopy(plain)
    found: list[tuple[int, float]] = []
    for m in plain.modules():
        if isinstance(m, nn.ReLU):
            m.register_forward_pre_hook(lambda _, z: found.append((z[0].numel(), float(z[0].abs().min()))))
    with torch.no_grad():
        plain.eval()(x)
        plain.train()(x)
    return found


def draw(
    plain: nn.Module, shape: Sequence[int], generator: torch.Generator, device: torch.device, tries: int
) -> Tensor:
    """A float64 input with a mean that is not 0 and a std that is not 1.

    Draws up to ``tries`` inputs and returns the first that stays clear of the kinks of ``plain``, or the clearest.
    """
    best, distance = exact(shape, generator, 0.5, 2.0).to(device), -1.0
    candidate = best
    for _ in range(tries - 1):
        found = min(z for _, z in relu_inputs(plain, candidate))
        if found > distance:
            best, distance = candidate, found
        if distance > 1e-5:
            break
        candidate = exact(shape, generator, 0.5, 2.0).to(device)
    return best


def is_gradient(name: str) -> bool:
    """Whether the name, with or without a mode before it, is a gradient's."""
    return name.split(": ")[-1].startswith(("dx", "d "))


def summary(findings: Iterable[Finding]) -> Mapping[str, float]:
    """Root mean square of the relative errors by kind: "out", "gradients", "statistics", as far as present."""
    kinds: dict[str, list[float]] = {}
    for f in findings:
        kind = "out" if f.name == "out" else "gradients" if is_gradient(f.name) else "statistics"
        kinds.setdefault(kind, []).append(f.error)
    return {kind: math.sqrt(sum(e * e for e in errors) / len(errors)) for kind, errors in kinds.items()}
