"""How much memory the decompositions of a method take, for the plan of a merge. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_EXACT = 4  # more copies with svd="exact", and the task vectors in float64


def decompositions(copies: int) -> Callable[[Mapping[str, Any], int, int], int]:
    """The ``workspace`` of a method that holds so many float64 copies of a matrix at once, beside
    what every method on whole tensors holds (K + 2 in float32); 0 where nothing is decomposed.

    >>> iso_c = decompositions(8)
    >>> iso_c({}, 3, 2), iso_c({}, 3, 1), iso_c({"svd": "exact"}, 3, 2)
    (64, 0, 120)
    """

    def workspace(arguments: Mapping[str, Any], num_experts: int, ndim: int) -> int:
        if ndim != 2:
            return 0
        exact = _EXACT + num_experts if arguments.get("svd") == "exact" else 0
        return 8 * (copies + exact)

    return workspace
