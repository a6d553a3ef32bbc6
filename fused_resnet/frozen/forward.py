"""Frozen chains. BatchNorm is folded into the weights; each unit is a convolution followed by bias, residual and act.

    h_i = act_i(conv(h_{i-1}, W_i) + b_i),  h_0 = x        out = act_k(conv(h_{k-1}, W_k) + b_k + shortcut(x))

A first unit without a convolution computes W*h + b per channel. The summand may be a given tensor. A unit whose folded
weights would not fit in 16 bits (``fold_weight``) computes s*conv(h, W) + b instead, with s in a separate pass.

``run_chains`` runs chains one after the other on the backends that serve them. ``plain_chains`` does the same with
PyTorch's own operators.

A convolution's weight is a ``Weight`` (``chain/packing.py``), which its first use packs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet import reference
from fused_resnet.backends import BnAct, BnActMaxPool, Case, ConvBiasAct, Norm, forced, loaded, text_of, vector_dtype
from fused_resnet.backends.steps import AnyStep, Average, Excited, MaxPool, Recorded, ShortcutInput, Step
from fused_resnet.base.layouts import channels_last
from fused_resnet.chain.packing import Weight
from fused_resnet.frozen.folded import IDENTITY, FoldedChain, FoldedUnit
from fused_resnet.planner import pick, plan, run, sizes
from fused_resnet.spec import Act, PoolSpec, ShortcutSpec

# ---------------------------------------------------------------------------------------------------- timing
# key -> the algorithm of a unit; and the number of answers that are kept.
_served: dict[Any, str] = {}
_ASKED = 4096
# The answer for PyTorch's own operators.
_ATEN = "aten"
# The most units that pass through an image together.
_TOGETHER = 3
# The height and width of the image that brings a timed call's code into the cache, or a kernel's if that is larger.
_TWIN_SIZE = 16
# Seconds that one timed call of a unit should take: networks have some ten to a hundred units.
_CALL_S = 0.008


def _algorithm(x: Tensor, unit: FoldedUnit, residual: Tensor | None, pool: PoolSpec | None = None) -> str:
    """The fastest way to run a unit with its max-pool: an algorithm of the backend that serves it, or ``_ATEN``.

    On a CPU all ways are timed. "": nothing is timed, and the backend chooses.
    """
    if not x.is_cpu or not sizes.has_choice():
        return ""
    key = (x.shape, x.dtype, unit.weight.shape, unit.conv, unit.act, residual is None, pool, torch.get_num_threads())
    answer = _served.get(key)
    if answer is None:
        weight = Weight(unit.weight.borrowed()) if isinstance(unit.weight, Weight) else unit.weight
        unit = unit._replace(weight=weight, bias=unit.bias.detach())
        algorithms: Sequence[str] = ()
        if pool is None and unit.conv is not None and isinstance(weight, Weight):
            call = ConvBiasAct(x, weight.borrowed(), unit.bias, unit.conv, unit.act, residual)
            algorithms = pick(ConvBiasAct, call.case).algorithms(call)
        timed = _Measured(unit, residual is not None, pool, tuple(algorithms) or ("",))
        calls = partial(timed.calls, x.shape, x.dtype)
        found = sizes.faster(timed.signature(x), x.shape[0], calls, _CALL_S, sizes.TIE_TO_OURS)
        if len(_served) >= _ASKED:
            _served.clear()
        fastest = "" if found is sizes.CHAINS else timed.algorithms[found.which]
        _served[key] = answer = fastest if found.pays else _ATEN
    return answer


class _Measured(NamedTuple):
    """A unit for the timing, with random images and its own packed weights. It runs as in a row, in one call."""

    unit: FoldedUnit
    summand: bool
    pool: PoolSpec | None
    algorithms: tuple[str, ...]

    def signature(self, x: Tensor) -> str:
        weight = f"{text_of(self.unit.conv)} {'x'.join(map(str, self.unit.weight.shape))}"
        summand = "summand" if self.summand else "-"
        size, ways = sizes.size(x.shape, x.dtype), ", ".join(self.algorithms)
        return f"frozen {weight} {text_of(self.unit.act)} {summand} {text_of(self.pool)} {size} {ways}"

    def calls(self, shape: Sequence[int], dtype: torch.dtype, images: int) -> tuple[sizes.Call, ...]:
        x = sizes.images((images, *shape[1:]), dtype, True)
        weight = self.unit.weight.borrowed() if isinstance(self.unit.weight, Weight) else None
        twin, few = self, x
        if weight is not None and self.unit.conv is not None and self.pool is None:  # its code, with other weights
            twin = self._replace(unit=self.unit._replace(weight=Weight(weight.clone())))
            reach = zip(self.unit.conv.dilation, weight.shape[2:], strict=True)
            small = (slice(max(_TWIN_SIZE, dilation * (k - 1) + 1)) for dilation, k in reach)
            few = x[:1, :, *small].contiguous(memory_format=channels_last(x))
        pairs = zip(self._rows(x), twin._rows(few), strict=True)
        return tuple(sizes.Cold(call, partial(_run_and_read, before, x)) for call, before in pairs)

    def _rows(self, x: Tensor) -> list[sizes.Call]:
        """The unit by each of its algorithms, and by PyTorch's operators."""
        residual = sizes.images(self.unit.out_shape(x), x.dtype, True) if self.summand else None
        ways: list[Callable[[Do], _Plain]] = [partial(_Backends, measured=False, algorithm=a) for a in self.algorithms]
        return [self._row(way, x, residual) for way in (*ways, _Plain)]

    def _row(self, way: Callable[[Do], _Plain], x: Tensor, residual: Tensor | None) -> sizes.Call:
        def units(do: Do) -> Tensor:
            if self.pool is not None:
                out = way(do).pooled(x, self.unit, self.pool)
            else:
                out = way(do).unit(x, self.unit, residual, False)
            # one pixel of it leaves the row: the result itself is where results inside a row are
            pixel = ShortcutSpec("pad", stride=tuple(out.shape[2:]), channels=out.shape[1])
            return do(ShortcutInput(out, pixel))

        row = _recorded(x, residual, units)
        return partial(units, perform) if row is None else partial(row, x, residual)


