"""Modules of one chain each, whose classes do what classes can do."""

from __future__ import annotations

import abc
import copy
import dataclasses
import typing
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """What the classes below have in common: one chain."""

    def __init__(self) -> None:
        super().__init__()
        self._layers()

    def _layers(self) -> None:
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class NeedsKeyword(Block):
    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, kind: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        assert kind not in NeedsKeyword.known
        NeedsKeyword.known[kind] = cls


class Keyword(NeedsKeyword, kind="backbone"):
    pass


class ByName(Block):
    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ByName.known[cls.__name__] = cls


class Named(ByName):
    pass


class Sealed(Block):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("Sealed has no subclasses")


class Counting(type):
    """Every class that comes through the metaclass is noted, and may not be called Fused."""

    made: ClassVar[list[str]] = []

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> Counting:
        mcs.made.append(name)
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], *, needed: int) -> None:
        super().__init__(name, bases, namespace)

    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError("classes of this kind are constant")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """As fastai's: nn.Module.__init__ before the class's own."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.__init__(*args, **kwargs)
        return made


class Counted(Block, metaclass=Counting, needed=1):
    def __init__(self) -> None:
        self._layers()


class Interface(nn.Module, abc.ABC):
    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class Concrete(Interface, Block):
    forward = Block.forward


class AbstractCounting(abc.ABCMeta, Counting):
    """ABCMeta's own ``__new__`` would go on to Counting's."""

    __init__ = type.__init__
    __call__ = type.__call__
    __setattr__ = type.__setattr__


class Both(Block, metaclass=AbstractCounting):
    pass


T = typing.TypeVar("T")


class Generic(Block, typing.Generic[T]):
    pass


class Protocol(typing.Protocol):
    def forward(self, x: Tensor) -> Tensor: ...


class Protocoled(Block, Protocol):
    pass


class Indexed(Block):
    def __class_getitem__(cls, item: Any) -> Any:
        raise TypeError("no index")


class Slots(Block):
    __slots__ = ("extra", "unset")

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "extra", 3)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"slot": self.extra}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "extra", state.pop("slot"))
        super().__setstate__(state)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.extra


class Guarded(Block):
    """Attributes can't be set, but by nn.Module's own constructor."""

    def __setattr__(self, name: str, value: Any) -> None:
        if "bn" in self.__dict__.get("_modules", {}) and name != "training":
            raise AttributeError(f"{name} is constant")
        super().__setattr__(name, value)


@dataclasses.dataclass(eq=False)
class Data(nn.Module):
    width: int = 4

    def __post_init__(self) -> None:
        super().__init__()
        Block._layers(self)  # type: ignore[arg-type]

    forward = Block.forward


@dataclasses.dataclass
class Unhashable(Data):
    """With dataclass's ``__eq__``: PyTorch's own walks over modules fail on it."""


class Empty(Block):
    """False, and of length 0."""

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        raise RuntimeError("ask something else")


class Equals(Block):
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("modules of this kind are not compared")

    __hash__ = Block.__hash__


class Raises(Block):
    @property
    def device(self) -> Any:
        raise RuntimeError("no device before this and that")


class Disguised(Block):
    """``isinstance`` takes it for something else as well."""

    @property
    def __class__(self) -> type:
        return Block


class Delegates(nn.Module):
    """Whatever it has not is asked of what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = Block()
        Block._layers(self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.wrapped(x))).relu()


class SaysItsName(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (type(self).__name__ == "SaysItsName") + 2 * (self.__class__.__name__ == "Block")


class ComparesItsClass(Block):
    def _is_exact(self) -> bool:
        return type(self) is ComparesItsClass

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self._is_exact()


class ComparesAttribute(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.__class__ in (ComparesAttribute, Block))


class CopiesItself(Block):
    """All of pickle's and copy's hooks at once."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width, self.copies = width, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesItself:
        made = type(self)(self.width).to(self.conv.weight.dtype)
        made.load_state_dict(self.state_dict())
        made.train(self.training)
        made.copies = self.copies + 1
        return made

    def __copy__(self) -> CopiesItself:
        return copy.deepcopy(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.width,), self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.to(state["conv.weight"].dtype).load_state_dict(state)
        self.copies = -1


class WithoutState(Block):
    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, ({k: v.tolist() for k, v in self.state_dict().items()}, self.training)


def _loaded(state: dict[str, Any], training: bool) -> WithoutState:
    made = WithoutState().double().train(training)
    made.load_state_dict({k: torch.tensor(v, dtype=made.state_dict()[k].dtype) for k, v in state.items()})
    return made


class NewArguments(Block):
    def __new__(cls, *args: Any, width: int) -> NewArguments:
        assert width == 4
        return super().__new__(cls)

    def __init__(self, *, width: int = 4) -> None:
        super().__init__()

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"width": 4}


KINDS = [
    Keyword,
    Named,
    Sealed,
    Counted,
    Concrete,
    Both,
    Generic[int],
    Protocoled,
    Indexed,
    Slots,
    Guarded,
    Data,
    Empty,
]
KINDS += [Equals, Raises, Delegates, SaysItsName, CopiesItself, WithoutState, lambda: NewArguments(width=4)]
