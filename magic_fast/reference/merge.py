"""The element-wise merge in plain PyTorch, stage by stage: the specification in code.

First *decide* (float32, as docs/methods.md defines every mask, vote and winner), then *combine*
(float32; float64 when it serves as the oracle, with the same decisions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from magic_fast.recipe import (
    Align,
    Contributors,
    Recipe,
    Reduce,
    Rescale,
    Selection,
    Vote,
    VoteOn,
    Weigh,
    ZeroVote,
)
from magic_fast.reference import consensus, pcb, shares
from magic_fast.reference.trim import (
    keep_above,
    keep_mask,
    keep_probabilities,
    rescale_factor,
    select_trim,
    select_variance,
    tensor_norm,
    variance,
)

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


def _trimmed(tau: Tensor, keep: Tensor | None, factor: float) -> Tensor:
    """fl(factor·τ) where kept, 0 elsewhere."""
    x = tau if keep is None else torch.where(keep, tau, torch.zeros_like(tau))
    return x if factor == 1.0 else x * factor


def _raw_vote(voted: Sequence[Tensor], vote: Vote) -> Tensor:
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


def _majority(signs: Tensor) -> int:
    """Sign of the sum of all signs, counted in int64."""
    total = int(signs.to(torch.int64).sum())
    return (total > 0) - (total < 0)


def _resolve_zero_votes(signs: Tensor, rule: ZeroVote, majority: int) -> Tensor:
    fill = {
        ZeroVote.POSITIVE: 1,
        ZeroVote.NEGATIVE: -1,
        ZeroVote.MAJORITY: majority,
        ZeroVote.DROP: 0,
    }
    return torch.where(signs == 0, torch.full_like(signs, fill[rule]), signs).to(torch.int8)


def _agrees(v: Tensor, elected: Tensor, rule: ZeroVote) -> Tensor:
    """Non-zero and of the elected sign; an unresolved majority (elected 0) keeps the negatives."""
    if rule is ZeroVote.DROP:
        return (v > 0) & (elected > 0) | (v < 0) & (elected < 0)
    return (v > 0) & (elected > 0) | (v < 0) & (elected <= 0)


def _winner(
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


def select(
    base: Tensor | None,
    experts: Sequence[Tensor],
    recipe: Recipe,
    *,
    stream: int = 0,
    masks: Sequence[Tensor | None] | None = None,
) -> Selection:
    """Thresholds, tie cuts, factors and majority sign of one tensor (see ``Selection``); one task
    vector is held at a time, unless experts are compared."""
    dtype = decision_dtype(base, experts)
    bounds, factors, lengths = [], [], []
    shared = None
    if recipe.needs_variance:
        shared = select_variance(task_vectors(base, experts, dtype), recipe.trim)
    for k, expert in enumerate(experts):
        tau = task_vectors(base, [expert], dtype)[0]
        bounds.append(shared or select_trim(tau, recipe.trim, k))
        given = masks[k] if masks is not None else None
        factor, keep = 1.0, None
        if recipe.rescale is not Rescale.NONE or recipe.needs_majority:
            keep = keep_mask(tau, recipe.trim, k, bounds=bounds[k], stream=stream, given=given)
            factor = rescale_factor(tau, keep, recipe, k)
        lengths.append(_length(tau, recipe))
        factors.append(factor)
    lows, cuts, tops, top_cuts = zip(*bounds, strict=True)
    own = _rounded(shares.aligned(factors, lengths), dtype)
    selection = Selection(lows, cuts, tops, top_cuts, own)
    if recipe.looks_across or recipe.needs_majority:
        selection = _found(task_vectors(base, experts, dtype), recipe, stream, masks, selection)
    return selection


def _rounded(values: Sequence[float], dtype: torch.dtype) -> tuple[float, ...]:
    """Each rounded once to ``dtype``."""
    return tuple(torch.tensor(values, dtype=torch.float64).to(dtype).tolist())


def _length(tau: Tensor, recipe: Recipe) -> float:
    return tensor_norm(tau, Rescale.L2) if recipe.align is not Align.NONE else 1.0


def _count(masks: Sequence[Tensor]) -> Tensor:
    """How many of the masks have an entry, int16."""
    count = torch.zeros(masks[0].shape, dtype=torch.int16, device=masks[0].device)
    for mask in masks:
        count += mask
    return count


def _found(
    taus: Sequence[Tensor],
    recipe: Recipe,
    stream: int,
    masks: Sequence[Tensor | None] | None,
    selection: Selection,
) -> Selection:
    """What comes of the trimmed task vectors of a whole tensor: weights, and factors of what one
    expert alone holds."""
    _, kept = _decide_trim(taus, recipe, stream, masks, selection)
    dtype = taus[0].dtype
    if recipe.weigh is Weigh.SCORE:
        scored = _bounds_of(selection)
        if taus[0].numel():
            scored = pcb.tensor_scores(taus, recipe.trim, scored)
        selection = replace(selection, score_cut=scored.cut, score_top=scored.top)
    if recipe.weigh is Weigh.ENERGY:
        n = max(1, taus[0].numel())
        means = [float(v.double().square().sum()) / n for v in kept]
        weights = _rounded(shares.energy_weights(means, recipe.least), dtype)
        selection = replace(selection, weights=weights)
    if recipe.alone is not None:
        holds = [v != 0 for v in kept]
        count = _count(holds)
        factors = [
            shares.alone_factor(
                recipe.alone, int((h & (count == 1)).sum()), int((h & (count > 1)).sum())
            )
            for h in holds
        ]
        selection = replace(selection, alone=_rounded(factors, dtype))
    if recipe.needs_majority:
        selection = replace(selection, majority=_majority(_raw_vote(kept, recipe.vote)))
    return selection


def _decide_trim(
    taus: Sequence[Tensor],
    recipe: Recipe,
    stream: int,
    masks: Sequence[Tensor | None] | None,
    selection: Selection,
    offset: int = 0,
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Keep masks and the vectors voted on."""
    keep, voted = [], []
    shared = None
    if recipe.needs_variance:  # one mask for all
        shared = keep_above(variance(taus), selection.threshold[0], selection.tie_cut[0], offset)
    for k, tau in enumerate(taus):
        bounds = (
            selection.threshold[k],
            selection.tie_cut[k],
            selection.top_threshold[k],
            selection.top_tie_cut[k],
        )
        given = masks[k] if masks is not None else shared
        mask = keep_mask(
            tau, recipe.trim, k, bounds=bounds, stream=stream, offset=offset, given=given
        )
        v = _trimmed(tau, mask, selection.factor[k])
        keep.append(mask)
        weighted = recipe.vote_on is VoteOn.WEIGHTED and recipe.weights[k] != 1.0
        voted.append(v * recipe.weights[k] if weighted else v)
    return keep, voted


