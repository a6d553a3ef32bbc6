"""Computes BatchNorm as vectors, and folds them into a convolution's weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from fused_resnet.backends import Backend, BnFold, Norm, vector_dtype
from fused_resnet.base.locks import Lock
from fused_resnet.chain.packing import values_of

# A weight -> (what the answer depends on, the answer of ``folds``).
_answers = WeakTensorKeyDictionary()
_asking = Lock()


def fold(p: dict[str, Tensor], mean: Tensor, var: Tensor, eps: float, wide: torch.dtype, vectors: Backend) -> Norm:
    """The unit's BatchNorm as vectors, computed by the backend ``vectors``."""
    bias = p.get("bias") if "running_mean" in p else None
    return BnFold(mean.to(wide), var.to(wide), p.get("bn_weight"), p.get("bn_bias"), bias, eps).on(vectors)


def fold_weight(weight: Tensor, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weight times BatchNorm's scale, in ``dtype``, and the part of the scale that stays outside, if any.

    A channel is not folded if its s*W or t lies below or above the dtype's normal numbers: rounding would then lose
    more than it loses for normal numbers and for W. Such a channel keeps W and s, with which PyTorch computes.

    Args:
        weight: [K, C, R, S] or [K, C, Q, R, S], any floating dtype. norm: its scale is [K], of the dtype in which to
            multiply.

    Returns:
        The weight's shape in ``dtype``; [K] in ``vector_dtype`` of that, or None: 1 everywhere.
    """
    scale, limits = norm.scale, torch.finfo(dtype)
    per_filter = (-1, *[1] * (weight.dim() - 1))
    exact = weight.to(scale.dtype) * scale.view(per_filter)
    folded = exact.to(dtype)
    if dtype != torch.float16:  # the other dtypes have the range of the vectors' dtype
        return folded, None

    def size(t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t.flatten(1), dim=1)

    own = weight.to(dtype)
    usual = torch.maximum(limits.eps / 2 * size(exact), scale.abs() * size(own.to(scale.dtype) - weight))
    # t leaves room for a convolution that rounds before it adds t
    good = (size(folded - exact) <= usual) & (norm.shift.abs() <= limits.max / 4)
    if good.all():
        return folded, None
    return torch.where(good.view(per_filter), folded, own), torch.where(good, 1, scale).to(vector_dtype(dtype))


def folds(p: dict[str, Tensor], norm: Norm, eps: float, dtype: torch.dtype) -> bool:
    """Whether all of the scale can be folded into a unit's weight.

    The answer is kept with the weight until a tensor that it depends on changes, so it waits for a GPU only once.
    """
    if dtype != torch.float16:
        return True
    weight = p["weight"]
    values = values_of(*p.values())
    if values is None:  # changes can't be noticed
        return fold_weight(weight, norm, dtype)[1] is None
    about = eps, *map(WeakIdRef, p.values()), values
    known = _answers.get(weight)
    if known is None or known[0] != about:
        known = about, fold_weight(weight, norm, dtype)[1] is None
        with _asking.held():
            _answers[weight] = known
    return known[1]
