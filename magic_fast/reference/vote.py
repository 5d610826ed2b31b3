"""Who is elected at each element, who agrees, and who is largest; masks that look across experts:
TALL masks and the consensus of them (docs/methods.md; Wang et al., "Localizing Task Information for
Improved Model Merging and Compression", arXiv 2405.07813)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magic_fast.recipe import Vote, ZeroVote


def raw_vote(voted: Sequence[Tensor], vote: Vote) -> Tensor:
    """Signs (−1, 0, 1) of the vote over the experts, before zero votes are resolved."""
    if vote is Vote.NORM_FRACTION:
        share = torch.stack([v.square() / v.square().sum() for v in voted])
        values = torch.stack(list(voted))
        return torch.sign(values.gather(0, share.argmax(0, keepdim=True))[0])
    total = torch.zeros_like(voted[0])
    for v in voted:
        if vote is Vote.MASS:
            total += v
        elif vote is Vote.COUNT:
            total += torch.sign(v)
        else:
            total += torch.sign(v) * v.square() / v.square().sum()
    return torch.sign(total)


def majority_of(signs: Tensor) -> int:
    """Sign of the sum of all signs, counted in int64."""
    total = int(signs.to(torch.int64).sum())
    return (total > 0) - (total < 0)


def resolve_zero_votes(signs: Tensor, rule: ZeroVote, majority: int) -> Tensor:
    fill = {
        ZeroVote.POSITIVE: 1,
        ZeroVote.NEGATIVE: -1,
        ZeroVote.MAJORITY: majority,
        ZeroVote.DROP: 0,
    }
    return torch.where(signs == 0, torch.full_like(signs, fill[rule]), signs).to(torch.int8)


def agrees(v: Tensor, elected: Tensor, rule: ZeroVote) -> Tensor:
    """Non-zero and of the elected sign; an unresolved majority (elected 0) keeps the negatives."""
    if rule is ZeroVote.DROP:
        return (v > 0) & (elected > 0) | (v < 0) & (elected < 0)
    return (v > 0) & (elected > 0) | (v < 0) & (elected <= 0)


def winner_of(
    values: Sequence[Tensor], contributes: Sequence[Tensor | None], later_wins: bool
) -> Tensor:
    """Index of the contributor of largest magnitude; −1 where nobody contributes."""
    best = torch.full_like(values[0], -1.0)
    winner = torch.full(values[0].shape, -1, dtype=torch.int16, device=best.device)
    for k, (v, c) in enumerate(zip(values, contributes, strict=True)):
        magnitude = v.abs()
        wins = (magnitude >= best) if later_wins else (magnitude > best)
        if c is not None:
            wins &= c
        best = torch.where(wins, magnitude, best)
        winner[wins] = k
    return winner


def count_of(masks: Sequence[Tensor]) -> Tensor:
    """How many of the masks have an entry, int16."""
    count = torch.zeros(masks[0].shape, dtype=torch.int16, device=masks[0].device)
    for mask in masks:
        count += mask
    return count


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
    return count_of([mask.to(torch.bool) for mask in masks]) >= min_tasks
