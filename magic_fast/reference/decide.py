"""The first half of the element-wise merge in plain PyTorch: each mask, vote and winner, in float32
as docs/methods.md defines them (float64 only for float64 inputs)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
)
from magic_fast.reference import pcb, shares, vote
from magic_fast.reference.combine import (
    Decisions,
    bounds_of,
    contributions,
    decision_dtype,
    reduce,
    task_vectors,
    trimmed,
)
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
        scored = bounds_of(selection)
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
        count = vote.count_of(holds)
        factors = [
            shares.alone_factor(
                recipe.alone, int((h & (count == 1)).sum()), int((h & (count > 1)).sum())
            )
            for h in holds
        ]
        selection = replace(selection, alone=_rounded(factors, dtype))
    if recipe.needs_majority:
        selection = replace(selection, majority=vote.majority_of(vote.raw_vote(kept, recipe.vote)))
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
        v = trimmed(tau, mask, selection.factor[k])
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
    return vote.raw_vote(_decide_trim(taus, recipe, 0, None, selection)[1], recipe.vote)


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
        signs = vote.raw_vote(voted, recipe.vote)
        decisions.elected = vote.resolve_zero_votes(signs, recipe.zero_vote, selection.majority)
    if recipe.contributors is Contributors.AGREEING:
        assert decisions.elected is not None
        decisions.contributes = [vote.agrees(v, decisions.elected, recipe.zero_vote) for v in voted]
    elif recipe.contributors is Contributors.NONZERO:
        decisions.contributes = [v != 0 for v in voted]
    else:
        decisions.contributes = [None] * len(voted)
    if recipe.reduce is Reduce.MAX:
        values = contributions(taus, recipe, decisions, dtype)
        later_wins = recipe.vote is Vote.NONE
        decisions.winner = vote.winner_of(values, decisions.contributes, later_wins)
    if recipe.consensus is not None:
        decisions.consensus = _consensus(taus, recipe, decisions, task_masks, dtype)
    return decisions


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
        merged = reduce(taus, recipe, decisions, dtype)
        masks = vote.task_masks(taus, merged, rule.lambdas)
    return vote.consensus(masks, rule.min_tasks)
