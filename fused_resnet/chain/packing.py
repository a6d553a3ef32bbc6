"""A convolution's weight for inference, in the forms that convolutions use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor

from fused_resnet.base.locks import Lock

# Input shapes per weight whose packed weight is remembered. There are only as many packed weights as layouts that
# oneDNN chooses: one to three in ResNet-50.
SHAPES = 256
_packing = Lock()
_address, _changes = methodcaller("data_ptr"), attrgetter("_version")


def values_of(*tensors: Tensor) -> tuple[int, ...] | None:
    """A key that changes with the tensors' values (in place, or by ``.data``).

    None if one was made in inference mode: PyTorch does not count its changes.
    """
    try:
        return *map(_address, tensors), *map(_changes, tensors)
    except RuntimeError:
        if any(t.is_inference() for t in tensors):
            return None
        raise


class Weight:
    """A weight that does not change: packed by its first use, or as it is where a convolution takes no packed weight.

    What is packed does not stay in its own layout too, unless both are used: ``again`` makes it when it is packed for
    another layout.

    Args:
        own: [K, C, R, S]. again: makes a tensor with the same values; None: ``own`` stays.

    Attributes:
        like: a tensor of its shape, dtype and layout without values. forms: key -> the packed weight, or None.
    """

    def __init__(self, own: Tensor, again: Callable[[], Tensor] | None = None) -> None:
        self.like = torch.empty_like(own, device="meta")
        self.shape, self.dtype, self.device = own.shape, own.dtype, own.device
        self.forms: dict[Any, Any] = {}
        self._own: Tensor | None = own
        self._again, self._stays = again, again is None

    def borrowed(self) -> Tensor:
        """The weight itself, which need not stay."""
        own = self._own
        if own is None:
            assert self._again is not None
            with torch.inference_mode(False), torch.no_grad():  # what is made of it outlives the caller's mode
                own = self._again()
        return own

    def own(self) -> Tensor:
        """The weight itself, for a call that comes again: it stays."""
        own = self._own if self._stays else None
        if own is None:
            with _packing.held():
                own = self._own = self.borrowed()
                self._stays = True
        return own

    def packed(self, key: Any, pack: Callable[[Tensor, Sequence[Any]], Any]) -> Any:
        """The packed weight for ``key``. The first call makes it: ``pack(the weight, the forms that exist)``."""
        if key in (forms := self.forms):
            return forms[key]
        with _packing.held():
            if key not in forms:
                with torch.inference_mode(False), torch.no_grad():
                    made = pack(self.borrowed(), self.packed_forms())
                while len(forms) >= SHAPES:
                    forms.pop(next(iter(forms)))
                forms[key] = made
                if made is not None and not self._stays:
                    self._own = None
            return forms[key]

    def packed_forms(self) -> list[Any]:
        """The packed forms so far, each once."""
        return list({id(form): form for form in self.forms.copy().values() if form is not None}.values())
