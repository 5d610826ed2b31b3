"""How much memory the decompositions of a method take, for the plan of a merge. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Float64 copies of a matrix at once, beside what every method on whole tensors holds (K + 2 in
# float32). Resident memory at its highest, K = 3, was 6.5 to 7.5 of them for iso_c, 9 to 11.5 for
# iso_cts and tsv_m, 3 to 4 for star and 7 for svc (3000 x 3000, and 1600 x 1600 beside 640 x 640).
_COPIES: Mapping[str, int] = {"iso_c": 8, "iso_cts": 12, "tsv_m": 12, "star": 5, "svc": 8}
_EXACT = 4  # more of them with svd="exact", and the task vectors in float64


def decomposition_bytes(
    method: str, arguments: Mapping[str, Any], num_experts: int, ndim: int
) -> int:
    """Bytes for each element of a tensor; 0 where nothing is decomposed.

    >>> decomposition_bytes("iso_c", {}, 3, 2), decomposition_bytes("iso_c", {}, 3, 1)
    (64, 0)
    """
    copies = _COPIES.get(method, 0) if ndim == 2 else 0
    if copies and arguments.get("svd") == "exact":
        copies += _EXACT + num_experts
    return 8 * copies