def factors(
    base: Tensor | None, experts: Sequence[Tensor], recipe: Recipe, selection: Selection
) -> tuple[float, ...]:
    """What makes up for the trimmed entries of each expert, thresholds given."""
    dtype = decision_dtype(base, experts)
    taus = task_vectors(base, experts, dtype)
    keep = _decide_trim(taus, recipe, 0, None, selection)[0]
    found = [
        rescale_factor(t, m, recipe, k) for k, (t, m) in enumerate(zip(taus, keep, strict=True))
    ]
    return _rounded(shares.aligned(found, [_length(t, recipe) for t in taus]), dtype)


def raw_signs(
    base: Tensor | None, experts: Sequence[Tensor], recipe: Recipe, selection: Selection
) -> Tensor:
    """Signs of the vote before zero votes are resolved, with thresholds given."""
    taus = task_vectors(base, experts, decision_dtype(base, experts))
    return _raw_vote(_decide_trim(taus, recipe, 0, None, selection)[1], recipe.vote)


def decide(
    base: Tensor | None,
    experts: Sequence[Tensor],
    recipe: Recipe,
    *,
    stream: int = 0,
    offset: int = 0,
    masks: Sequence[Tensor | None] | None = None,
    task_masks: Sequence[Tensor] | None = None,
    selection: Selection | None = None,
) -> Decisions:
    """Every mask, vote and winner of one tensor, in float32 (float64 only for float64 inputs)."""
    dtype = decision_dtype(base, experts)
    taus = task_vectors(base, experts, dtype)
    if selection is None:
        selection = select(base, experts, recipe, stream=stream, masks=masks)
    keep, voted = _decide_trim(taus, recipe, stream, masks, selection, offset)
    decisions = Decisions(selection, keep, keep_probability=keep_probabilities(taus, recipe.trim))
    if recipe.vote is not Vote.NONE:
        signs = _raw_vote(voted, recipe.vote)
        decisions.elected = _resolve_zero_votes(signs, recipe.zero_vote, selection.majority)
    if recipe.contributors is Contributors.AGREEING:
        assert decisions.elected is not None
        decisions.contributes = [_agrees(v, decisions.elected, recipe.zero_vote) for v in voted]
    elif recipe.contributors is Contributors.NONZERO:
        decisions.contributes = [v != 0 for v in voted]
    else:
        decisions.contributes = [None] * len(voted)
    if recipe.reduce is Reduce.MAX:
        values = _contributions(taus, recipe, decisions, dtype)
        later_wins = recipe.vote is Vote.NONE
        decisions.winner = _winner(values, decisions.contributes, later_wins)
    if recipe.consensus is not None:
        decisions.consensus = _consensus(taus, recipe, decisions, task_masks, dtype)
    return decisions


