"""Means of directions as data: which vectors of a tensor, and the rule from their inner products
to their coefficients. No torch is imported here.

Every backend that runs them reads the tensor once for the inner products, and once to add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Array = Any  # as of magic_fast.ops.backend

#: float64 inner products [rows, K, K] to float64 coefficients [rows, K], on the device they are on.
Rule = Callable[[Any], Any]


@dataclass(frozen=True)
class Directions:
    """A merge whose K coefficients follow from the inner products of K vectors alone.

    Attributes:
        rule: from float64 inner products [rows, K, K], a torch tensor, to coefficients [rows, K].
        axis: along which the vectors run, one in each row: −1 (the last) or 0; None: the flattened
            tensor is one vector.
        member: the base is the first of the vectors, not the point that they start from.
    """

    rule: Rule
    axis: int | None = None
    member: bool = False

    def vectors(
        self, base: Array | None, experts: Sequence[Array]
    ) -> tuple[Array | None, list[Array]]:
        """What the vectors start from, and what they end at."""
        if self.member and base is not None:
            return None, [base, *experts]
        return base, list(experts)

    def length(self, shape: Sequence[int]) -> int | None:
        """Elements of a vector where it is consecutive in memory, else None."""
        if self.axis is None or len(shape) < 2:
            return math.prod(shape)
        return int(shape[-1]) if self.axis == -1 else None


@dataclass(frozen=True)
class RowWeights:
    """What a :class:`Directions` found: d = Σ_k w_k·τ_k + w_K·base, row by row.

    Attributes:
        values: float32 [rows, K + 1], of the experts and, last, of the base.
        cols: elements of a row.
    """

    values: Any
    cols: int


def weights_of(directions: Directions, gram: Any, cols: int, *, split: bool) -> RowWeights:
    """The coefficients as weights, rounded once to float32.

    Args:
        split: the base, a member, is also what is added to: Σ c_k·θ_k = θ_0 + Σ_k c_k·τ_k +
            (Σ c − 1)·θ_0.
    """
    import torch

    found = directions.rule(gram)
    last = torch.zeros_like(found[..., :1])
    if split:
        last, found = found.sum(-1, keepdim=True) - 1, found[..., 1:]
    return RowWeights(torch.cat([found, last], -1).float().contiguous(), cols)
