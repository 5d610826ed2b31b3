"""Many examples of one property are too many for interpreted kernels where time counts."""

from __future__ import annotations

import pytest

from support.interpreter import interprets


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not interprets():
        return
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("backend") == "triton" and "merge_properties" in item.nodeid:
            item.add_marker(pytest.mark.slow)
