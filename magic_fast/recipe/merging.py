"""A merge as data: :class:`Recipe`, and its numbers, refused where they do not fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from magic_fast.errors import InputError
from magic_fast.recipe.stages import Alone, Consensus, Trim
from magic_fast.recipe.words import (
    Align,
    Contributors,
    Reduce,
    Rescale,
    TrimRule,
    TrimScope,
    Vote,
    VoteOn,
    Weigh,
    ZeroVote,
)

_WITHOUT_DENSITY = (TrimRule.NONE, TrimRule.GIVEN, TrimRule.THRESHOLD)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def per_expert(value: float | Sequence[float], num_experts: int, what: str) -> tuple[float, ...]:
    """K numbers from one number or K numbers; an error says which parameter had another count."""
    if isinstance(value, int | float):
        return (float(value),) * num_experts
    values = tuple(float(v) for v in value)
    if len(values) != num_experts:
        raise InputError(
            f"{what}: expected one number or one per expert ({num_experts}), got {len(values)}."
        )
    return values


@dataclass(frozen=True)
class Recipe:
    """One element-wise merge. ``len(weights)`` is the number of experts.

    ``weigh``: under ``ENERGY`` the weights are found, and ``weights`` says no more than how many
    there are. ``least``: below it their sum counts as nothing, and a divisor is at least as large
    (mergekit's 1e-6).

    ``limit``: an entry of Δ counts with w·Δ, w = min(1, limit ÷ max(|Δ|, 1e-6)): up to that size
    (NearSwap).

    ``signed_result``: the reduction over all experts is given the elected sign, |result|·sign
    (only the original TIES code's ``mean | sum | median | magnitude`` do this; reference only).
    """

    weights: tuple[float, ...]
    trim: Trim = field(default_factory=Trim)
    rescale: Rescale = Rescale.NONE
    align: Align = Align.NONE
    vote: Vote = Vote.NONE
    vote_on: VoteOn = VoteOn.WEIGHTED
    zero_vote: ZeroVote = ZeroVote.POSITIVE
    contributors: Contributors = Contributors.ALL
    reduce: Reduce = Reduce.SUM
    consensus: Consensus | None = None
    scale: float = 1.0
    signed_result: bool = False
    weigh: Weigh = Weigh.GIVEN
    least: float = 0.0
    alone: Alone | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        k = self.num_experts
        check(k >= 1, "experts: expected at least one, got none.")
        # numbers are spelled only where one is wrong: that takes longer than all comparisons
        for i, w in enumerate(self.weights):
            if not math.isfinite(w):
                raise InputError(f"weight of expert {i}: expected a finite number, got {w!r}.")
        if not math.isfinite(self.scale):
            raise InputError(f"scale: expected a finite number, got {self.scale!r}.")
        t = self.trim
        for what, values, needed in (
            ("density", t.density, t.rule not in _WITHOUT_DENSITY),
            ("gamma", t.gamma, t.rule is TrimRule.BAND),
            ("epsilon", t.epsilon, t.rule in (TrimRule.RANKED, TrimRule.THRESHOLD)),
        ):
            if needed and len(values) != k:
                raise InputError(
                    f"{what}: expected one number per expert ({k}), got {len(values)}."
                )
        check(
            (self.contributors is Contributors.AGREEING) <= (self.vote is not Vote.NONE),
            "contributors='agreeing': expected a vote, got vote='none'.",
        )
        if t.rule is TrimRule.VARIANCE and len(set(t.density)) != 1:
            raise InputError(
                f"density of the trim 'variance': expected one for all experts, got {t.density}."
            )
        voted = self.vote is Vote.MASS and self.vote_on is VoteOn.UNWEIGHTED
        agreeing = voted and self.contributors is Contributors.AGREEING
        check(
            self.weigh is not Weigh.ENERGY or (agreeing and self.reduce is Reduce.WEIGHTED_MEAN),
            "weigh='energy': expected a weighted mean of those that agree with an unweighted vote "
            "of masses.",
        )
        plain = self.vote is Vote.NONE and self.contributors is Contributors.ALL
        scored = self.weigh is Weigh.SCORE
        check(
            scored == (t.rule is TrimRule.COMPETE)
            and (not scored or (plain and self.reduce is Reduce.WEIGHTED_MEAN)),
            "weigh='score': expected a weighted mean of all, without a vote, under the trim "
            "'compete'.",
        )
        check(
            self.alone is None
            or (self.contributors is Contributors.NONZERO and self.reduce is Reduce.MEAN),
            "alone: expected a mean of the entries that are not zero.",
        )
        check(
            not (
                t.rule is TrimRule.GIVEN
                and self.rescale is Rescale.KEEP_PROBABILITY
                and len(t.density) != k
            ),
            "rescale='keep_probability' with given masks: expected their density, got none. "
            "Pass density=.",
        )

    @property
    def num_experts(self) -> int:
        return len(self.weights)

    @property
    def needs_select(self) -> bool:
        """Whether a pass over the data must come before the merge pass."""
        by_magnitude = self.trim.by_magnitude and self.trims
        return by_magnitude or any(self.phases.values())

    @property
    def over_model(self) -> bool:
        """Whether one threshold over all tensors of the model trims each expert."""
        return self.trim.by_magnitude and self.trim.scope is TrimScope.MODEL

    @property
    def phases(self) -> dict[str, bool]:
        """What is found by passes of their own, in this order, and whether it is needed."""
        return {
            "variance": self.needs_variance,
            "factors": self.needs_factors,
            "weights": self.weigh is Weigh.ENERGY,
            "scores": self.weigh is Weigh.SCORE,
            "scores_rest": self.weigh is Weigh.SCORE,
            "alone": self.alone is not None,
            "majority": self.needs_majority,
        }

    @property
    def looks_across(self) -> bool:
        """Whether weights or factors come of what the experts hold together."""
        return self.weigh is not Weigh.GIVEN or self.alone is not None

    @property
    def needs_variance(self) -> bool:
        return self.trim.rule is TrimRule.VARIANCE and self.trims

    @property
    def trims(self) -> bool:
        """Whether any expert loses entries."""
        return any(self.trim.active(k) for k in range(self.num_experts))

    @property
    def needs_factors(self) -> bool:
        """Whether norms of the task vectors are needed, whole or before and after the trim."""
        return self.restores or self.align is not Align.NONE

    @property
    def restores(self) -> bool:
        """Whether a norm is restored after the trim."""
        return self.rescale in (Rescale.L1, Rescale.L2, Rescale.LINF) and self.trims

    @property
    def needs_majority(self) -> bool:
        return self.vote is not Vote.NONE and self.zero_vote is ZeroVote.MAJORITY

    @property
    def reference_only(self) -> str | None:
        """Why only the reference runs this recipe, or None."""
        if self.trim.rule in (TrimRule.STD, TrimRule.NORM_FRACTION):
            return f"trim '{self.trim.rule}' exists in the reference only"
        if self.vote in (Vote.NORM_FRACTION, Vote.NORM_MASS):
            return f"vote '{self.vote}' exists in the reference only"
        if self.reduce is Reduce.MEDIAN or self.signed_result:
            return "this reduction exists in the reference only"
        return None
