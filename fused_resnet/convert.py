"""freeze: a copy of a model for inference, whose modules run their chains with BatchNorm folded into the weights.

A module with chains gets a class whose forward runs the module's plan: its frozen chains, and what isn't a chain as it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fused_resnet.classes import KINDS, PLANNED, fused_class, set_class
from fused_resnet.freezing import CalledOtherwise, Folded, Frozen, FrozenChain, FrozenRow, freeze_copy, why_not_frozen
from fused_resnet.fusion.swap import unfuse
from fused_resnet.modules import has_hooks, named_modules
from fused_resnet.patterns import METHODS
from fused_resnet.plans import Plan, Ref, at

if TYPE_CHECKING:
    from fused_resnet.analysis import Found

# The stages that belong to the stem's row, by the size of their tensors in the paper's networks.
_STEM_STAGES = 2


# ---------------------------------------------------------------------------------------------------- planned classes
def _planned_method(method: str, cls: Any) -> dict[str, Any]:
    """Of a module in a frozen model: ``method`` runs the module's plan (``_fr_plan``) with the frozen chains at the
    paths ``_fr_frozen``; ``_fr_name``: the module's name."""
    plain = getattr(cls, method)

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan: Plan | None = self.__dict__.get("_fr_plan")
        if plan is None:
            return plain(self, *args, **kwargs)  # a slice of an nn.Sequential is made by the class, without a plan
        if len(args) != 1 or kwargs or not plan.fits(args[0]):
            raise CalledOtherwise(self._fr_name, "other arguments, or of another class or size")
        return plan.run(self, args[0], [at(self, p) for p in self._fr_frozen], _one_after_the_other)

    return {method: forward}


KINDS.update((PLANNED + method, partial(_planned_method, method)) for method in METHODS)


def _one_after_the_other(children: Sequence[nn.Module], x: Any) -> Any:
    for child in children:
        x = child(x)
    return x


def plan_of(m: nn.Module) -> Plan | None:
    """What a module of a frozen model does in its forward."""
    return m.__dict__.get("_fr_plan")


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
    set_class(m, fused_class(type(m), PLANNED + found.method))
    m.__dict__["_fr_name"] = found.name
    m.__dict__["_fr_plan"] = plan
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
    for _, m in named_modules(model):
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
        m.__dict__["_fr_plan"] = replace(plan, steps=tuple(steps))
