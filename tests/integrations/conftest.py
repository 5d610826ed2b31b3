"""mergekit, where it is installed, and left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from magic_fast.integrations import mergekit as ours


@pytest.fixture
def registry() -> Iterator[dict[str, Any]]:
    """mergekit's table of methods; skips where mergekit is absent."""
    found = pytest.importorskip(
        "mergekit.merge_methods.registry",
        reason="mergekit is not installed: pip install 'magic_fast[mergekit]'",
    )
    table: dict[str, Any] = found._METHODS
    before = dict(table)
    yield table
    ours.uninstall()
    assert table == before