def _run_and_read(call: sizes.Call, x: Tensor) -> None:
    call()
    x.sum()


Do = Callable[[AnyStep], Tensor]
# A row as one call of its input and its summand.
Row = Callable[[Tensor, Tensor | None], Tensor]


def perform(step: AnyStep) -> Tensor:
    """Runs a step."""
    if not isinstance(step, Step):
        return step.run()
    call, backend = step.call, step.backend
    if backend is None or step.packed is None or not isinstance(call, ConvBiasAct):
        out: Any = run(call) if backend is None else call.on(backend)  # type: ignore[misc]
        return out[0] if isinstance(call, BnActMaxPool) else out
    if step.pool is not None:
        return backend.conv_pooled(call, step.packed, step.pool)
    return backend.conv_packed(call, step.packed, step.owned)


class _Plain:
    """The steps of units on PyTorch's own operators.

    Args:
        do: what is done with each step: ``perform``, or it is recorded.
    """

    def __init__(self, do: Do) -> None:
        self.do = do

    def unit(self, x: Tensor, unit: FoldedUnit, residual: Tensor | None, owned: bool) -> Tensor:
        """A unit whose scale is folded, without its excitation. ``owned``: nothing else uses the residual, so its
        memory may be reused."""
        weight, bias, conv, act, *_ = unit
        if isinstance(weight, Tensor) or conv is None:
            return self.do(Step(BnAct(x, unit.norm, act, residual), loaded("aten")))
        return self.do(Step(ConvBiasAct(x, weight.own(), bias, conv, act, residual), loaded("aten")))

    def ahead(self, x: Tensor, units: Sequence[FoldedUnit]) -> None:
        """Tells of the units that follow on x."""

    def pooled(self, x: Tensor, unit: FoldedUnit, pool: PoolSpec) -> Tensor:
        """max-pool of the unit's output."""
        return self.do(MaxPool(self.unit(x, unit, None, True), pool))

    def excited(self, x: Tensor, unit: FoldedUnit) -> Tensor:
        """The unit's excitation of its output."""
        return x if unit.excitation is None else self.do(Excited(x, unit.excitation))

    def start(self, x: Tensor, shortcut: ShortcutSpec) -> Tensor:
        """x after a shortcut without parameters."""
        return self.do(ShortcutInput(x, shortcut)) if shortcut.kind == "pad" or shortcut.pool is not None else x


