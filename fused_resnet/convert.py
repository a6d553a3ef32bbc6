"""fuse, unfuse, freeze: the blocks of a model that exists, run as chains and back again.

``fuse`` changes a module's class to a subclass of its own class whose forward runs the module's own children as chains
(and what isn't a chain as it was). Nothing is copied or renamed: parameters, buffers, names, hooks on the module,
isinstance and pickling stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial, wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_resnet.backends import warn_once
from fused_resnet.freezing import CalledOtherwise, Folded, Frozen, FrozenChain, FrozenRow, freeze_copy, why_not_frozen
from fused_resnet.functional import in_backward
from fused_resnet.modules import ChainModules, has_hooks, run_row
from fused_resnet.patterns import original
from fused_resnet.plans import Plan, Ref, at
from fused_resnet.small import is_small

if TYPE_CHECKING:
    from fused_resnet.analysis import Found

# The stages that belong to the stem's row, by the size of their tensors in the paper's networks.
_STEM_STAGES = 2


# ---------------------------------------------------------------------------------------------------- fused classes
class FusedModule:
    """What a fused class adds to the class it was made from.

    Attributes:
        _fr_original: that class. _fr_method: what of it is overridden, _fr_plain: and the original.
        _fr_plans: of the module: its plans in eval and in train mode.
        _fr_name, _fr_frozen: of a module inside a frozen model: its name; number of a chain -> the frozen chain's path.
    """

    _fr_original: type[nn.Module]
    _fr_method: str
    _fr_plain: Callable[..., Any]
    _fr_plans: tuple[Plan, Plan]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__()
        return _rebuild, (self._fr_original, self._fr_method), state

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` asks for.

        Raises:
            TypeError: always.
        """
        raise TypeError("torch.jit.script: TorchScript can't hold chains; fused_resnet.unfuse(model), then script it")


def _rebuild(cls: type[nn.Module], method: str) -> nn.Module:
    """Unpickling and deepcopy: an empty module of the fused class."""
    fused: Any = _fused_class(cls, method)
    made: nn.Module = fused.__new__(fused)
    return made


class FusedSequential(FusedModule, nn.Sequential):
    """A stage of a network: consecutive blocks that can run as chains run as one row of chains, as long as nobody could
    tell that they are not called themselves; everything else is called as by any nn.Sequential."""

    _fr_original = nn.Sequential
    _fr_method = "rows"
    _fr_plain = nn.Sequential.forward

    def forward(self, input: Any) -> Any:
        return run_children(self, input)


def run_children(children: Iterable[nn.Module], x: Any) -> Any:
    """One after the other, rows of blocks as rows of chains."""
    rest = list(children)
    while rest:
        blocks = _next_row(rest, x) if _runs_chains(x) else [(rest[0], None)]
        chains = [chain for _, chain in blocks if chain is not None]
        x = run_row(chains, x) if len(chains) > 1 else blocks[0][0](x)
        rest = rest[len(blocks) :]
    return x


def _runs_chains(x: Any) -> bool:
    """Not lists of tensors, nor what torch.fx or torch.jit.trace hands on: their graphs are the plain model's."""
    return isinstance(x, Tensor) and not torch.jit.is_tracing()


def rows_of(children: Iterable[nn.Module]) -> list[list[tuple[nn.Module, ChainModules | None]]]:
    """The children as they run on large images: rows of blocks with their chains, and those called alone."""
    rest, rows = list(children), []
    while rest:
        rows.append(_next_row(rest, None))
        rest = rest[len(rows[-1]) :]
    return rows


def _next_row(modules: Sequence[nn.Module], x: Any) -> list[tuple[nn.Module, ChainModules | None]]:
    """The first of them, with its chain and all that run in a row with it when it is given x; None: a large image."""
    row: list[tuple[nn.Module, ChainModules | None]] = []
    share = 1.0  # of x's values that are left where the next block begins
    for m in modules:
        plan = plan_of(m)
        if plan is not None and _is_small(m, plan, x, share):
            return row or [(m, None)]
        chain = _row_chain(m)
        # a block that comes twice finds its running statistics updated the second time
        if row and (chain is None or any(m is other for other, _ in row)):
            return row
        row.append((m, chain))
        if plan is None or chain is None:
            return row
        share *= plan.out
    return row


