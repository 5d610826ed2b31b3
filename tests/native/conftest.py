"""These tests are about the extension: without it they are skipped, with its reason."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        import magic_fast._native  # noqa: F401
    except ImportError as error:
        mark = pytest.mark.skip(reason=f"magic_fast._native does not import: {error}")
        for item in items:
            if "native" in item.path.parts:
                item.add_marker(mark)


def isas() -> list[str]:
    """Instruction sets that this build and this machine can run."""
    try:
        from magic_fast import _native
    except ImportError:
        return ["baseline"]
    return list(_native.build_config()["supported_isas"])
