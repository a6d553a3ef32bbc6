"""``test_architectures.py`` for the networks of timm and transformers: a file of its own, for another worker."""

from __future__ import annotations

import pytest
from test_architectures import NETWORKS, check

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.startswith("torchvision/")])
def test_fused_equals_plain(name: str) -> None:
    check(name)
