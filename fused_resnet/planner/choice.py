"""A choice: the backend that serves a primitive, and its configuration; its JSON, its name and its call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fused_resnet.backends import Call, loaded


@dataclass(frozen=True)
class Choice:
    """The choice for a signature: a backend and its configuration (which only the backend reads; None: its default).

    For conv_backward it may be one choice for the input's gradient and one for the weight's.
    """

    backend: str
    config: tuple[Any, ...] | None = None
    parts: tuple[Choice, Choice] | None = None

    def encode(self) -> dict[str, Any]:
        """The choice as a value for JSON."""
        if self.parts is not None:
            return {"backend": self.backend, "parts": [part.encode() for part in self.parts]}
        return {"backend": self.backend, "config": self.config}

    @staticmethod
    def decode(raw: dict[str, Any]) -> Choice:
        """The inverse of ``encode``."""
        parts = raw.get("parts")
        both = (Choice.decode(parts[0]), Choice.decode(parts[1])) if parts is not None else None
        return Choice(raw["backend"], _tuples(raw.get("config")), both)

    def __str__(self) -> str:
        if self.parts is not None:
            return " + ".join(str(part) for part in self.parts)
        return self.backend


APART = "apart"


def label(choice: Choice) -> str:
    """The name of a choice among the measured times."""
    if choice.parts is not None:
        return "apart: " + " + ".join(label(part) for part in choice.parts)
    return choice.backend if choice.config is None else f"{choice.backend} {choice.config}"


def _tuples(raw: Any) -> Any:
    return tuple(_tuples(v) for v in raw) if isinstance(raw, list | tuple) else raw


def call_choice(choice: Choice, call: Call[Any]) -> Any:
    """Runs the call as the choice says."""
    if choice.parts is not None:
        assert call.parts is not None
        # the weight's gradient first: the input's may overwrite ``add``
        _, dw, *_ = call_choice(choice.parts[1], call.parts[1])
        dx, _, *sums = call_choice(choice.parts[0], call.parts[0])
        return dx, dw, *sums
    backend = loaded(choice.backend)
    if choice.config is None:
        return call.on(backend)
    with backend.configured(choice.config):
        return call.on(backend)
