"""The meaning of the calls in a captured graph: PyTorch's functions and the names of their arguments."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fused_resnet.fusion.patterns import ACT_CALLS, ADDS, act_arguments, act_of_call
from fused_resnet.fusion.sync_norm import sync_batch_norm
from fused_resnet.spec import Act

Function = Callable[..., Any]
_CONV = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_NORM = {
    "input": None, "running_mean": None, "running_var": None, "weight": None, "bias": None,
    "training": False, "momentum": 0.1, "eps": 1e-5,
}  # fmt: skip
_MAX_POOL = {
    "input": None, "kernel_size": None, "stride": None, "padding": 0, "dilation": 1,
    "ceil_mode": False, "return_indices": False,
}  # fmt: skip
_AVG_POOL = {
    "input": None, "kernel_size": None, "stride": None, "padding": 0, "ceil_mode": False,
    "count_include_pad": True, "divisor_override": None,
}  # fmt: skip
_PAD = {"input": None, "pad": None, "mode": "constant", "value": None}
_DROPOUT = {"input": None, "p": 0.5, "training": True, "inplace": False}
# function -> the kind of its computation, and its arguments with their defaults
CALLS: dict[Function, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys((torch.conv1d, F.conv1d, torch.conv2d, F.conv2d, torch.conv3d, F.conv3d), ("conv", _CONV)),
    F.batch_norm: ("norm", _NORM),
    sync_batch_norm: ("norm", _NORM | {"training": True, "group": None}),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), ("max_pool", _MAX_POOL)),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), ("avg_pool", _AVG_POOL)),
    F.pad: ("pad", _PAD),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), ("dropout", _DROPOUT)),
    F.linear: ("linear", {"input": None, "weight": None, "bias": None}),
}
MULS = (operator.mul, torch.mul, "mul")
# Calls that switch a mode: a chain must not contain one.
_MODES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")


def kind_of(node: Any) -> str | None:
    """The kind of a node's computation by ``CALLS``; None for any other node."""
    known = CALLS.get(node.target) if isinstance(node, fx.Node) and node.op == "call_function" else None  # type: ignore[arg-type]
    return known[0] if known is not None else None


def arguments(node: fx.Node) -> dict[str, Any] | None:
    """The call's arguments by name, with defaults; None if it has arguments that the table lacks."""
    _, names = CALLS[node.target]  # type: ignore[index]
    if len(node.args) > len(names):
        return None
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if not given.keys() <= names.keys():
        return None
    return names | {name: value if name == "momentum" else constant(value) for name, value in given.items()}


def constant(value: Any) -> Any:
    """Fixes a number that dynamo left symbolic (because it changed once) to its present value; dynamo guards it."""
    number = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    kinds: dict[type, Callable[[Any], Any]] = {torch.SymFloat: float, torch.SymInt: int, torch.SymBool: bool}
    for kind, plain in kinds.items():
        if isinstance(number, kind):
            try:
                return plain(number)
            except RuntimeError:  # the number is known only when the graph runs
                return value
    return value


def act_of(node: fx.Node) -> Act | None:
    """The activation that a node applies to its first argument, or None."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    target: Any = node.target
    if target not in ACT_CALLS:
        return None
    function = ACT_CALLS[target]
    defaults = act_arguments(function)
    names = (*defaults, "inplace")
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    # functions that end with "_" take other arguments in the place of inplace
    inplace = given.get("inplace", False)
    if len(node.args) > 1 + len(names) or not given.keys() <= set(names) or not isinstance(inplace, bool):
        return None
    return act_of_call(function, {name: constant(given.get(name, default)) for name, default in defaults.items()})


def summands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors of a sum without a factor."""
    if node.op not in ("call_function", "call_method") or node.target not in ADDS or node.kwargs:
        return None
    if len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args) or node.args[0] is node.args[1]:
        return None
    return node.args  # type: ignore[return-value]


def averages(node: fx.Node, of: fx.Node) -> bool:
    """Whether a node is the mean of each channel of ``of``, [N, C, H, W]: [N, C, 1, 1] or [N, C]."""
    value = value_of(of)
    if value is None or value.dim() != 4:
        return False
    if node.target is F.adaptive_avg_pool2d:
        return node.args in ((of, 1), (of, (1, 1)), (of, [1, 1])) and not node.kwargs
    if node.target not in ("mean", torch.mean) or node.args[:1] != (of,):
        return False
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    dims = given.get("dim")
    if not given.keys() <= {"dim", "keepdim"} or not isinstance(dims, list | tuple):
        return False
    return sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that uses a value, if there is only one and it uses the value once."""
    if len(node.users) != 1 or node.op not in ("call_function", "call_method"):
        return None
    (user,) = node.users
    return user if user.op != "output" and user.all_input_nodes.count(node) == 1 else None


def value_of(node: Any) -> Tensor | None:
    """The tensor without storage that the tracer computed for a node."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def switches_mode(node: fx.Node) -> bool:
    """Whether a node switches gradients, autocast or inference mode."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _MODES


def counts_batch(node: fx.Node) -> bool:
    """Whether a node is num_batches_tracked.add_(1) and nothing uses its result."""
    if node.op != "call_method" or node.target != "add_" or node.args[1:] != (1,) or node.users:
        return False
    counted = value_of(node.args[0])
    of: Any = node.args[0]
    return counted is not None and counted.dim() == 0 and counted.dtype == torch.int64 and len(of.users) == 1


@lru_cache(maxsize=1024)
def _place_of_inplace(function: Function) -> int | None:
    """The position of the argument ``inplace`` of a function."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin has no signature
        return None
    return names.index("inplace") if "inplace" in names else None


def written(node: fx.Node) -> list[fx.Node]:
    """The tensors among a call's arguments that it may write into."""
    if node.op not in ("call_function", "call_method"):
        return []
    target: Any = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return node.all_input_nodes
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema.arguments
        changed = [a for s, a in zip(schema, node.args) if s.alias_info is not None and s.alias_info.is_write]
        changed += [node.kwargs.get(s.name) for s in schema if s.alias_info is not None and s.alias_info.is_write]
        return _nodes(changed)
    if kind_of(node) == "norm":
        given = arguments(node)
        return _nodes([given["running_mean"], given["running_var"]]) if given and given["training"] is not False else []
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    augmented = getattr(operator, name, None) is target and name.startswith("i") and hasattr(operator, name[1:])
    first = in_place or augmented or name in ("setitem", "__setitem__") or node.kwargs.get("inplace") is True
    if not first and callable(target):
        place = _place_of_inplace(target)
        first = place is not None and len(node.args) > place and node.args[place] is not False
    return _nodes([*(node.args[:1] if first else ()), node.kwargs.get("out")])


def _nodes(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(list(values), found.append)
    return found


def storage_of(node: fx.Node) -> int | None:
    """The storage of a node's tensor, which a view shares with its base; None if it is unknown."""
    while "dropout" in str(getattr(node.target, "__name__", "")):
        node = node.all_input_nodes[0]  # one that drops nothing returns its input, unlike in the tracer
    value = value_of(node)
    try:
        return value.untyped_storage()._cdata if value is not None else None
    except (NotImplementedError, RuntimeError):  # a tensor subclass without a storage
        return None
