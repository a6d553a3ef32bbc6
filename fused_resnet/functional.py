"""The stateless API: chains of conv -> BatchNorm -> act on tensors you hold.

All functions validate their arguments before any kernel starts. If they refuse, every tensor stays as it was. After the
kernels they update running statistics in place, as ``torch.nn.functional.batch_norm`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fused_resnet.chain.call import run
from fused_resnet.chain.checks import check_tensor
from fused_resnet.chain.units import Chain, Unit
from fused_resnet.spec import Act, PoolSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Chain", "PoolSpec", "Unit", "bn_act", "conv_bn_act", "residual_chain", "residual_chains"]


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str | tuple[str, float] | Act | None = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    max_pool: PoolSpec | None = None,
    recompute: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """act(batch_norm(conv2d(x, weight)) [+ residual]) in one chain, optionally followed by a max-pool.

    The convolution is conv1d, conv2d or conv3d, by x's dimensions. So it is in the other functions.

    Args:
        x: [N, C, H, W], [N, C, L] or [N, C, D, H, W], float32, bfloat16, float16 or float64, any strides.
        weight, bn_weight, bn_bias, running_mean, running_var, bias: see ``Unit``.
        stride, padding, dilation, groups, act, eps, momentum, training, process_group: see ``Unit``.
        residual: a summand of the output's shape, added before the activation.
        max_pool: ``PoolSpec.make(3, 2, 1)`` for the stem of a ResNet (``dims=1`` or 3 for signals or volumes).
        recompute: save x instead of the convolution's output for the backward, which convolves again.

    Returns:
        [N, out_channels, oH, oW] (or of x's dimensions), x's dtype (autocast's inside autocast), x's layout.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.

    Source: ``F.relu(F.batch_norm(F.conv2d(...)))``; arXiv 1512.03385 section 3.4 (BN after each convolution, before
        the activation).
    """
    unit = Unit(
        weight, bn_weight, bn_bias, running_mean, running_var, bias, stride, padding, dilation, groups, act, eps,
        momentum, training, process_group,
    )  # fmt: skip
    check_tensor("weight", weight)
    return run(x, [Chain([unit], None)], residual, max_pool, recompute)


def bn_act(
    x: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    act: str | tuple[str, float] | Act | None = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """act(batch_norm(x) [+ residual]), for an x from a convolution outside this package.

    Args:
        x: [N, C, H, W], [N, C, L] or [N, C, D, H, W], float32, bfloat16, float16 or float64, any strides.
        residual: a summand of x's shape. The rest: see ``Unit``.

    Returns:
        x's shape, dtype and layout.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.

    Source: ``F.relu(F.batch_norm(x, ...) + residual)``.
    """
    unit = Unit(
        None, bn_weight, bn_bias, running_mean, running_var, act=act, eps=eps, momentum=momentum, training=training,
        process_group=process_group,
    )  # fmt: skip
    return run(x, [Chain([unit], None)], residual)


def residual_chain(
    x: Tensor,
    units: Sequence[Unit],
    *,
    shortcut: str | Unit | None = "identity",
    shortcut_stride: int | Sequence[int] = 1,
    shortcut_pool: PoolSpec | None = None,
    residual: Tensor | None = None,
    max_pool: PoolSpec | None = None,
    recompute: bool = False,
) -> Tensor:
    """A residual block: act_k(unit_k(... unit_1(x)) + shortcut(x)); the last unit's act comes after the add.

    Args:
        x: [N, C, H, W], [N, C, L] or [N, C, D, H, W], float32, bfloat16, float16 or float64, any strides.
        units: two for a basic block, three for a bottleneck; any number works.
        shortcut: "identity"; "pad", the paper's option A (x strided by ``shortcut_stride``, zero channels appended);
            a ``Unit`` without activation, the projection of options B and C; None for a plain block.
        shortcut_pool: an average pool before the projection (ResNet-D).
        residual: a summand of the output's shape instead of a shortcut (then ``shortcut=None``).
        max_pool: a max-pool after a chain without a summand, as in a stem: ``PoolSpec.make(3, 2, 1)``.
        recompute: the backward computes the first convolution's output again instead of saving it.

    Returns:
        [N, out_channels of the last unit, oH, oW], x's dtype (autocast's inside autocast), x's layout.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.

    Source: arXiv 1512.03385, equations (1) and (2), figures 2 and 5.
    """
    chain = Chain(units, shortcut, shortcut_stride, shortcut_pool)
    if residual is not None and shortcut is not None:
        came = repr(shortcut) if isinstance(shortcut, str) else "a Unit"
        raise ValueError(f"residual: expected shortcut=None with it, got shortcut={came}")
    return run(x, [chain], residual, max_pool, recompute)


def residual_chains(x: Tensor, chains: Sequence[Chain]) -> Tensor:
    """Residual blocks in a row, a stage of a network: ``residual_chain`` of each, on the output of the one before.

    The numbers are those of one call per block. The backward has less traffic: the kernel that computes the gradient
    between two blocks also takes it through the add and the activation there.

    Args:
        x: [N, C, H, W], [N, C, L] or [N, C, D, H, W], float32, bfloat16, float16 or float64, any strides.
        chains: the blocks, first to last.

    Returns:
        [N, out_channels of the last unit, oH, oW], x's dtype (autocast's inside autocast), x's layout.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected, before anything runs.

    Source: arXiv 1512.03385, table 1: conv2_x to conv5_x.
    """
    if not isinstance(chains, Sequence) or not chains:
        raise ValueError(f"chains: expected at least one Chain, got {chains!r}")
    for i, chain in enumerate(chains):
        if not isinstance(chain, Chain):
            raise TypeError(f"chains[{i}]: expected a Chain, got {type(chain).__name__}")
    return run(x, chains)
