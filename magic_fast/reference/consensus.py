"""Masks that look across experts: TALL masks and the consensus of them (docs/methods.md;
Wang et al., "Localizing Task Information for Improved Model Merging and Compression",
arXiv 2405.07813)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def task_masks(taus: Sequence[Tensor], merged: Tensor, lambdas: Sequence[float]) -> list[Tensor]:
    """Where each task needs its own weights: |τ_t| > λ_t·|Δ − τ_t|, strictly.

    Args:
        taus: K raw task vectors, float32 or float64.
        merged: the merged task vector Δ, same shape and dtype.
        lambdas: K numbers ≥ 0.

    Returns:
        K bool masks.

    >>> task_masks([torch.tensor([3.0, 1.0])], torch.tensor([4.0, 5.0]), [0.5])
    [tensor([ True, False])]
    """
    return [t.abs() > lam * (merged - t).abs() for t, lam in zip(taus, lambdas, strict=True)]


def consensus(masks: Sequence[Tensor], min_tasks: int) -> Tensor:
    """bool: elements that at least ``min_tasks`` of the K masks keep.

    >>> consensus([torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0])], 2)
    tensor([False,  True, False])
    """
    votes = torch.zeros(masks[0].shape, dtype=torch.int16, device=masks[0].device)
    for mask in masks:
        votes += mask.to(torch.bool)
    return votes >= min_tasks
