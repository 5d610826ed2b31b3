"""The stages of a merge that have settings of their own: trim, consensus, what stands alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from magic_fast.errors import InputError
from magic_fast.recipe.words import CountRule, TieRule, TrimRule, TrimScope


@dataclass(frozen=True)
class Trim:
    """Which entries of each expert's task vector stay. Per-expert fields have one number per
    expert.

    Attributes:
        rule: the trim.
        density: kept fraction q of each expert, in (0, 1]; q = 1 keeps all and skips every other
            check. ``VARIANCE``: of the entries that differ between experts, one for all experts.
            ``COMPETE``: share of the scores that count.
        gamma: Breadcrumbs: share of the very largest entries that is dropped.
        epsilon: DELLA: half the range of the keep probability. ``THRESHOLD``: what a magnitude
            must exceed.
        count_rule, tie_rule, scope: see the enums.
        min_kept: with ``CountRule.FLOOR`` the least number kept (1; PEFT: 0).
        seed: of the counter-based generator (random and ranked trims).
        rank_dim1: DELLA ranks within each ``x[i]`` flattened (a 1-D tensor is one row); True: along
            dimension 1 alone, whatever the rank (mergekit's rule, different from three dimensions
            on).
        empty_band_zeroes: mergekit 0.1.4's fault: a band without outliers (⌊γ·n⌋ = 0) keeps
            nothing.
    """

    rule: TrimRule = TrimRule.NONE
    density: tuple[float, ...] = ()
    gamma: tuple[float, ...] = ()
    epsilon: tuple[float, ...] = ()
    count_rule: CountRule = CountRule.FLOOR
    tie_rule: TieRule = TieRule.EXACT
    scope: TrimScope = TrimScope.TENSOR
    min_kept: int = 1
    seed: int = 0
    rank_dim1: bool = False
    empty_band_zeroes: bool = False

    def __post_init__(self) -> None:
        if self.rule in (TrimRule.NONE, TrimRule.GIVEN):
            return
        if self.rule is TrimRule.THRESHOLD:
            for k, e in enumerate(self.epsilon):
                if not 0 <= e < math.inf:
                    raise InputError(
                        f"epsilon of expert {k}: expected a finite number >= 0, got {e!r}."
                    )
            return
        for k, q in enumerate(self.density):
            if self.rule is TrimRule.STD:
                if not 0 <= q < math.inf:
                    raise InputError(f"threshold of expert {k}: expected >= 0, got {q!r}.")
                continue
            if not (isinstance(q, int | float) and 0 < q <= 1):
                raise InputError(
                    f"density of expert {k}: expected a fraction in (0, 1], got {q!r}. "
                    "It is the kept fraction, never a percentage."
                )
            if q == 1:
                continue
            if self.rule is TrimRule.RANKED:
                e = self.epsilon[k]
                if not (0 <= e and 0 < q - e and q + e < 1):
                    raise InputError(
                        f"epsilon of expert {k}: expected 0 < density − epsilon and density + "
                        f"epsilon < 1, got density {q!r} and epsilon {e!r}."
                    )
            if self.rule is TrimRule.BAND:
                g = self.gamma[k]
                if not 0 <= g < 1:
                    raise InputError(
                        f"gamma of expert {k}: expected a fraction in [0, 1), got {g!r}."
                    )

    def active(self, k: int) -> bool:
        """Whether expert ``k`` loses any entry at all under this trim (a density of 1 skips it)."""
        if self.rule is TrimRule.NONE:
            return False
        if self.rule in (TrimRule.GIVEN, TrimRule.STD, TrimRule.THRESHOLD, TrimRule.COMPETE):
            return True
        return self.density[k] < 1

    @property
    def is_random(self) -> bool:
        """Whether coins decide (so masks can be fed in instead)."""
        return self.rule in (TrimRule.RANDOM, TrimRule.RANKED)

    @property
    def by_magnitude(self) -> bool:
        """Whether thresholds of |τ| decide (so a ``select`` pass is needed)."""
        return self.rule in (TrimRule.MAGNITUDE, TrimRule.BAND, TrimRule.COMPETE)

    def kept_count(self, k: int, n: int) -> int:
        """How many of ``n`` entries of expert ``k`` a magnitude trim keeps (before ties)."""
        q, floor = self.density[k], math.trunc(float(n) * float(self.density[k]))
        if n == 0:
            return 0
        if self.count_rule is CountRule.FLOOR_PLUS_ONE:
            return min(floor + 1, n)
        if self.count_rule is CountRule.COMPLEMENT_PLUS_ONE:
            return n - max(math.trunc((1.0 - q) * float(n)), 1) + 1
        return min(max(floor, self.min_kept), n)

    def drop_count(self, k: int, n: int) -> int:
        """How many entries ``TieRule.DROP_ALL`` drops at least: ⌊(1−q)·n⌋."""
        return math.trunc(float(n) * (1.0 - self.density[k]))

    def band_counts(self, k: int, n: int) -> tuple[int, int]:
        """(n_top, kept) of a band trim: entries ``n_top <= rank < n_top + kept`` stay."""
        kept = math.trunc(float(n) * float(self.density[k]))
        top = math.trunc(float(n) * float(self.gamma[k]))
        if self.empty_band_zeroes and top == 0:
            return 0, 0
        return min(top, n - kept), kept

    @staticmethod
    def tail_ranks(n: int) -> tuple[int, int]:
        """``COMPETE``: ranks, from the largest, of the magnitudes that bound an expert of ``n`` > 0
        entries: 0.01 % lie beyond each."""
        low, high = math.trunc(1e-4 * n), max(math.trunc((1 - 1e-4) * n - 1), 0)
        return n - low, n - high

    def score_index(self, k: int, n: int) -> int:
        """``COMPETE``: place, ascending from 0, of the score up to which scores count as
        nothing."""
        return min(math.trunc((1 - self.density[k]) * n), n - 1)


@dataclass(frozen=True)
class Consensus:
    """Keep coordinates that enough tasks need: |τ_t| > λ_t·|Δ − τ_t| for at least ``min_tasks`` of
    them.

    ``given=True``: the task masks are fed in instead of computed.
    """

    lambdas: tuple[float, ...]
    min_tasks: int = 2
    given: bool = False


@dataclass(frozen=True)
class Alone:
    """What one contributor alone holds of an entry counts 1 + r·clamp(shared_k ÷ max(unique_k, ε),
    0, alpha) times: unique_k and shared_k are the entries of the tensor that expert k keeps alone
    and together with others (RAM+)."""

    r: float
    alpha: float
    epsilon: float
