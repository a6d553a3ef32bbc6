"""Finds the units of a captured graph: a norm, with the convolution before it and what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fused_resnet.backends.steps import AVERAGED
from fused_resnet.chain import signals
from fused_resnet.chain.checks import DTYPES
from fused_resnet.fusion.matches import IDENTITY, ExcitationMatch, UnitMatch
from fused_resnet.fusion.table import (
    MULS,
    act_of,
    arguments,
    averages,
    counts_batch,
    kind_of,
    only_user,
    summands,
    value_of,
)  # fmt: skip
from fused_resnet.spec import Act, ConvSpec

# The dimensions of signals [N, C, L], images [N, C, H, W] and volumes [N, C, D, H, W].
_DIMS = (3, 4, 5)
# The arguments of a signal's convolution -> what changes nothing in an image's second dimension.
_SAME = {"stride": 1, "padding": 0, "dilation": 1}


def units_of(nodes: Sequence[fx.Node], frozen: bool, left: dict[fx.Node, str]) -> dict[fx.Node, UnitMatch]:
    """The units by their last node. Adds to ``left`` the norms that are in none, with the reason."""
    found = _Units(nodes, frozen, left)
    return {unit.end: unit for node in nodes if (unit := found.unit(node)) is not None}


class _Units:
    def __init__(self, nodes: Sequence[fx.Node], frozen: bool, left: dict[fx.Node, str]) -> None:
        self.frozen, self.left = frozen, left
        self.counters = {m: n for n in nodes if counts_batch(n) and (m := _module(n)) is not None}

    def unit(self, node: fx.Node) -> UnitMatch | None:
        kind = kind_of(node)
        if kind == "norm":
            unit, reason = self._norm(node)
            if unit is None:
                self.left[node] = reason
        else:
            unit = _affine(node)
        if unit is None:
            return None
        unit.act, nodes = followed_by_act(unit.end)
        unit.nodes += nodes
        if self.frozen:
            unit.excitation = _excitation(unit.end)
            unit.nodes += unit.excitation.nodes if unit.excitation is not None else []
        before = unit.start
        if kind_of(before) == "conv" and only_user(before) is unit.nodes[0]:
            _add_conv(unit, before)
        return unit

    def _norm(self, node: fx.Node) -> tuple[UnitMatch | None, str]:
        given = arguments(node)
        if given is None or not isinstance(given["input"], fx.Node):
            return None, "a batch_norm with arguments of unknown names"
        x, training = value_of(given["input"]), given["training"]
        if x is None or x.dim() not in _DIMS:
            return None, "a norm of vectors, without images" if x is not None else "a norm of unknown dimensions"
        if x.dtype not in DTYPES or x.layout != torch.strided:
            return None, f"a norm of {x.dtype} values"
        if not isinstance(training, bool) or not isinstance(given["eps"], int | float):
            return None, "a norm whose mode or eps is computed"
        if training and self.frozen:
            return None, "a norm without running statistics"
        names = {"running_mean": "running_mean", "running_var": "running_var", "weight": "bn_weight", "bias": "bn_bias"}
        tensors = {to: given[of] for of, to in names.items() if given[of] is not None}
        if not all(isinstance(t, fx.Node) for t in tensors.values()):
            return None, "a norm whose parameters are constants"
        mean = tensors.get("running_mean")
        counter = self.counters.get(_module(node)) if training and mean is not None else None
        options = {"training": training, "momentum": given["momentum"], "eps": given["eps"]}
        if given.get("group") is not None:
            options["process_group"] = given["group"]
        return UnitMatch(given["input"], [node], node, tensors, options, counter=counter), ""


def _affine(node: fx.Node) -> UnitMatch | None:
    """A unit from x * scale + shift per channel, as frozen norms compute it."""
    product, shift = summands(node) or (None, None)
    if product is None or product.op == "placeholder" or product.target not in MULS:
        return None
    factors = product.args
    if len(factors) != 2 or product.kwargs or only_user(product) is not node:
        return None
    x, scale, t = (value_of(n) for n in (*factors, shift))
    if x is None or scale is None or t is None or x.dim() not in _DIMS[1:] or x.dtype not in DTYPES:
        return None
    if not (_per_channel(scale, x) and _per_channel(t, x)) or {scale.dtype, t.dtype} != {x.dtype}:
        return None
    options = {"training": False, "momentum": 0.0, "eps": 0.0}
    tensors: Any = {"bn_weight": factors[1], "bn_bias": shift}
    return UnitMatch(factors[0], [product, node], node, tensors, options, affine=True)  # type: ignore[arg-type]


def _add_conv(unit: UnitMatch, node: fx.Node) -> None:
    """Adds the convolution before the unit to it, if a chain can run the convolution."""
    given = arguments(node)
    if given is None or not isinstance(given["input"], fx.Node) or not isinstance(given["weight"], fx.Node):
        return
    x, weight = value_of(given["input"]), value_of(given["weight"])
    if x is None or weight is None or x.dim() not in _DIMS or weight.dim() != x.dim():
        return
    options = {name: given[name] for name in ("stride", "padding", "dilation", "groups")}
    try:
        if x.dim() == 3:
            weight = signals.image(weight)
            options |= {name: signals.sizes(options[name], name, same) for name, same in _SAME.items()}
        ConvSpec.make(tuple(weight.shape), **options, bias=given["bias"] is not None)
    except (TypeError, ValueError):
        return
    own = {name: given[name] for name in ("weight", "bias") if given[name] is not None}
    unit.tensors = own | unit.tensors
    unit.options |= options
    unit.start = given["input"]
    unit.nodes.insert(0, node)


def through_dropouts(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Skips dropouts that drop nothing: returns the node after which the graph continues, and the skipped nodes."""
    passed: list[fx.Node] = []
    while (user := only_user(node)) is not None and kind_of(user) == "dropout":
        given = arguments(user)
        if given is None or given["training"] is not False or given["input"] is not node:
            break
        passed.append(user)
        node = user
    return node, passed


