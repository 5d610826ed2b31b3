"""SCE: select, calculate, erase (FuseChat, arXiv 2408.07990; docs/methods.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from magic_fast.recipe import TieRule
from magic_fast.reference.trim import keep_above, threshold_and_cut

_LEAST = 1e-6  # preset mergekit: least total of squares, and least sum of shares


def selected(taus: Sequence[Tensor], select_topk: float) -> Tensor | None:
    """bool: the ⌊select_topk·#(variance ≠ 0)⌋ elements of the largest biased variance over the
    experts, equal ones by index; None where all stay (``select_topk`` = 1)."""
    if select_topk >= 1:
        return None
    mean = torch.zeros_like(taus[0])
    for t in taus:
        mean += t
    mean /= len(taus)
    variance = torch.zeros_like(mean)
    for t in taus:
        variance += (t - mean).square()
    variance /= len(taus)
    count = math.trunc(float(torch.count_nonzero(variance)) * select_topk)
    threshold, cut = threshold_and_cut(variance, count, TieRule.EXACT)
    return keep_above(variance, threshold, cut)


def sce(taus: Sequence[Tensor], select_topk: float = 1.0, *, absolute: bool = False) -> Tensor:
    """Δ = Σ_C ω_k·δ_k / Σ_C ω_k over the experts C that agree with the elected sign.

    δ_k are the task vectors where :func:`selected` keeps them, ω_k = mean(δ_k²) as a share of all
    K, the sign that of Σ_k δ_k with zero votes positive. All else is 0.

    Args:
        taus: K task vectors, float32 or float64.
        select_topk: kept fraction of the elements that differ between experts, in (0, 1].
        absolute: mergekit's bounds: equal shares where Σ mean(δ²) < 1e-6, a divisor of at least
            1e-6. Else both act at 0 only, whatever the scale of the task vectors.

    Returns:
        Δ, shape and dtype of a task vector.

    >>> sce([torch.tensor([1.0, -1.0]), torch.tensor([3.0, 2.0])])
    tensor([2.7333, 2.0000])
    """
    kept = selected(taus, select_topk)
    zero = torch.zeros_like(taus[0])
    deltas = list(taus) if kept is None else [torch.where(kept, t, zero) for t in taus]
    shares = _shares(deltas, absolute)
    vote = zero.clone()
    for d in deltas:
        vote += d
    positive = vote >= 0
    total, divisor = zero.clone(), zero.clone()
    for d, share in zip(deltas, shares, strict=True):
        agrees = (d > 0) & positive | (d < 0) & ~positive
        total += torch.where(agrees, d * share, zero)
        divisor += agrees * share
    if absolute:
        return total / divisor.clamp(min=_LEAST)
    return total / torch.where(divisor == 0, torch.ones_like(divisor), divisor)


def _shares(deltas: Sequence[Tensor], absolute: bool) -> list[float]:
    """mean(δ_k²) of each expert ÷ their sum; equal where there is none."""
    if not deltas[0].numel():
        return [1.0 / len(deltas)] * len(deltas)
    squares = torch.stack([d.double().square().mean() for d in deltas]).tolist()
    total = math.fsum(squares)
    if total == 0 or (absolute and total < _LEAST):
        return [1.0 / len(deltas)] * len(deltas)
    return [s / total for s in squares]