class _Backends(_Plain):
    """The steps of units on the backends that serve them, or on PyTorch's own operators if these are faster.

    Args:
        measured: whether the fastest way is chosen, PyTorch's operators among them. algorithm: the way otherwise.
    """

    def __init__(self, do: Do, measured: bool = True, algorithm: str = "") -> None:
        super().__init__(do)
        self.measured, self.algorithm = measured, algorithm

    def unit(self, x: Tensor, unit: FoldedUnit, residual: Tensor | None, owned: bool) -> Tensor:
        weight, bias, conv, act, *_ = unit
        if residual is not None:
            if residual.dtype != x.dtype or tuple(residual.shape) != unit.out_shape(x):
                # the add converts or broadcasts a summand, so it is PyTorch's add
                return self.broadcast(self.unit(x, unit._replace(act=IDENTITY), None, True), residual, act)
            residual = residual.contiguous(memory_format=channels_last(x))
        algorithm = self.algorithm_of(x, unit, residual)
        if algorithm == _ATEN:
            return super().unit(x, unit, residual, owned)
        if isinstance(weight, Tensor) or conv is None:
            return self.do(Step(BnAct(x, unit.norm, act, residual)))
        call = ConvBiasAct(x, weight.like, bias, conv, act, residual)
        backend = pick(ConvBiasAct, call.case)
        if not backend.packs:
            return self.do(Step(call.replace(weight=weight.own())))
        key = (backend.name, algorithm, x.shape, x.dtype)
        form = weight.packed(key, lambda own, known: backend.prepack(call.replace(weight=own), known, algorithm))
        call = call if form is not None else call.replace(weight=weight.own())
        return self.do(Step(call, backend, form, owned))

    def algorithm_of(self, x: Tensor, unit: FoldedUnit, residual: Tensor | None) -> str:
        return _algorithm(x, unit, residual) if self.measured else self.algorithm

    def broadcast(self, z: Tensor, residual: Tensor, act: Act) -> Tensor:
        """act(z + residual), with a summand of another shape or dtype."""
        return reference.act(z + residual, act)

    def pooled(self, x: Tensor, unit: FoldedUnit, pool: PoolSpec) -> Tensor:
        """max-pool of the unit's output, in one pass if the backend has such a pass."""
        weight, bias, conv, act, *_ = unit
        if self.measured and _algorithm(x, unit, None, pool) == _ATEN:
            return self.do(MaxPool(super().unit(x, unit, None, True), pool))
        if isinstance(weight, Tensor) or conv is None:
            return self.do(Step(BnActMaxPool(x, unit.norm, act, pool)))
        call = ConvBiasAct(x, weight.like, bias, conv, act, None)
        backend = pick(ConvBiasAct, call.case)
        if backend.packs:
            key = (backend.name, x.dtype, pool)
            stem = weight.packed(key, lambda own, _: backend.prepack_pooled(call.replace(weight=own), pool))
            if stem is not None:
                return self.do(Step(call, backend, stem, pool=pool))
        h = _Backends(self.do, measured=False).unit(x, unit, None, True)
        one = torch.ones(h.shape[1], dtype=vector_dtype(h.dtype), device=h.device)
        zero = torch.zeros_like(one)
        return self.do(Step(BnActMaxPool(h, Norm(one, zero, zero, zero), IDENTITY, pool)))


_PLAIN, _SERVED = _Plain(perform), _Backends(perform)