def followed_by_act(node: fx.Node) -> tuple[Act, list[fx.Node]]:
    """The activation after a value, if nothing else uses the value, and the activation's nodes."""
    last, passed = through_dropouts(node)
    user = only_user(last)
    if user is None or user.args[:1] != (last,) or (act := act_of(user)) is None:
        return IDENTITY, passed
    return act, [*passed, user]


def _excitation(node: fx.Node) -> ExcitationMatch | None:
    """The squeeze-and-excitation that alone uses a value: value * gate(conv(act(conv(mean of value))))."""
    value = value_of(node)
    if value is None or value.dtype not in AVERAGED or len(node.users) != 2:
        return None
    mean = next((user for user in node.users if averages(user, node)), None)
    product = next(user for user in node.users if user is not mean)
    if mean is None or product.target not in MULS or product.kwargs or len(product.args) != 2:
        return None
    nodes, tensors, acts = [mean], [], []
    for _ in range(2):
        conv = only_user(nodes[-1])
        given = arguments(conv) if conv is not None and kind_of(conv) == "conv" else None
        if conv is None or given is None or given["input"] is not nodes[-1] or not _dense(given, value.dtype):
            return None
        act, behind = followed_by_act(conv)
        nodes += [conv, *behind]
        tensors += [given["weight"], given["bias"]]
        acts.append(act)
    factor = value_of(nodes[-1])
    if factor is None or factor.shape[1:] != (value.shape[1], 1, 1) or factor.dtype != value.dtype:
        return None
    if only_user(nodes[-1]) is not product or {*product.args} != {node, nodes[-1]}:
        return None
    return ExcitationMatch([*nodes, product], tuple(tensors), tuple(acts))  # type: ignore[arg-type]


def _dense(given: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether a convolution's arguments are those of a linear layer at each pixel."""
    weight, bias = given["weight"], given["bias"]
    value = value_of(weight)
    if value is None or value.shape[2:] != (1, 1) or value.dtype != dtype or given["groups"] != 1:
        return False
    moves = (given[name] in (same, (same, same), [same, same]) for name, same in (("stride", 1), ("padding", 0)))
    return all(moves) and (bias is None or isinstance(bias, fx.Node))


def _module(node: fx.Node) -> Any:
    """The call of the module that a node comes from."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack)) if stack else None


def _per_channel(value: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether the shape is [1, C, 1, 1] or [C, 1, 1], or the same with one more dimension."""
    shape = (1,) * (x.dim() - value.dim()) + tuple(value.shape)
    return shape[:2] == (1, x.shape[1]) and shape[2:] == (1,) * (x.dim() - 2)