def _row_chain(m: nn.Module) -> ChainModules | None:
    """The chain of a block which nothing but its own forward would see called; else None."""
    plan = plan_of(m)
    whole = plan.whole if plan is not None else None
    if plan is None or whole is None or whole.units[0].conv is None or whole.max_pool is not None:
        return None
    own = type(m) is _FUSED.get((original(m), "forward")) and type(m).__call__ is nn.Module.__call__
    if not own or has_hooks(m) or "forward" in m.__dict__ or m._compiled_call_impl is not None:
        return None
    chains, reason = plan.modules(m)
    return chains[0] if reason is None else None


def plan_of(m: nn.Module) -> Plan | None:
    """What a fused module's forward does in its mode."""
    plans = m.__dict__.get("_fr_plans")
    if plans is None or not isinstance(m, FusedModule):
        return None
    evaluating, training = plans  # torch.compile of 2.11 can't index with a bool
    return training if m.training else evaluating


_FUSED: dict[tuple[type, str], Any] = {(nn.Sequential, "rows"): FusedSequential}


def _fused_class(cls: type, method: str) -> type:
    """The subclass of ``cls`` whose ``method`` runs a plan; one per class, method and process."""
    if (cls, method) not in _FUSED:
        _FUSED[cls, method] = _make_fused_class(cls, method)
    return _FUSED[cls, method]


def _make_fused_class(cls: Any, method: str) -> type:
    plain = getattr(cls, method)

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(self)
        frozen = self.__dict__.get("_fr_frozen")
        # a slice of an nn.Sequential is made by the class, without a plan
        if plan is None or len(args) != 1 or kwargs or not plan.fits(args[0]):
            if frozen is not None:
                raise CalledOtherwise(self._fr_name, "other arguments, or of another class or size")
            return plain(self, *args, **kwargs)
        if frozen is None and (torch.jit.is_tracing() or _is_small(self, plan, args[0])):
            return _own_forward(self, plan, args[0])
        chains, reason = ([], None) if frozen is not None else plan.modules(self)
        if reason is not None:
            if not torch.compiler.is_compiling():
                warn_once(f"a fused {cls.__name__} runs plain: {reason}")
            return plain(self, *args)
        return plan.run(self, args[0], chains if frozen is None else [at(self, p) for p in frozen], run_children)

    added = {"_fr_original": cls, "_fr_method": method, "_fr_plain": plain, method: forward, "__module__": __name__}
    return type(f"Fused{cls.__name__}", (FusedModule, cls), added)