# ---------------------------------------------------------------------------------------------------- recording
class _Recorder:
    """Records a row's steps instead of running them. Results stand for themselves: they have a shape and no values."""

    def __init__(self, x: Tensor, summand: Tensor | None) -> None:
        self.results: list[Tensor | None] = [x, summand]
        self.steps: list[Recorded] = []
        self.memory = x.new_empty(0)  # of all results, which nobody reads or writes

    def add(self, step: AnyStep) -> Tensor:
        call = step.call if isinstance(step, Step) else step
        residual = call.residual if isinstance(call, ConvBiasAct | BnAct) else None
        x = call.y if isinstance(call, BnAct | BnActMaxPool) else call.x
        self.steps.append(Recorded(step, self._place(x), None if residual is None else self._place(residual)))
        n, c, h, w = self._shape(step)
        if self.memory.numel() < n * c * h * w:
            self.memory = x.new_empty(n * c * h * w)
        out = self.memory[: n * c * h * w].view(n, h, w, c).permute(0, 3, 1, 2)
        self.results.append(out)
        return out

    def _place(self, t: Tensor) -> int:
        return next(i for i, known in enumerate(self.results) if known is t)

    @staticmethod
    def _shape(step: AnyStep) -> Sequence[int]:
        if isinstance(step, Excited):
            return step.x.shape
        if not isinstance(step, Step):
            return step._replace(x=step.x.to("meta")).run().shape
        call, pool = step.call, step.pool
        if isinstance(call, ConvBiasAct):
            shape = call.conv.out_shape(call.x.shape, call.weight.shape)
        else:
            shape = tuple(call.y.shape)
            pool = call.pool if isinstance(call, BnActMaxPool) else None
        return MaxPool(torch.empty(shape, device="meta"), pool).run().shape if pool is not None else shape


class _Recordable(_Backends):
    """The steps of units that are recorded.

    Raises:
        LookupError: by ``broadcast``, which no backend takes.
    """

    def __init__(self, do: Do) -> None:
        super().__init__(do)
        self.together: dict[int, str] = {}  # by a unit's id, the algorithm by which it runs together with others

    def ahead(self, x: Tensor, units: Sequence[FoldedUnit]) -> None:
        excited = next((i for i, unit in enumerate(units) if unit.excitation is not None), len(units))
        units = units[: excited + 1]
        convs = [unit.conv for unit in units if unit.conv is not None and unit.scale is None]
        if len(convs) < len(units) or id(units[0]) in self.together:
            return
        weights = [unit.weight.like for unit in units if isinstance(unit.weight, Weight)]
        algorithms = pick(BnAct, Case.of(x)).in_bands(x, weights, convs)
        self.together |= {id(unit): algorithm for unit, algorithm in zip(units, algorithms)}

    def algorithm_of(self, x: Tensor, unit: FoldedUnit, residual: Tensor | None) -> str:
        return self.together.get(id(unit)) or super().algorithm_of(x, unit, residual)

    def broadcast(self, z: Tensor, residual: Tensor, act: Act) -> Tensor:
        raise LookupError("a summand that is broadcast")


def _recorded(x: Tensor, residual: Tensor | None, units: Callable[[Do], Tensor]) -> Row | None:
    """The row as one call of the backend that serves it, or None. ``units``: does its steps, given what does one."""
    if x.dim() != 4:
        return None
    recorder = _Recorder(x, residual)
    try:
        units(recorder.add)
    except LookupError:
        return None
    return pick(BnAct, Case.of(x)).frozen_row(recorder.steps)


# ---------------------------------------------------------------------------------------------------- chains
def _begun(x: Tensor, unit: FoldedUnit, ways: _Plain) -> tuple[Tensor, FoldedUnit]:
    """What is left of a unit with a scale after its convolution, and its input; the whole unit if it has none."""
    if unit.scale is None:
        return x, unit
    conv = unit._replace(bias=torch.zeros_like(unit.bias), act=IDENTITY, scale=None)
    return ways.unit(x, conv, None, True), FoldedUnit(unit.scale, unit.bias, None, unit.act)


def _sum(unit: FoldedUnit) -> FoldedUnit:
    """A unit that only adds a residual and applies the unit's activation."""
    one = torch.ones(unit.bias.numel(), dtype=vector_dtype(unit.weight.dtype), device=unit.bias.device)
    return FoldedUnit(one, torch.zeros_like(one), None, unit.act)


