"""Inference-only models: BatchNorm folded into the convolutions, weights prepacked, bias, add and act as post-ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fused_resnet.arguments import number, pair
from fused_resnet.backends import load, vector_dtype
from fused_resnet.chain_forward import fold
from fused_resnet.cuda_graphs import Graphs
from fused_resnet.frozen_forward import fold_weight, plain_chains, run_chains
from fused_resnet.modules import ChainModules, UnitModules, act_of, copy_of, for_onnx, graphed, named_modules
from fused_resnet.spec import Act, ChainSpec, ConvSpec, ShortcutSpec, UnitSpec

# (a model's copy, the dtype to compute in, portable, names of modules to leave) -> for each module with chains, how it
# takes its place frozen.
FreezeChains = Callable[[nn.Module, torch.dtype, bool, set[str]], Iterable[Callable[[nn.Module], nn.Module]]]


class CalledOtherwise(RuntimeError):
    """The module ``name`` of a frozen model was called in a way that its frozen chains are not for."""

    def __init__(self, name: str, how: str) -> None:
        super().__init__(f"{name or '(model)'}: expected the calls that it got when it was frozen, got {how}")
        self.name = name


def why_not_frozen(chain: ChainModules) -> str | None:
    """Why a chain that can be fused can't be frozen, or None."""
    norms = (type(u.bn).__name__ for u in chain.all_units if u.bn.running_mean is None)
    return next((f"a {name} without running statistics" for name in norms), None)