def _contributions(
    taus: Sequence[Tensor], recipe: Recipe, decisions: Decisions, dtype: torch.dtype
) -> list[Tensor]:
    """w_k·factor_k·τ_k with trimmed entries 0, in ``dtype``."""
    out = []
    for k, tau in enumerate(taus):
        x = _trimmed(tau.to(dtype), decisions.keep[k], decisions.selection.factor[k])
        w = _weights(recipe, decisions)[k]
        out.append(x if w == 1.0 else x * w)
    return out


def _weights(recipe: Recipe, decisions: Decisions) -> tuple[float, ...]:
    return decisions.selection.weights or recipe.weights


def _consensus(
    taus: Sequence[Tensor],
    recipe: Recipe,
    decisions: Decisions,
    task_masks: Sequence[Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    rule = recipe.consensus
    assert rule is not None
    if rule.given:
        assert task_masks is not None
        masks = list(task_masks)
    else:
        merged = _reduce(taus, recipe, decisions, dtype)
        masks = consensus.task_masks(taus, merged, rule.lambdas)
    return consensus.consensus(masks, rule.min_tasks)


def _bounds_of(selection: Selection) -> pcb.Bounds:
    return pcb.Bounds(
        selection.threshold, selection.top_threshold, selection.score_cut, selection.score_top
    )


def _reduce(
    taus: Sequence[Tensor], recipe: Recipe, decisions: Decisions, dtype: torch.dtype
) -> Tensor:
    """Δ before consensus and scale."""
    if recipe.weigh is Weigh.SCORE and taus[0].numel():
        return pcb.pcb(taus, _bounds_of(decisions.selection))
    values = _contributions(taus, recipe, decisions, dtype)
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


def _take_winner(values: Sequence[Tensor], recipe: Recipe, decisions: Decisions) -> Tensor:
    assert decisions.winner is not None
    result = torch.zeros_like(values[0])
    for k, v in enumerate(values):
        result = torch.where(decisions.winner == k, v, result)
    if decisions.elected is not None and recipe.contributors is Contributors.AGREEING:
        # an unresolved majority elects nobody: 0
        result = torch.where(decisions.elected == 0, torch.zeros_like(result), result)
    return result


def _alone(like: Tensor, decisions: Decisions) -> Tensor:
    """The factor of the one contributor where there is one, 1 elsewhere."""
    assert decisions.contributes is not None
    held = [c for c in decisions.contributes if c is not None]
    count = _count(held)
    factor = torch.ones_like(like)
    for c, f in zip(held, decisions.selection.alone, strict=True):
        factor = torch.where(c & (count == 1), torch.full_like(factor, f), factor)
    return factor


def _limited(delta: Tensor, limit: float) -> Tensor:
    """w·Δ, w = min(1, limit ÷ max(|Δ|, 1e-6))."""
    return delta * (limit / delta.abs().clamp(min=LEAST_DISTANCE)).clamp(max=1.0)


def _divisor(like: Tensor, recipe: Recipe, decisions: Decisions) -> Tensor:
    """What the sum over the contributors is divided by."""
    contributes = decisions.contributes
    assert contributes is not None
    total = torch.zeros_like(like)
    if recipe.reduce is Reduce.MEAN:
        for c in contributes:
            total += 1 if c is None else c
        return total.clamp(min=1)
    for w, c in zip(_weights(recipe, decisions), contributes, strict=True):
        total += w if c is None else w * c.to(total.dtype)
    if recipe.least:
        return total.clamp(min=recipe.least)
    unusable = total == 0 if recipe.vote is not Vote.NONE else total.abs() < 1e-8
    return torch.where(unusable, torch.ones_like(total), total)


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
    delta = _reduce(taus, recipe, decisions, dtype)
    if decisions.consensus is not None:
        delta = torch.where(decisions.consensus, delta, torch.zeros_like(delta))
    if recipe.limit is not None:
        delta = _limited(delta, recipe.limit)
    return delta if recipe.scale == 1.0 else delta * recipe.scale
