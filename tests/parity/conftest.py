"""What of the grid the interpreter runs where time counts: it takes a hundred times as long.

Without a GPU the Triton backend meets every recipe once (bfloat16), a recipe of each trim on every
shape and content, and every variant of the calibration; the rest of its grid is marked slow.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from support.calibrations import CalibrationCase
from support.cases import SOME_RECIPES, MergeCase
from support.interpreter import interprets


def _quick(parameters: Mapping[str, object]) -> bool:
    case = parameters.get("case")
    if isinstance(case, MergeCase):
        if case.shape == "blocks":  # more than a hundred programs
            return False
        if case.recipe not in SOME_RECIPES:
            return case.mix == "bf16"
        return case.experts == 3 or (case.mix == "bf16" and case.content == "ties")
    if isinstance(case, CalibrationCase):
        return case.experts <= 8 and case.granularity == "row" and case.direction == "free"
    if parameters.get("shape") == (300, 257):
        return parameters.get("density") == 0.2
    recipe = parameters.get("recipe")
    return recipe is None or recipe in SOME_RECIPES


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not interprets():
        return
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("backend") == "triton" and not _quick(parameters):
            item.add_marker(pytest.mark.slow)
