"""Matrices of known spectra."""

from __future__ import annotations

import torch
from torch import Tensor


def matrix(
    shape: tuple[int, int], sigma: Tensor, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """U diag(sigma) Vᵀ with random orthonormal U, V of ``len(sigma)`` columns."""
    g = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(n, len(sigma), generator=g, dtype=torch.float64))[0]
        for n in shape
    )
    return ((u * sigma.double()) @ v.T).to(dtype)


def geometric(count: int, condition: float) -> Tensor:
    """Singular values from 1 down to 1/condition, equal ratios."""
    return (
        torch.logspace(0, 0, 1, dtype=torch.float64)
        if count == 1
        else condition ** (-torch.linspace(0, 1, count, dtype=torch.float64))
    )


def distance(got: Tensor, want: Tensor) -> float:
    """‖got − want‖_F / ‖want‖_F in float64."""
    norm = torch.linalg.vector_norm(want.double())
    return float(torch.linalg.vector_norm(got.double() - want.double()) / norm)
