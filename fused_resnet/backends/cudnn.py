"""PyTorch's own convolutions between Triton's memory-bound passes.

The triton backend serves the memory-bound primitives.
"""

from __future__ import annotations

from typing import Any

from fused_resnet.backends import Backend, Call, Case, forced
from fused_resnet.backends.library_conv import Convolutions
from fused_resnet.backends.triton import BACKEND as TRITON
from fused_resnet.backends.triton import INTERPRET, refuse_pass


class Cudnn(Convolutions):
    """Takes every convolution whose passes Triton takes."""

    name = "cudnn"
    companions = ("triton",)

    @property
    def passes(self) -> Backend:
        return TRITON

    def unavailable(self) -> str | None:
        """The reason why Triton's kernels can't run, or None: the passes are Triton's."""
        return TRITON.unavailable()

    def refuse(self, primitive: type[Call[Any]], case: Case) -> str | None:
        """The reason why the passes refuse the case, or None."""
        if case.device == "cpu" and not (INTERPRET and forced() == "cudnn"):
            return "on a CPU only in Triton's interpreter (TRITON_INTERPRET=1) and by use_backend('cudnn')"
        return refuse_pass(case)


BACKEND = Cudnn()
