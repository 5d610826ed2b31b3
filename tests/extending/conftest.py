"""The examples of docs/contributing, as files outside of the package."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

Blocks = Callable[[str], list[str]]


@pytest.fixture(scope="session")
def blocks_of(root: Path) -> Blocks:
    """The blocks of Python of a page."""

    def read(page: str) -> list[str]:
        text = (root / "docs" / "contributing" / page).read_text()
        return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)

    return read
