"""The fast decompositions under one name, as the formulas take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from magic_fast.spectral.leading_triples import leading
from magic_fast.spectral.polar_factor import polar
from magic_fast.spectral.products import multiply


@dataclass(frozen=True)
class FastFactorizations:
    """:func:`polar` and :func:`leading`, which fall back to exact decompositions where they must.

    Attributes:
        label: the tensor's name, for the log.
    """

    label: str = "a matrix"

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return multiply(a, b)

    def polar(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return polar(x, dtype=dtype, label=self.label)

    def leading(self, x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return leading(x, count, label=self.label)
