"""``test_architectures.py`` for the networks of timm and transformers: a file of its own, for another worker."""

from __future__ import annotations

import pytest
from test_architectures import check, networks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", networks("timm/", "transformers/"))
def test_fused_equals_plain(name: str, pytestconfig: pytest.Config) -> None:
    check(name, pytestconfig.getoption("--full"))
