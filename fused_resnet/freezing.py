"""freeze: makes a copy of a model for inference. Its captured graphs run rows of chains with BatchNorm folded.

The copy keeps its children and its forward. Dynamo captures it once per kind of call, like the forward of a fused
model, and guards all that it read. Tools that record a graph of their own see the plain network in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_iter, tree_map_only

from fused_resnet.backends import load, warn_once
from fused_resnet.cuda_graphs import Graphs
from fused_resnet.frozen_forward import values_of
from fused_resnet.fusion.front import Front
from fused_resnet.fusion.frozen_rows import lower_frozen
from fused_resnet.fusion.matcher import Matches
from fused_resnet.fusion.swap import plain_here, unfuse
from fused_resnet.modules import copy_of, graphed

# A frozen model within this distance of the plain one on the example, relative to its largest value, is accepted.
_AGREES = 0.01


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
            name: t.detach() for name, t in _tensors(model).items() if t.is_floating_point() and t.dtype != compute
        }
        self.model = model.eval().to(device, compute).requires_grad_(False)
        self.dtype, self.compute, self.device, self.portable = dtype, compute, device, portable
        self.differs = False
        self.graphs: Graphs | None = None
        self.eval()
        _leave_inference_mode(self)
        # name of a rounded weight -> (its exact values, which are folded; its rounded ones, to notice a change)
        now = _tensors(self.model)
        self.exact = {name: (t.to(device), now[name].clone()) for name, t in exact.items()}

    def front(self) -> Front:
        """The front of this process. It is never copied or pickled."""
        front: Front | None = self.__dict__.get("_fr_front")
        if front is None or front.module() is not self.model:
            self.__dict__["_fr_front"] = front = Front(self.model, _call, self._lower)
        return front

    def _lower(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Matches:
        """Puts frozen rows into a captured graph."""
        names = {id(t): name for name, t in _tensors(self.model).items()}
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        states = {node for node, t in zip(inputs, example_inputs, strict=True) if id(t) in names}
        exact = {
            id(t): (values_of(t), self.exact[name][0])
            for name, t in _tensors(self.model).items()
            if name in self.exact and torch.equal(t, self.exact[name][1])
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
        self.exact = {k: (wide.to(probe.device), then.to(probe.device)) for k, (wide, then) in self.exact.items()}
        for name in ("_fr_front", "_fr_folded"):
            self.__dict__.pop(name, None)
        if self.graphs is not None:
            self.graphs = Graphs() if probe.device.type == "cuda" else None
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if graphed():
            return self._plainly(args, kwargs)
        for t in tree_iter((args, kwargs)):
            if isinstance(t, Tensor) and t.device != self.device:
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
        if all(not isinstance(t, Tensor) or t.dtype == self.compute for t in tree_iter(given)):
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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
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


def freeze(
    model: nn.Module,
    *example: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    cuda_graph: bool = False,
    portable: bool = False,
) -> Frozen:
    """A copy of ``model`` for inference only: BatchNorm folded into the weights, weights prepacked for ``example``.

    Args:
        model: in any mode; it is not changed. Running statistics are used as they are now. What can't be frozen runs
            plain, in eval mode; ``explain`` of the result says why. Hooks are called as in the model.
        example, example_kwargs: arguments of a call, on the device of the frozen model. Other calls work too: each kind
            of call is captured when it first comes, and packs its weights if it needs them in another layout.
        dtype: float32, bfloat16 or float16, the dtype of the result; None keeps the parameters' dtype. A CPU without a
            fast 16-bit matrix unit computes 16-bit models in float32 (see ``fused-resnet env``).
        cuda_graph: start the forward as one CUDA graph per input shape (the first 8; other shapes run without one). The
            result is a copy that the caller owns. A model that can't be recorded runs without a graph, with a warning.
        portable: use only PyTorch's own operators, in ``dtype`` on every machine.

    Returns:
        A module that takes the model's arguments and returns the result of ``model.eval()``, without gradients.
        Floating inputs are converted to ``dtype``. Several threads may call it at once. ``torch.export``,
        ``torch.onnx.export``, ``torch.jit.trace`` and ``torch.compile`` take it, and see the plain network in
        evaluation mode.

    Raises:
        TypeError, ValueError: the model is not an nn.Module, the example has no floating tensor, the dtype is not
            floating, or cuda_graph is set and the example is not on a CUDA device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    kwargs = dict(example_kwargs or {})
    tensors = [t for t in tree_iter((example, kwargs)) if isinstance(t, Tensor)]
    floating = [t for t in tensors if t.is_floating_point()]
    if not floating:
        raise ValueError(f"example: expected arguments with a floating-point tensor, got {len(tensors)} other tensors")
    device = floating[0].device
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), floating[0].dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    for name, value in (("cuda_graph", cuda_graph), ("portable", portable)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {value!r} of type {type(value).__name__}")
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph: expected an example on a CUDA device, got one on {device}")
    compute, cpu = dtype, load("cpu")[0]
    if device.type == "cpu" and cpu is not None and not portable:
        compute = cpu.compute_dtype(dtype)
    learns = [name for name, p in model.named_parameters() if p.requires_grad]
    frozen = Frozen(unfuse(copy_of(model)), dtype, compute, device, portable)
    _check_example(frozen, learns, example, kwargs)
    if cuda_graph:
        frozen.graphs = Graphs()
        frozen(*example, **kwargs)
    return frozen


def _check_example(frozen: Frozen, learns: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Captures the example's call, packs the weights, and compares the result with the plain network's.

    The parameters ``learns`` of the plain network require gradients. If the results differ, the frozen
    model's parameters get them too, in case its forward asks. If the plain network is nearer to the exact values (say
    because a forward depends on earlier calls), the plain network runs.
    """

    def tensors(net: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        given = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs))
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast(frozen.device.type, enabled=False):
            return [t for t in tree_iter(net(*given[0], **given[1])) if isinstance(t, Tensor)]

    plain = _learning(copy_of(frozen.model), learns)
    got, want = tensors(frozen, frozen.compute), tensors(copy_of(plain), frozen.compute)
    if _all_agree(got, want):
        return
    frozen.model = _learning(copy_of(plain), learns)
    frozen.__dict__.pop("_fr_folded", None)
    got = tensors(frozen, frozen.compute)
    if _all_agree(got, want):
        return
    exact = plain.double()
    for name, t in _tensors(exact).items():
        if name in frozen.exact:
            t.detach().copy_(frozen.exact[name][0])
    truth = tensors(exact, torch.float64)
    if len(got) != len(truth) or any(map(_worse, got, want, truth)):
        warn_once("freeze: the frozen model differs from the plain one on the example, so the plain one runs")
        frozen.differs = True
    else:
        frozen.model.requires_grad_(False)


def _learning(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The model with exactly these parameters requiring gradients."""
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    return model


def _all_agree(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(_agree, a, b))


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results have the same shape and kind and are near each other."""
    if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
        return False
    if not a.is_floating_point() or a.numel() == 0:
        return True
    a, b = a.double(), b.double()
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    size = b[finite].abs().max() if finite.any() else b.new_zeros(())
    return bool(((a - b)[finite].abs() <= _AGREES * size).all())


def _worse(got: Tensor, want: Tensor, truth: Tensor) -> bool:
    """Whether the frozen result is more than twice as far from the truth as the plain one."""
    if got.shape != truth.shape or got.is_floating_point() != truth.is_floating_point():
        return True
    ours, plain = (torch.linalg.vector_norm(t.double() - truth.double()).nan_to_num(torch.inf) for t in (got, want))
    return bool(ours > 2 * plain) and not _agree(got, truth)
