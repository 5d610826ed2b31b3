"""The second half of the element-wise merge in plain PyTorch: sums, from decisions already taken,
in float32, or in float64 where it serves as the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from magic_fast.recipe import Contributors, Recipe, Reduce, Selection, Vote, Weigh
from magic_fast.reference import pcb
from magic_fast.reference.vote import count_of

LEAST_DISTANCE = 1e-6  # what is nearer to the base counts as this far from it, of a limit


@dataclass
class Decisions:
    """Everything discrete about a merge, plus the factors.

    Attributes:
        selection: thresholds, cuts, factors, majority.
        keep: bool mask per expert, None where everything stays.
        elected: int8 sign per element with zero votes resolved, or None without a vote.
        contributes: bool mask per expert, None where every kept entry contributes.
        winner: int16 index of the expert that ``Reduce.MAX`` takes (−1: none), or None.
        consensus: bool per element, or None.
        keep_probability: per expert of a random trim, a number or (DELLA) a float64 tensor; None
            otherwise.
    """

    selection: Selection
    keep: list[Tensor | None]
    elected: Tensor | None = None
    contributes: list[Tensor | None] | None = None
    winner: Tensor | None = None
    consensus: Tensor | None = None
    keep_probability: list[float | Tensor] | None = None


def decision_dtype(base: Tensor | None, experts: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 where any input is float64."""
    given = [*experts] if base is None else [base, *experts]
    return torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32


def task_vectors(
    base: Tensor | None, experts: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """τ_k = fl(θ_k − θ_0), each rounded once to ``dtype``."""
    if base is None:
        return [e.to(dtype) for e in experts]
    zero = base.to(dtype)
    return [e.to(dtype) - zero for e in experts]


def trimmed(tau: Tensor, keep: Tensor | None, factor: float) -> Tensor:
    """fl(factor·τ) where kept, 0 elsewhere."""
    x = tau if keep is None else torch.where(keep, tau, torch.zeros_like(tau))
    return x if factor == 1.0 else x * factor


def combine(
    base: Tensor | None,
    experts: Sequence[Tensor],
    recipe: Recipe,
    decisions: Decisions,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """d = scale·Δ in ``dtype``, from decisions already taken."""
    taus = task_vectors(base, experts, dtype)
    delta = reduce(taus, recipe, decisions, dtype)
    if decisions.consensus is not None:
        delta = torch.where(decisions.consensus, delta, torch.zeros_like(delta))
    if recipe.limit is not None:
        # w·Δ, w = min(1, limit ÷ max(|Δ|, 1e-6))
        delta = delta * (recipe.limit / delta.abs().clamp(min=LEAST_DISTANCE)).clamp(max=1.0)
    return delta if recipe.scale == 1.0 else delta * recipe.scale


def reduce(
    taus: Sequence[Tensor], recipe: Recipe, decisions: Decisions, dtype: torch.dtype
) -> Tensor:
    """Δ before consensus and scale."""
    if recipe.weigh is Weigh.SCORE and taus[0].numel():
        return pcb.pcb(taus, bounds_of(decisions.selection))
    values = contributions(taus, recipe, decisions, dtype)
    contributes = decisions.contributes
    assert contributes is not None
    zero = torch.zeros_like(values[0])
    if recipe.reduce is Reduce.MEDIAN:
        result = torch.stack(values).median(dim=0).values
    elif recipe.reduce is Reduce.MAX:
        result = _take_winner(values, recipe, decisions)
    else:
        result = zero.clone()
        for v, c in zip(values, contributes, strict=True):
            result += v if c is None else torch.where(c, v, zero)
        if recipe.reduce is not Reduce.SUM:
            result = result / _divisor(values[0], recipe, decisions)
        if recipe.alone is not None:
            result = result * _alone(values[0], decisions)
    if recipe.signed_result and decisions.elected is not None:
        result = result.abs() * decisions.elected.to(dtype)
    return result


def contributions(
    taus: Sequence[Tensor], recipe: Recipe, decisions: Decisions, dtype: torch.dtype
) -> list[Tensor]:
    """w_k·factor_k·τ_k with trimmed entries 0, in ``dtype``."""
    out = []
    for k, tau in enumerate(taus):
        x = trimmed(tau.to(dtype), decisions.keep[k], decisions.selection.factor[k])
        w = weights_of(recipe, decisions)[k]
        out.append(x if w == 1.0 else x * w)
    return out


def weights_of(recipe: Recipe, decisions: Decisions) -> tuple[float, ...]:
    return decisions.selection.weights or recipe.weights


def bounds_of(selection: Selection) -> pcb.Bounds:
    return pcb.Bounds(
        selection.threshold, selection.top_threshold, selection.score_cut, selection.score_top
    )


def _take_winner(values: Sequence[Tensor], recipe: Recipe, decisions: Decisions) -> Tensor:
    assert decisions.winner is not None
    result = torch.zeros_like(values[0])
    for k, v in enumerate(values):
        result = torch.where(decisions.winner == k, v, result)
    if decisions.elected is not None and recipe.contributors is Contributors.AGREEING:
        # an unresolved majority elects nobody: 0
        result = torch.where(decisions.elected == 0, torch.zeros_like(result), result)
    return result


def _divisor(like: Tensor, recipe: Recipe, decisions: Decisions) -> Tensor:
    """What the sum over the contributors is divided by."""
    contributes = decisions.contributes
    assert contributes is not None
    total = torch.zeros_like(like)
    if recipe.reduce is Reduce.MEAN:
        for c in contributes:
            total += 1 if c is None else c
        return total.clamp(min=1)
    for w, c in zip(weights_of(recipe, decisions), contributes, strict=True):
        total += w if c is None else w * c.to(total.dtype)
    if recipe.least:
        return total.clamp(min=recipe.least)
    unusable = total == 0 if recipe.vote is not Vote.NONE else total.abs() < 1e-8
    return torch.where(unusable, torch.ones_like(total), total)


def _alone(like: Tensor, decisions: Decisions) -> Tensor:
    """The factor of the one contributor where there is one, 1 elsewhere."""
    assert decisions.contributes is not None
    held = [c for c in decisions.contributes if c is not None]
    count = count_of(held)
    factor = torch.ones_like(like)
    for c, f in zip(held, decisions.selection.alone, strict=True):
        factor = torch.where(c & (count == 1), torch.full_like(factor, f), factor)
    return factor
