"""fuse, unfuse, freeze: the blocks of a model that exists, run as chains and back again.

``fuse`` changes a module's class to a subclass of its own class whose forward runs the module's own children as chains
(and what isn't a chain as it was). Nothing is copied or renamed: parameters, buffers, names, hooks on the module,
isinstance and pickling stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fused_resnet.backends import warn_once
from fused_resnet.freezing import Frozen, FrozenChain, FrozenStage, FrozenTrunk, freeze_copy
from fused_resnet.modules import ChainModules, has_hooks, run_row
from fused_resnet.patterns import original

if TYPE_CHECKING:
    from fused_resnet.plans import Plan

# The stages that belong to the trunk of a frozen model, by the size of their tensors in the paper's networks.
_TRUNK_STAGES = 2


# ---------------------------------------------------------------------------------------------------- fused classes
class FusedModule:
    """What a fused class adds to the class it was made from.

    Attributes:
        _fr_original: that class. _fr_method: what of it is overridden, _fr_plain: and the original.
        _fr_plans: of the module: its plans in eval and in train mode.
        _fr_frozen: of a module inside a frozen model: number of a chain -> the frozen chain.
    """

    _fr_original: type[nn.Module]
    _fr_method: str
    _fr_plain: Callable[..., Any]
    _fr_plans: tuple[Plan, Plan]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__()
        return _rebuild, (self._fr_original, self._fr_method), state


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
    for blocks in rows_of(children):
        chains = [chain for _, chain in blocks if chain is not None]
        x = run_row(chains, x) if len(chains) > 1 else blocks[0][0](x)
    return x


def rows_of(children: Iterable[nn.Module]) -> list[list[tuple[nn.Module, ChainModules | None]]]:
    """The children as they run now: rows of blocks with their chains, and those called alone."""
    rows: list[list[tuple[nn.Module, ChainModules | None]]] = []
    for m in children:
        chain = _row_chain(m)
        # a block that comes twice finds its running statistics updated the second time
        if chain is not None and rows and rows[-1][0][1] is not None and all(m is not other for other, _ in rows[-1]):
            rows[-1].append((m, chain))
        else:
            rows.append([(m, chain)])
    return rows


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
    return plans[m.training] if plans is not None and isinstance(m, FusedModule) else None


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
        # a slice of an nn.Sequential is made by the class, without a plan
        if plan is None or len(args) != 1 or kwargs or not plan.fits(args[0]):
            return plain(self, *args, **kwargs)
        frozen = self._modules.get("_fr_frozen")
        chains, reason = ([], None) if frozen is not None else plan.modules(self)
        if reason is not None:
            if not torch.compiler.is_compiling():
                warn_once(f"a fused {cls.__name__} runs plain: {reason}")
            return plain(self, *args)
        return plan.run(self, args[0], chains if frozen is None else list(frozen), run_children)

    added = {"_fr_original": cls, "_fr_method": method, "_fr_plain": plain, method: forward, "__module__": __name__}
    return type(f"Fused{cls.__name__}", (FusedModule, cls), added)


# ---------------------------------------------------------------------------------------------------- fuse and back
def fuse(model: nn.Module) -> nn.Module:
    """Swaps every module of ``model`` whose forward has chains in it for a fused one, in place, and returns it.

    Parameters, buffers, names, ``state_dict``, optimizers made before or after, hooks on the blocks: everything stays.
    A module is fused by what its forward does, which is traced (``torch.fx``, one module at a time, nothing is
    computed): residual blocks, stems, and conv -> norm -> act wherever it stands; what isn't a chain runs as it was.
    A forward that can't be traced stays as it is; ``explain`` says why. An nn.Sequential of blocks becomes one that
    runs them in rows. Fusing twice changes nothing.

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
    m.__class__ = m._fr_original
    m.__dict__.pop("_fr_plans", None)


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


# ---------------------------------------------------------------------------------------------------- freeze
def freeze(model: nn.Module, example: Tensor, *, dtype: torch.dtype | None = None) -> Frozen:
    """A copy of ``model`` for inference only: BatchNorm folded into the weights, weights prepacked for ``example``.

    Args:
        model: in any mode; it is not changed. Running statistics are used as they are now.
        example: an input, [N, C, H, W] on the device to run on; other batch sizes work too.
        dtype: float32, bfloat16 or float16, the dtype of the result; None keeps the parameters' dtype. A CPU without a
            fast 16-bit matrix unit computes 16-bit models in float32 (see ``fused-resnet env``).

    Returns:
        A module whose forward takes x and returns what ``model.eval()(x)`` would, without gradients.

    Raises:
        TypeError, ValueError: a model that is no nn.Module, an example that is no [N, C, H, W] floating tensor, a
            dtype that is not floating.
    """
    _check(model)
    return freeze_copy(model, example, dtype, _freeze_chains, _join_trunks)


def _freeze_chains(copied: nn.Module, compute: torch.dtype) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """For each module with chains, how its frozen version takes its place in the model (which it may be itself)."""
    from fused_resnet.analysis import analyse

    for found in analyse(unfuse(copied)):
        if found.plans is None:
            continue
        m, plan = found.module, found.plans[False]
        chains = [chain.modules(m) for chain in plan.chains]
        if not chains or any(u.bn.running_mean is None for chain in chains for u in chain.all_units):
            continue
        frozen = [FrozenChain(chain, compute) for chain in chains]
        if plan.whole is not None:
            yield partial(_replaced, found.name, frozen[0])
        else:
            yield partial(_installed, m, plan, found.method, frozen)


def _replaced(name: str, chain: nn.Module, model: nn.Module) -> nn.Module:
    """The chain in the place of the module that it is all of."""
    if not name:
        return chain
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, chain)
    return model


def _installed(m: nn.Module, plan: Plan, method: str, chains: Sequence[FrozenChain], model: nn.Module) -> nn.Module:
    """``m`` runs its plan with frozen chains, and what they replace is gone."""
    m.__class__ = _fused_class(type(m), method)
    m.__dict__["_fr_plans"] = (plan, plan)
    m.add_module("_fr_frozen", nn.ModuleList(chains))
    for unit in (u for chain in plan.chains for u in chain.all_units):
        for path in (unit.conv, unit.bn):
            if path is not None:
                _set(m, path, nn.Identity())
    return model


def _set(m: nn.Module, path: Sequence[str], child: nn.Module) -> None:
    setattr(m.get_submodule(".".join(path[:-1])), path[-1], child)


def _join_trunks(model: nn.Module) -> None:
    """Puts a stem and the first stages behind it into one module in the stem's place; the stages become identities."""
    for m in model.modules():
        plan = plan_of(m)
        if plan is None or "_fr_frozen" not in m._modules:
            continue
        chains: Any = m._modules["_fr_frozen"]
        for stem, behind in zip(plan.steps, plan.steps[1:], strict=False):
            if stem.kind != "chain" or plan.chains[stem.target].max_pool is None or behind.kind != "children":
                continue
            if stem.name not in behind.dead or len(behind.args) != 1 or behind.kwargs:
                continue
            joined = [chains[stem.target]]
            for path in behind.target[:_TRUNK_STAGES]:
                stage = m.get_submodule(".".join(path))
                if not isinstance(stage, FrozenStage) or has_hooks(stage):
                    break
                joined.append(stage)
                _set(m, path, nn.Identity())
            chains[stem.target] = FrozenTrunk(*joined)