def _is_small(m: nn.Module, plan: Plan, x: Any, share: float = 1.0) -> bool:
    """Whether the module had better run its own forward on ``share`` of x's values (``small.py``); never, among
    processes, with a SyncBatchNorm, whose own forward refuses a CPU."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return False
    kind = "training" if torch.is_grad_enabled() else "evaluation"
    if not is_small(x, x.numel() * share * plan.values, kind):
        return False
    among_others = dist.is_available() and dist.is_initialized()
    return not (among_others and any(type(bn) is nn.SyncBatchNorm for bn in _norms(m, plan)))


def _norms(m: nn.Module, plan: Plan) -> list[Any]:
    return [at(m, unit.bn) for chain in plan.chains for unit in chain.all_units]


def _own_forward(m: Any, plan: Plan, x: Any) -> Any:
    """What the module did before it was fused; a forward inside a backward updates no statistics, as in a chain."""
    if not (m.training and in_backward()):
        return m._fr_plain(x)
    kept = [(b, b.clone()) for bn in _norms(m, plan) for b in bn.buffers(recurse=False)]
    try:
        return m._fr_plain(x)
    finally:
        for buffer, value in kept:
            buffer.data.copy_(value)  # the backward to come has kept it, and asks for its version


@lru_cache
def _unfused_class(cls: Any) -> type:
    """``cls`` without what ``fuse`` put into it, also where others derived a class from the fused one since, as
    torch.distributed.fsdp.fully_shard does."""
    if "_fr_original" in vars(cls):
        original: type = cls._fr_original
        return original
    bases = tuple(_unfused_class(base) if issubclass(base, FusedModule) else base for base in cls.__bases__)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__.replace("Fused", "", 1), bases, own)


# ---------------------------------------------------------------------------------------------------- fuse and back
def fuse(model: nn.Module) -> nn.Module:
    """Swaps every module of ``model`` whose forward has chains in it for a fused one, in place, and returns it.

    Parameters, buffers, names, ``state_dict``, optimizers made before or after, hooks on the blocks: everything stays.
    A module is fused by what its forward does, which is traced (``torch.fx``, one module at a time, nothing is
    computed): residual blocks, stems, and conv -> norm -> act wherever it stands; what isn't a chain runs as it was.
    A forward that can't be traced stays as it is; ``explain`` says why. An nn.Sequential of blocks becomes one that
    runs them in rows. Fusing twice changes nothing. SyncBatchNorm and DistributedDataParallel may come before or after;
    a SyncBatchNorm in a chain shares its statistics with the other processes of its group on any device.

    Args:
        model: any module: of torchvision, timm, transformers, of this package or your own.

    Returns:
        The same ``model``.

    Raises:
        TypeError: not an nn.Module.
    """
    from fused_resnet.analysis import analyse  # late: not every import of the package fuses

    _check(model)
    found = False
    for each in analyse(model):
        m = each.module
        if each.plans is not None:
            found = True
            if not isinstance(m, FusedModule) or m._fr_method != each.method:
                m.__class__ = _fused_class(original(m), each.method)
            m.__dict__["_fr_plans"] = each.plans
        elif isinstance(m, FusedModule) and not isinstance(m, FusedSequential) and each.within is not None:
            _unfuse(m)
    for m in model.modules():
        if type(m) is nn.Sequential and any(len(blocks) > 1 for blocks in rows_of(m)):
            m.__class__ = FusedSequential
    if not found:
        warn_once(f"fuse: nothing in this {type(model).__name__} could be fused; print(fused_resnet.explain(model))")
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every fused module of ``model`` its own class back, in place, and returns it.

    Raises:
        TypeError: not an nn.Module.
    """
    _check(model)
    for m in model.modules():
        if isinstance(m, FusedModule):
            _unfuse(m)
    return model


def _unfuse(m: Any) -> None:
    cls: Any = type(m)
    m.__class__ = _unfused_class(cls)
    m.__dict__.pop("_fr_plans", None)


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


# ---------------------------------------------------------------------------------------------------- freeze
def freeze(
    model: nn.Module,
    example: Tensor,
    *,
    dtype: torch.dtype | None = None,
    cuda_graph: bool = False,
    portable: bool = False,
) -> Frozen:
    """A copy of ``model`` for inference only: BatchNorm folded into the weights, weights prepacked for ``example``.

    Args:
        model: in any mode; it is not changed. Running statistics are used as they are now. What can't be frozen stays
            as it is, in eval mode; ``explain`` of the result says why.
        example: an input, [N, C, H, W] on the device to run on; other batch and image sizes work too, each packs its
            weights at its first call where it needs another layout of them.
        dtype: float32, bfloat16 or float16, the dtype of the result; None keeps the parameters' dtype. A CPU without a
            fast 16-bit matrix unit computes 16-bit models in float32 (see ``fused-resnet env``).
        cuda_graph: start the forward as one CUDA graph per input shape (the first 8; other shapes run without one). The
            result is a copy, the caller's own. A model that can't be recorded runs without, with a warning.
        portable: made of PyTorch's own operators alone, so that what ``torch.export`` makes of it runs where
            fused_resnet is not installed; in ``dtype`` on every machine.

    Returns:
        A module whose forward takes x and returns what ``model.eval()(x)`` would, without gradients. Threads may call
        it at once. ``torch.export`` takes it, with dynamic shapes too. Where a forward branches on its arguments or on
        its input's size, the example decides: an input that takes another branch raises RuntimeError.

    Raises:
        TypeError, ValueError: a model that is no nn.Module, an example that is no [N, C, H, W] floating tensor, a
            dtype that is not floating, cuda_graph with an example that is not on a CUDA device.
    """
    _check(model)
    return freeze_copy(model, example, dtype, cuda_graph, portable, _freeze_chains, _join_stages)


