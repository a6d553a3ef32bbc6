"""Packs weights for the convolutions that use them.

The first use of a weight packs it. A table of this module keeps the packed weight as long as the weight lives and keeps
its values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fused_resnet.base.locks import Lock

# Input shapes per weight whose packed weight is remembered. There are only as many packed weights as layouts that
# oneDNN chooses: one to three in ResNet-50.
SHAPES = 256


class Packs:
    """A weight's packed forms by key. They are void if the weight's values have changed since."""

    def __init__(self, values: tuple[int, int]) -> None:
        self.values = values
        self.found: dict[Any, Any] = {}


_MISSING = object()
_packs = WeakTensorKeyDictionary()
_packing = Lock()


def values_of(weight: Tensor) -> tuple[int, int]:
    """A key that changes with the weight's values (in place, or by ``.data``). Not for a tensor of inference mode."""
    return weight.data_ptr(), weight._version


# ``pack_once``, or a function that packs again: (weight, key, pack) -> the packed weight, or None.
Packing = Callable[[Tensor, Any, Callable[[list[Any]], Any]], Any]


def pack_once(weight: Tensor, key: Any, pack: Callable[[list[Any]], Any]) -> Any:
    """The packed weight for ``key``; the first call makes it with ``pack``, which is given the forms that exist."""
    packs, values = _packs.get(weight), values_of(weight)
    if packs is not None and packs.values == values:
        found = packs.found.get(key, _MISSING)  # None: there is nothing to pack
        if found is not _MISSING:
            return found
    with _packing.held():
        packs = _packs.get(weight)
        if packs is None or packs.values != values:
            _packs[weight] = packs = Packs(values)
        if key not in packs.found:
            with torch.inference_mode(False), torch.no_grad():  # the packed weight outlives the caller's mode
                made = pack([form for form in packs.found.values() if form is not None])
            while len(packs.found) >= SHAPES:
                packs.found.pop(next(iter(packs.found)))
            packs.found[key] = made
        return packs.found[key]


def packed_forms(weight: Tensor) -> list[Any]:
    """The packed forms of the weight so far, each once."""
    packs = _packs.get(weight)
    found = packs.found.copy().values() if packs is not None and packs.values == values_of(weight) else ()
    return list({id(form): form for form in found if form is not None}.values())