def _excited(x: Tensor, unit: FoldedUnit, ways: _Plain) -> Tensor:
    """A unit without a residual, and its excitation."""
    return ways.excited(ways.unit(*_begun(x, unit, ways), None, True), unit)


def _chain(x: Tensor, chain: FoldedChain, residual: Tensor | None, owned: bool, ways: _Plain) -> Tensor:
    """``residual``: the given summand. ``owned``: nothing else uses x, so its memory may be reused."""
    spec, units, average = chain
    if average:
        x = ways.do(Average(x))
    kind = spec.shortcut.kind
    *before, last = units[: len(spec.units)]
    h = x
    for i, unit in enumerate(before):
        ways.ahead(h, units[i : min(i + _TOGETHER, len(spec.units))])
        h = _excited(h, unit, ways)
    if spec.pool is not None:  # a chain closed by a pool has no shortcut
        return ways.pooled(*_begun(h, last, ways), spec.pool)
    if kind not in ("none", "tensor"):
        residual = ways.start(x, spec.shortcut)
    if spec.shortcut.unit is not None:
        assert residual is not None
        residual = ways.unit(*_begun(residual, units[-1], ways), None, True)
    if last.excitation is not None:
        if residual is None:
            return _excited(h, last, ways)
        h, last = _excited(h, last._replace(act=IDENTITY), ways), _sum(last)
    free = kind in ("projection", "pad") or (kind == "identity" and owned and h is not x)
    return ways.unit(*_begun(h, last, ways), residual, free)


def _chains(x: Tensor, chains: Sequence[FoldedChain], residual: Tensor | None, ways: _Plain) -> Tensor:
    for i, chain in enumerate(chains):
        x = _chain(x, chain, residual if i == 0 else None, i > 0, ways)
    return x


def run_chains(
    x: Tensor, chains: Sequence[FoldedChain], residual: Tensor | None = None, known: dict[Any, Row | None] | None = None
) -> Tensor:
    """Runs the chains on the backends that serve them.

    Args:
        x: [N, C, H, W] or [N, C, D, H, W]. chains: any number; each takes the output of the one before.
        residual: the summand of a first chain whose shortcut is "tensor".
        known: the chains as one call each, for inputs that came before; None: units run one by one.

    Returns:
        The last one's output, channels_last, x's dtype.

    Raises:
        ValueError: x does not have the channels of the first weight.
    """
    first = chains[0].units[0]
    channels = first.weight.shape[0] if first.conv is None else first.weight.shape[1] * first.conv.groups
    if x.shape[1] != channels:
        raise ValueError(f"x: expected {channels} channels, got shape {tuple(x.shape)}")
    if x.numel() == 0:
        return plain_chains(x, chains, residual)
    # a model's own operations may pass a slice, but packed weights expect dense tensors
    x = x.contiguous(memory_format=channels_last(x))
    if residual is not None and residual.dim() == x.dim():
        residual = residual.contiguous(memory_format=channels_last(x))
    return _served_row(x, chains, residual, known)


def _served_row(
    x: Tensor, chains: Sequence[FoldedChain], residual: Tensor | None, known: dict[Any, Row | None] | None
) -> Tensor:
    """Runs a row as one call if its backend takes such calls."""
    if known is None or forced() is not None or not x.is_cpu or plan() == "measure":
        return _chains(x, chains, residual, _SERVED)
    summand = None if residual is None else (residual.shape, residual.dtype)
    key = (x.shape, summand, sizes.has_choice(), torch.get_num_threads(), torch.get_float32_matmul_precision())
    if key not in known:
        if len(known) >= _ASKED:
            known.clear()
        known[key] = _recorded(x, residual, lambda do: _chains(x, chains, residual, _Recordable(do)))
    row = known[key]
    return _chains(x, chains, residual, _SERVED) if row is None else row(x, residual)


def plain_chains(x: Tensor, chains: Sequence[FoldedChain], residual: Tensor | None = None) -> Tensor:
    """``run_chains`` with PyTorch's own operators, for runtimes that have no others."""
    return _chains(x, chains, residual, _PLAIN)
