"""What tests of measured choices share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fused_resnet import planner
from fused_resnet.planner import sizes


@contextmanager
def own_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Measurements run, and their answers are kept for this test alone."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "plans"))
    monkeypatch.delenv("FUSED_RESNET_PLAN", raising=False)
    sizes.forget()
    planner.forget()
    yield
    sizes.forget()
    planner.forget()
