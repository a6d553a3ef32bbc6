"""Frozen: a copy of a model for inference, whose captured graphs run rows of chains with BatchNorm folded.

The copy keeps its children and its forward. Dynamo captures it once per kind of call, like the forward of a fused
model, and guards all that it read. Tools that record a graph of their own see the plain network in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_iter, tree_map_only

from fused_resnet.chain.packing import values_of
from fused_resnet.frozen.cuda_graphs import Graphs
from fused_resnet.frozen.rows import lower_frozen
from fused_resnet.fusion.front import BACKWARD_HOOKS, Front
from fused_resnet.fusion.inspection import graphed
from fused_resnet.fusion.matches import Matches
from fused_resnet.fusion.swap import plain_here


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The function that a front captures. It calls the model, so the model's hooks are captured too."""
    return model(*args, **kwargs)


class Frozen(nn.Module):
    """A frozen model, as ``freeze`` returns it: maps the model's arguments to its output, without gradients.

    Several threads may call it at once.

    Attributes:
        model: the copy, in evaluation mode, with tensors of dtype ``compute``; they may be changed.
        differs: whether the captured forward differs from the plain network's, so that the plain one runs.
        graphs: the CUDA graphs of its forward, or None.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, compute: torch.dtype, device: torch.device, portable: bool
    ) -> None:
        super().__init__()
        self.__class__ = _class_for(model)
        exact = {
            name: t.detach() for name, t in tensors_of(model).items() if t.is_floating_point() and t.dtype != compute
        }
        self.model = model.eval().to(device, compute).requires_grad_(False)
        self.dtype, self.compute, self.device, self.portable = dtype, compute, device, portable
        self.differs = False
        self.graphs: Graphs | None = None
        self.eval()
        _leave_inference_mode(self)
        # name of a rounded weight -> its exact values, which are folded
        self.exact = {name: t.to(device) for name, t in exact.items()}

    def front(self) -> Front:
        """The front of this process. It is never copied or pickled."""
        front: Front | None = self.__dict__.get("_fr_front")
        if front is None or front.module() is not self.model:
            self.__dict__["_fr_front"] = front = Front(self.model, _call, self._lower, BACKWARD_HOOKS, "L['model']")
        return front

    def _lower(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Matches:
        """Puts frozen rows into a captured graph."""
        names = {id(t): name for name, t in tensors_of(self.model).items()}
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        states = {node for node, t in zip(inputs, example_inputs, strict=True) if id(t) in names}
        exact = {
            id(t): (values_of(t), self.exact[name])
            for name, t in tensors_of(self.model).items()
            if name in self.exact and torch.equal(t, self.exact[name].to(t.dtype))  # it has not changed since
        }

        def of(t: Tensor) -> Tensor:
            values, wide = exact.get(id(t), (None, t))
            return wide if values is not None and values == values_of(t) else t

        folded = self.__dict__.setdefault("_fr_folded", {})
        return lower_frozen(gm, states, self.compute, self.portable, of, folded)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (
            _made_again,
            (Frozen,),
            {name: value for name, value in self.__dict__.items() if not name.startswith("_fr_")},
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Sets the device again: tensors may have been loaded to another one."""
        super().__setstate__(state)
        self.__class__ = _class_for(self.model)
        _leave_inference_mode(self)
        self.device = next((t.device for t in (*self.parameters(), *self.buffers())), self.device)

    def train(self, mode: bool = True) -> Frozen:
        """Supports only ``eval()``.

        Raises:
            RuntimeError: ``mode`` is True. freeze copies the model: train the original and freeze again.
        """
        if mode:
            raise RuntimeError("train: this model is frozen for inference; train the one it was made from")
        super().train(False)
        return self

    def __prepare_scriptable__(self) -> Any:
        """``torch.jit.script`` calls this.

        Raises:
            TypeError: always.
        """
        raise TypeError("torch.jit.script: it can't compile a frozen model; use torch.jit.trace")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        """Moves the tensors and drops what was captured: graphs hold the present memory.

        Raises:
            RuntimeError: ``fn`` changes the dtype, which only freeze can do.
        """
        probe = fn(torch.empty(0, dtype=self.compute, device=self.device))
        if probe.dtype != self.compute:
            raise RuntimeError(
                f"dtype: frozen for {self.compute}, got {probe.dtype}; call freeze(..., dtype=...) again"
            )
        super()._apply(fn, recurse)
        _leave_inference_mode(self)
        self.device = probe.device
        self.exact = {name: wide.to(probe.device) for name, wide in self.exact.items()}
        for name in ("_fr_front", "_fr_folded"):
            self.__dict__.pop(name, None)
        if self.graphs is not None:
            self.graphs = Graphs() if probe.device.type == "cuda" else None
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if graphed():
            return self._plainly(args, kwargs)
        for t in _tensors_in((*args, kwargs) if kwargs else args):
            if t.device != self.device:
                raise ValueError(f"x: expected tensors on {self.device}, where this model is, got one on {t.device}")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self.differs or plain_here(args, kwargs):
                return self._plainly(args, kwargs)
            if self.graphs is not None and not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
                return self.graphs(self._run, args[0])
            return self._run(*args, **kwargs)

    def _plainly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the plain network."""
        if torch.is_autocast_enabled(self.device.type):
            with torch.autocast(self.device.type, enabled=False):
                return self._plainly(args, kwargs)
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        return self._cast(self.model(*self._cast_inputs(args), **self._cast_inputs(kwargs)))

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self._cast(self.front().run(self.model, self._cast_inputs(args), self._cast_inputs(kwargs)))

    def _cast_inputs(self, given: Any) -> Any:
        """Casts floating tensors to the dtype of the computation."""
        if all(t.dtype == self.compute for t in _tensors_in(given)):
            return given
        return tree_map_only(Tensor, lambda t: t.to(self.compute) if t.is_floating_point() else t, given)

    def _cast(self, out: Any) -> Any:
        """Casts results to the dtype that ``freeze`` was called with."""
        if self.dtype == self.compute:
            return out
        return tree_map_only(Tensor, lambda t: t.to(self.dtype) if t.dtype == self.compute else t, out)

    def extra_repr(self) -> str:
        graphs = "" if self.graphs is None else f", {self.graphs}"
        portable = ", portable" if self.portable else ""
        return f"dtype={self.dtype}, computed in {self.compute}, on {self.device}{portable}{graphs}"


def _class_for(model: nn.Module) -> type[Frozen]:
    """A subclass of ``Frozen`` with the signature of the model's forward, which exporters need."""

    @wraps(type(model).forward)
    def forward(self: Frozen, *args: Any, **kwargs: Any) -> Any:
        return Frozen.forward(self, *args, **kwargs)

    return type("Frozen", (Frozen,), {"forward": forward, "__module__": __name__})


def _made_again(cls: type[Frozen]) -> Frozen:
    """Makes the object for copies and files; setting its state sets its class."""
    return cls.__new__(cls)


def _tensors_in(given: Any) -> Iterable[Tensor]:
    """The tensors among a call's arguments; without a walk if these are tensors."""
    if isinstance(given, tuple) and all(isinstance(t, Tensor) for t in given):
        return given
    return (t for t in tree_iter(given) if isinstance(t, Tensor)) if given else ()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _leave_inference_mode(model: nn.Module) -> None:
    """Replaces tensors that were made in inference mode by ordinary copies.

    PyTorch does not count changes of inference tensors, so a weight packed from one could be out of date.
    """
    copies: dict[Tensor, Tensor] = {}  # keeps tied tensors tied
    with torch.inference_mode(False), torch.no_grad():
        for tensors in (table for m in model.modules() for table in (m._parameters, m._buffers)):
            for name, t in tensors.items():
                if t is not None and t.is_inference():
                    if t not in copies:
                        made = t.clone()
                        copies[t] = nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
                    tensors[name] = copies[t]  # type: ignore[assignment]
