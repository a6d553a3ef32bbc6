"""The arguments of the stateless API: a unit's tensors and hyper-parameters, and units as a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fused_resnet.spec import Act, PoolSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(eq=False)
class Unit:
    """One conv -> BatchNorm -> act of a chain: its tensors and the arguments of ``conv2d`` and ``batch_norm``.

    Args:
        weight: [out_channels, in_channels/groups, kH, kW], or with kernels of x's other dimensions (kL, or kD, kH, kW);
            None: the convolution is outside the chain.
        bn_weight, bn_bias: gamma and beta, [out_channels]; None: 1 and 0, as in ``BatchNorm2d``
            with ``affine=False`` or ``bias=False``.
        running_mean, running_var: [out_channels]; used if not ``training``, updated if ``training``. Give both or none.
        bias: the convolution's bias, [out_channels], or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d`` (conv1d, conv3d).
        act: a name of ``fused_resnet.spec.ACTIVATIONS``, a (name, parameter) pair or None.
        eps, momentum, training: as in ``torch.nn.functional.batch_norm``. All arguments may be NumPy numbers, tensors
            of one value, or lists and tuples of one value wherever PyTorch accepts these.
        process_group: if ``training``, the statistics are those of the batches of all its processes, as in
            ``torch.nn.SyncBatchNorm``; every process has to make the same calls. None: this process's batch.
    """

    weight: Tensor | None = None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    bias: Tensor | None = None
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    act: str | tuple[str, float] | Act | None = "relu"
    eps: float = 1e-5
    momentum: float = 0.1
    training: bool = False
    process_group: ProcessGroup | None = None


@dataclass(eq=False)
class Chain:
    """One residual block of a row: the arguments of ``residual_chain``, except x and a residual.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """

    units: Sequence[Unit]
    shortcut: str | Unit | None = "identity"
    shortcut_stride: int | Sequence[int] = 1
    shortcut_pool: PoolSpec | None = None

    def __post_init__(self) -> None:
        units, shortcut = self.units, self.shortcut
        if not isinstance(units, Sequence) or not units:
            raise ValueError(f"units: expected at least one Unit, got {units!r}")
        for i, unit in enumerate(units):
            if not isinstance(unit, Unit):
                raise TypeError(f"units[{i}]: expected a Unit, got {type(unit).__name__}")
        if shortcut is not None and not isinstance(shortcut, str | Unit):
            raise TypeError(f"shortcut: expected a str, a Unit or None, got {shortcut!r}")
        if isinstance(shortcut, str) and shortcut not in ("identity", "pad"):
            raise ValueError(
                f"shortcut: expected 'identity', 'pad', a Unit (the projection) or None (plain, or with "
                f"residual=...), got {shortcut!r}"
            )

    @property
    def everyone(self) -> list[Unit]:
        """The units, followed by the projection."""
        return [*self.units, *([self.shortcut] if isinstance(self.shortcut, Unit) else [])]
