"""EMR: elect one unified task vector, mask and rescale it for each task (Huang et al.,
arXiv 2405.17461; docs/methods.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def masks(taus: Sequence[Tensor]) -> list[Tensor]:
    """M_k = [τ_k·σ > 0] with σ = + where Σ_j τ_j > 0, else −. K bool masks."""
    total = torch.zeros_like(taus[0])
    for t in taus:
        total += t
    positive = total > 0
    return [(t > 0) & positive | (t < 0) & ~positive for t in taus]


def mean_magnitude(x: Tensor) -> float:
    """mean|x|, summed in float64; 0 for an empty tensor."""
    return float(x.abs().sum(dtype=torch.float64)) / max(x.numel(), 1)