class FrozenUnit(nn.Module):
    """act(conv(x, W) + b [+ residual]), BatchNorm folded into ``weight`` and ``bias`` (buffers): what a chain reads.
    With a ``scale`` act(scale*conv(x, W) + b [+ residual]), where weights with it can't be folded (``fold_weight``);
    without a convolution act(weight*x + bias [+ residual]), vectors in ``vector_dtype`` both."""

    @torch.no_grad()
    def __init__(self, unit: UnitModules, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
        super().__init__()
        u = unit.unit()
        assert u.running_mean is not None and u.running_var is not None
        wide = vector_dtype(u.running_mean.dtype)
        params = {"bn_weight": u.bn_weight, "bn_bias": u.bn_bias, "bias": u.bias, "running_mean": u.running_mean}
        eps = number(u.eps, "eps")
        norm = fold({k: v for k, v in params.items() if v is not None}, u.running_mean, u.running_var, eps, wide)
        self.weight: Tensor
        self.bias: Tensor
        self.scale: Tensor
        conv, scale = None, None
        if u.weight is None:
            weight, bias_dtype = norm.scale.to(vector_dtype(dtype)), vector_dtype(dtype)
        else:
            weight, scale = fold_weight(u.weight, norm, dtype)
            weight = weight.contiguous(memory_format=torch.channels_last)
            conv = ConvSpec.make(u.weight.shape, u.stride, u.padding, u.dilation, u.groups, bias=True)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", norm.shift.to(bias_dtype if scale is None else scale.dtype))
        if scale is not None:
            self.register_buffer("scale", scale)
        act = act_of(unit.act) if unit.act is not None else Act("identity")
        self.spec = UnitSpec(conv, act, eps, batch_stats=False, scaled=scale is not None)

    @property
    def tensors(self) -> list[Tensor]:
        """What operators are given of it."""
        return [self.weight, self.bias, self.scale] if self.spec.scaled else [self.weight, self.bias]

    def extra_repr(self) -> str:
        c, w = self.spec.conv, self.weight
        if c is None:
            return f"{w.shape[0]}, no convolution, {self.spec.act.name}"
        kernel = "x".join(map(str, w.shape[2:]))
        return f"{w.shape[1] * c.groups} -> {w.shape[0]}, {kernel}, stride {c.stride[0]}, {self.spec.act.name}"


class FrozenChain(nn.Sequential):
    """A chain of frozen units, its projection last; made from the module ``name``, of the class ``block``.
    ``summand``: its forward takes one that somebody else made."""

    def __init__(
        self, name: str, block: str, chain: ChainModules, summand: bool, dtype: torch.dtype, portable: bool
    ) -> None:
        bias_dtype = dtype if portable else vector_dtype(dtype)
        units = [FrozenUnit(u, dtype, bias_dtype) for u in chain.all_units]
        super().__init__(*units)
        self.name, self.block, self.dtype, self.portable = name, block, dtype, portable
        specs, shortcut = tuple(u.spec for u in units), ShortcutSpec("tensor" if summand else "none")
        if isinstance(chain.shortcut, UnitModules):
            shortcut = ShortcutSpec("projection", specs[-1], chain.avg_pool_spec())
        elif chain.shortcut == "pad":
            channels = units[-1].weight.shape[0]
            shortcut = ShortcutSpec("pad", stride=pair(chain.stride, "stride", 1), channels=channels)
        elif chain.shortcut is not None:
            shortcut = ShortcutSpec("identity")
        self.spec = ChainSpec(specs[: len(chain.units)], shortcut, chain.max_pool_spec())
        self.text = self.spec.encode()

    def extra_repr(self) -> str:
        return f"{self.name or '(model)'}, {self.block}, shortcut: {self.spec.shortcut.kind}"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if kwargs or len(args) != (self.spec.shortcut.kind == "tensor"):
            raise CalledOtherwise(self.name, f"{len(args) + len(kwargs)} arguments behind x")
        return _run_row([self], x, *args)


class Folded(nn.Module):
    """In the place of what is in a frozen chain of the module ``name``: no call but that module's may reach it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise CalledOtherwise(self.name, "a call of a module of its own by another")


class FrozenRow(nn.Sequential):
    """Frozen chains one after the other, run as one: what passes between them is theirs alone."""

    def forward(self, x: Tensor) -> Tensor:
        return _run_row(list(self), x)  # type: ignore[arg-type]


def _run_row(chains: Sequence[FrozenChain], x: Tensor, residual: Tensor | None = None) -> Tensor:
    params: list[Any] = [t for chain in chains for unit in chain for t in unit.tensors]  # type: ignore[union-attr]
    if chains[0].portable:
        return plain_chains(x, params, [chain.spec for chain in chains], residual)
    if graphed() and (torch.jit.is_tracing() or for_onnx()):
        tool = "torch.onnx.export" if for_onnx() else "torch.jit.trace"
        raise RuntimeError(f"{tool}: the operator of a frozen model is unknown there; use freeze(..., portable=True)")
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.fused_resnet.frozen(x, params, [chain.text for chain in chains], residual)
        return out
    if nn_module._has_any_global_hook():  # of a tool that looks at all operators, as PyTorch's counter of FLOPs
        return plain_chains(x, params, [chain.spec for chain in chains], residual)
    return run_chains(x, params, [chain.spec for chain in chains], residual)


class Frozen(nn.Module):
    """What ``freeze`` returns: x -> the model's output in ``dtype``, without gradients, in channels_last.

    Several threads may call it at once. ``graphs``: the CUDA graphs of its forward, or None. ``left``: the modules with
    chains that are as they were, for the example's forward called them otherwise.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, compute: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.dtype, self.compute, self.device = dtype, compute, device
        self.left: set[str] = set()
        self.graphs: Graphs | None = None
        self.eval()
        _leave_inference_mode(self)

    def train(self, mode: bool = True) -> Frozen:
        """Only ``eval()``.

        Raises:
            RuntimeError: asked to train; freeze copies the model, so train that and freeze again.
        """
        if mode:
            raise RuntimeError("train: this model is frozen for inference; train the one it was made from")
        super().train(False)
        return self

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` asks for.

        Raises:
            TypeError: always.
        """
        raise TypeError("torch.jit.script: a frozen model can't be; torch.jit.trace of freeze(..., portable=True) can")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        """Another device, or other memory: graphs of the present one are void.

        Raises:
            RuntimeError: another dtype, which freeze alone can give.
        """
        probe = fn(torch.empty(0, dtype=self.compute, device=self.device))
        if probe.dtype != self.compute:
            raise RuntimeError(
                f"dtype: frozen for {self.compute}, got {probe.dtype}; call freeze(..., dtype=...) again"
            )
        super()._apply(fn, recurse)
        _leave_inference_mode(self)
        self.device = probe.device
        if self.graphs is not None:
            self.graphs = Graphs() if probe.device.type == "cuda" else None
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Tensors may have been loaded to another device."""
        super().__setstate__(state)
        _leave_inference_mode(self)
        self.device = next((t.device for t in (*self.parameters(), *self.buffers())), self.device)

    def forward(self, x: Tensor) -> Any:
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"x: expected a floating-point tensor [N, C, H, W], got {_describe(x)}")
        if x.device != self.device:
            raise ValueError(f"x: expected a tensor on {self.device}, where this model is, got one on {x.device}")
        if torch.compiler.is_compiling():  # contexts would be operators of the graph
            return self._run(x.detach())
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self._run(x) if self.graphs is None else self.graphs(self._run, x)

    def _run(self, x: Tensor) -> Any:
        out = self.model(x.to(self.compute).contiguous(memory_format=torch.channels_last))
        return out.to(self.dtype) if isinstance(out, Tensor) else out

    def extra_repr(self) -> str:
        graphs = "" if self.graphs is None else f", {self.graphs}"
        return f"dtype={self.dtype}, computed in {self.compute}, on {self.device}{graphs}"


def _leave_inference_mode(model: nn.Module) -> None:
    """Puts ordinary copies in the place of tensors made in inference mode. PyTorch counts no changes of those, so a
    weight packed from one could be out of date."""
    copies: dict[Tensor, Tensor] = {}  # tied tensors stay tied
    with torch.inference_mode(False), torch.no_grad():
        for tensors in (table for m in model.modules() for table in (m._parameters, m._buffers)):
            for name, t in tensors.items():
                if t is not None and t.is_inference():
                    if t not in copies:
                        made = t.clone()
                        copies[t] = nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
                    tensors[name] = copies[t]  # type: ignore[assignment]


def _describe(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def freeze_copy(
    model: nn.Module,
    example: Tensor,
    dtype: torch.dtype | None,
    cuda_graph: bool,
    portable: bool,
    freeze_chains: FreezeChains,
    join: Callable[[nn.Module], None],
) -> Frozen:
    """See ``fused_resnet.freeze``; ``freeze_chains`` freezes the copy's chains, ``join`` puts together what then stands
    side by side."""
    if not isinstance(example, Tensor) or example.dim() != 4 or not example.is_floating_point():
        raise ValueError(f"example: expected a floating-point tensor [N, C, H, W], got {_describe(example)}")
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters()), example.dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    for name, value in (("cuda_graph", cuda_graph), ("portable", portable)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {value!r} of type {type(value).__name__}")
    if cuda_graph and example.device.type != "cuda":
        raise ValueError(f"cuda_graph: expected an example on a CUDA device, got one on {example.device}")
    compute = dtype
    if example.device.type == "cpu" and load("cpu")[0] is not None and not portable:
        compute = load("cpu")[0].compute_dtype(dtype)  # type: ignore[union-attr]
    left: set[str] = set()
    while True:
        frozen = _frozen_but(left, model, example, dtype, compute, portable, freeze_chains, join)
        try:
            frozen(example)  # packs the weights, measures where there is a choice, and shows at once what doesn't work
        except CalledOtherwise as call:
            left.add(call.name)
        else:
            break
    if cuda_graph:
        frozen.graphs = Graphs()
        frozen(example)
    return frozen


def _frozen_but(
    left: set[str],
    model: nn.Module,
    example: Tensor,
    dtype: torch.dtype,
    compute: torch.dtype,
    portable: bool,
    freeze_chains: FreezeChains,
    join: Callable[[nn.Module], None],
) -> Frozen:
    """A frozen copy of the model, but for the modules named ``left``."""
    copied = copy_of(model).eval()
    # folded from the parameters as they are, before the rest of the model is rounded
    replacements = list(freeze_chains(copied, compute, portable, left))
    copied.to(example.device, compute)
    for replace in replacements:
        copied = replace(copied)
    for _, m in named_modules(copied):
        if isinstance(m, FrozenChain):
            m.to(example.device)
        if type(m) is nn.Sequential and len(m) and all(isinstance(child, FrozenChain) for child in m):
            m.__class__ = FrozenRow
    join(copied)
    frozen = Frozen(copied, dtype, compute, example.device).requires_grad_(False)
    frozen.left = left
    return frozen