def _freeze_chains(
    copied: nn.Module, compute: torch.dtype, portable: bool, left: set[str]
) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """For each module with chains, how its frozen version takes its place in the model (which it may be itself)."""
    from fused_resnet.analysis import analyse

    for found in analyse(unfuse(copied)):
        if found.plans is None or found.name in left:
            continue
        m, plan, block = found.module, found.plans[False], type(found.module).__name__
        chains = [chain.modules(m) for chain in plan.chains]
        if not chains or any(map(why_not_frozen, chains)):
            continue
        frozen = [
            FrozenChain(found.name, block, chain, paths.shortcut == "tensor", compute, portable)
            for chain, paths in zip(chains, plan.chains, strict=True)
        ]
        if plan.whole is not None and found.method == "forward":
            yield partial(_replaced, found.name, frozen[0])
        else:
            yield partial(_installed, m, plan, found, frozen)


def _replaced(name: str, chain: nn.Module, model: nn.Module) -> nn.Module:
    """The chain in the place of the module that it is all of."""
    if not name:
        return chain
    _set(model, name.split("."), chain)
    return model


def _installed(m: nn.Module, plan: Plan, found: Found, chains: Sequence[FrozenChain], model: nn.Module) -> nn.Module:
    """``m`` runs its plan with frozen chains, each in the place of the first module that it replaces."""
    m.__class__ = _fused_class(type(m), found.method)
    m.__dict__["_fr_name"] = found.name
    m.__dict__["_fr_plans"] = (plan, plan)
    m.__dict__["_fr_frozen"] = tuple(chain.units[0].paths[0] for chain in plan.chains)
    for unit in (u for chain in plan.chains for u in chain.all_units):
        for path in (unit.conv, unit.bn):
            if path is not None:
                _set(m, path, Folded(found.name))
    for path, chain in zip(m.__dict__["_fr_frozen"], chains, strict=True):
        _set(m, path, chain)
    return model


def _set(m: nn.Module, path: Sequence[str], child: nn.Module) -> None:
    setattr(m.get_submodule(".".join(path[:-1])), path[-1], child)


def _join_stages(model: nn.Module) -> None:
    """Puts a stem and the first stages behind it into one row in the stem's place."""
    for m in model.modules():
        plan, frozen = plan_of(m), m.__dict__.get("_fr_frozen")
        if plan is None or frozen is None:
            continue
        steps = list(plan.steps)
        for i, (stem, behind) in enumerate(zip(plan.steps, plan.steps[1:], strict=False)):
            if stem.kind != "chain" or len(stem.args) != 1 or behind.kind != "children" or behind.kwargs:
                continue
            if behind.args != (Ref(stem.name),) or stem.name not in behind.dead:
                continue
            joined, taken = [at(m, frozen[stem.target])], []
            for path in behind.target[:_STEM_STAGES]:
                stage = at(m, path)
                if not isinstance(stage, FrozenRow) or has_hooks(stage):
                    break
                joined += stage
                taken.append(path)
            for path in taken:
                _set(m, path, Folded(m.__dict__["_fr_name"]))
            _set(m, frozen[stem.target], FrozenRow(*joined))
            steps[i + 1] = replace(behind, target=behind.target[len(taken) :])
        m.__dict__["_fr_plans"] = (replace(plan, steps=tuple(steps)),) * 2


from fused_resnet.fusion.swap import fuse, unfuse  # noqa
