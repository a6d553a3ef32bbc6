"""The table of activations, and an activation of it with its parameter."""

from __future__ import annotations

from dataclasses import dataclass

from fused_resnet.base.arguments import keep, number

# name -> (default parameter, its meaning). The formulas are in csrc/bn_math.h, reference.py and backends/aten.py.
ACTIVATIONS: dict[str, tuple[float, str]] = {
    "identity": (0.0, ""),
    "relu": (0.0, ""),
    "leaky_relu": (0.01, "negative_slope"),
    "elu": (1.0, "alpha"),
    "sigmoid": (0.0, ""),
    "silu": (0.0, ""),
    "relu6": (0.0, ""),
    "hardswish": (0.0, ""),
    "gelu": (0.0, ""),
    "gelu_tanh": (0.0, ""),  # PyTorch's gelu(approximate="tanh")
    "mish": (0.0, ""),
    "softplus": (1.0, "beta"),  # with PyTorch's default threshold
    "tanh": (0.0, ""),
    "hardsigmoid": (0.0, ""),
    "hardtanh": (1.0, "limit"),  # between -limit and limit
    "selu": (0.0, ""),
    "celu": (1.0, "alpha"),
}
# of selu (Klambauer et al. 2017)
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
_INDEX = {name: i for i, name in enumerate(ACTIVATIONS)}


@dataclass(frozen=True)
class Act:
    """An activation of the table and its parameter (negative_slope of leaky_relu, alpha of elu and celu, beta of
    softplus, limit of hardtanh).

    Raises:
        ValueError: the name is not in ``ACTIVATIONS``, or PyTorch's function does not take the parameter (a limit
            that is not positive, an alpha of 0 for celu). TypeError: the parameter is not a number.
    """

    name: str = "relu"
    param: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {self.name!r}")
        keep(self, "param", number(self.param, "act: the parameter"))
        if self.name == "hardtanh" and not self.param > 0:
            raise ValueError(f"act: expected a positive limit of hardtanh, got {self.param}")
        if self.name == "celu" and self.param == 0:
            raise ValueError("act: expected an alpha of celu other than 0, got 0")

    @property
    def text(self) -> str:
        """Its text in signatures of the planner's file."""
        return f"{self.name}({self.param:g})"

    @property
    def index(self) -> int:
        """Its index in ``ACTIVATIONS``, which csrc uses."""
        return _INDEX[self.name]

    @property
    def numbers(self) -> tuple[int, float]:
        """The arguments of csrc's operators: ``index``, ``param``."""
        return self.index, self.param

    @staticmethod
    def make(act: str | tuple[str, float] | Act | None) -> Act:
        """Makes an ``Act`` from ``"relu"``, ``("leaky_relu", 0.2)``, ``None`` (identity) or an ``Act``."""
        if isinstance(act, Act):
            return act
        if act is None:
            return Act("identity")
        if isinstance(act, str):
            return Act(act, ACTIVATIONS.get(act, (0.0, ""))[0])
        if isinstance(act, tuple) and len(act) == 2 and isinstance(act[0], str):
            return Act(*act)
        raise TypeError(f"act: expected a name, a (name, parameter) pair or None, got {act!r}")
