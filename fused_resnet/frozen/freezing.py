"""freeze: makes a frozen copy of a model, and compares it with the model on an example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from fused_resnet.backends import load, warn_once
from fused_resnet.frozen.cuda_graphs import Graphs
from fused_resnet.frozen.modules import Frozen, tensors_of
from fused_resnet.fusion.inspection import copy_of
from fused_resnet.fusion.swap import unfuse

# A frozen model within this distance of the plain one on the example, relative to its largest value, is accepted.
_AGREES = 0.01


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
        portable: use only PyTorch's own operators, in ``dtype`` on every machine. What is exported is the same with
            and without it.

    Returns:
        A module that takes the model's arguments and returns the result of ``model.eval()``, without gradients.
        Floating inputs are converted to ``dtype``. Several threads may call it at once. ``torch.export``,
        ``torch.onnx.export``, ``torch.jit.trace`` and ``torch.compile`` take it, and see the plain network in
        evaluation mode: BatchNorm is not folded there.

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

    The parameters ``learns`` of the plain network require gradients. If the results differ by more than rounding, the
    frozen model's parameters get them too, in case its forward asks. If the plain network is still nearer to the exact
    values (say because a forward depends on earlier calls), the plain network runs. The exact values are asked before
    the parameters are changed, because a change captures the call again.
    """

    def tensors(net: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        given = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs))
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast(frozen.device.type, enabled=False):
            return [t for t in tree_iter(net(*given[0], **given[1])) if isinstance(t, Tensor)]

    def copied(net: nn.Module) -> nn.Module:
        # a network's own __deepcopy__ may lose its mode, device and dtype
        return _learning(copy_of(net).eval().to(frozen.device, frozen.compute), learns)

    plain = copied(frozen.model)
    got, want = tensors(frozen, frozen.compute), tensors(copied(plain), frozen.compute)
    if _all_agree(got, want):
        return
    learning, exact = copied(plain), plain.double()
    for name, t in tensors_of(exact).items():
        if name in frozen.exact:
            t.detach().copy_(frozen.exact[name])
    truth = tensors(exact, torch.float64)
    if _as_near(got, want, truth):
        return
    frozen.model = learning
    frozen.__dict__.pop("_fr_folded", None)
    got = tensors(frozen, frozen.compute)
    if not (_all_agree(got, want) or _as_near(got, want, truth)):
        warn_once("freeze: the frozen model differs from the plain one on the example, so the plain one runs")
        frozen.differs = True


def _learning(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The model with exactly these parameters requiring gradients."""
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    return model


def _all_agree(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(_agree, a, b))


def _as_near(got: Sequence[Tensor], want: Sequence[Tensor], truth: Sequence[Tensor]) -> bool:
    """Whether each result of the frozen model is near the exact one, as seen from the plain network's."""
    return len(got) == len(truth) and not any(map(_worse, got, want, truth))


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
