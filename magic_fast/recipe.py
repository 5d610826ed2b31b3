"""What a merge does, as data: frozen dataclasses and enums, and the checks of one field against
another.

A method is a :class:`Recipe`; a backend runs any recipe. The stages, in order, for one tensor with
experts ``θ_k`` and task vectors ``τ_k = θ_k − θ_0``::

    trim → rescale → align → weight → vote → contributors → reduce → consensus → limit → scale

Nothing here imports torch, numpy or any other part of the package but its errors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from magic_fast.errors import InputError


class _Word(str, Enum):
    """An enum whose members are their own words, so that a string is accepted at the public
    edge."""

    def __str__(self) -> str:
        return str(self.value)


class TrimRule(_Word):
    """Which entries of a task vector stay."""

    NONE = "none"
    MAGNITUDE = "magnitude"  # the largest |τ|
    RANDOM = "random"  # a coin per entry (DARE)
    RANKED = "ranked"  # a coin whose bias follows the rank in the row (DELLA)
    BAND = "band"  # the largest but for the very largest (Breadcrumbs)
    THRESHOLD = "threshold"  # |τ| > ε (RAM)
    VARIANCE = "variance"  # the largest variance over the experts, the same entries of each (SCE)
    GIVEN = "given"  # keep masks fed in
    STD = "std"  # |x − mean| > t·std            (reference only)
    NORM_FRACTION = "norm_fraction"  # shortest prefix by x²/‖x‖² (reference only)


class CountRule(_Word):
    """How many entries a magnitude trim keeps; ``⌊q·n⌋`` is ``trunc(double(n)·double(q))``."""

    FLOOR = "floor"  # max(min_kept, ⌊q·n⌋)
    FLOOR_PLUS_ONE = "floor_plus_one"  # ⌊q·n⌋ + 1
    COMPLEMENT_PLUS_ONE = "complement_plus_one"  # n − max(⌊(1−q)·n⌋, 1) + 1


class TieRule(_Word):
    """What happens to entries whose magnitude equals the threshold."""

    EXACT = "exact"  # the lowest flat index first, until the count is reached
    KEEP_ALL = "keep_all"
    DROP_ALL = "drop_all"


class TrimScope(_Word):
    TENSOR = "tensor"
    MODEL = "model"  # one threshold per expert over all merged tensors, names sorted, row-major


class Rescale(_Word):
    """What makes up for the trimmed entries."""

    NONE = "none"
    KEEP_PROBABILITY = "keep_probability"  # ÷ density
    L1 = "l1"  # × norm before ÷ norm after, whole tensor
    L2 = "l2"
    LINF = "linf"


class Align(_Word):
    """Whether the task vectors of a tensor are brought to one length before anything is added."""

    NONE = "none"
    MIN_NORM = "min_norm"  # × smallest L2 norm other than 0 ÷ own L2 norm, of the raw task vectors


class Weigh(_Word):
    """Where the weights come from."""

    GIVEN = "given"
    ENERGY = "energy"  # mean(τ²) of the trimmed task vector as a share of all K, tensor by tensor


class Vote(_Word):
    NONE = "none"
    MASS = "mass"  # sign(Σ v_k)
    COUNT = "count"  # sign(Σ sign(v_k))
    NORM_FRACTION = "norm_fraction"  # sign of the entry with the largest x²/‖x‖² (reference only)
    NORM_MASS = "norm_mass"  # sign(Σ sign(x)·x²/‖x‖²)                    (reference only)


class VoteOn(_Word):
    WEIGHTED = "weighted"
    UNWEIGHTED = "unweighted"


class ZeroVote(_Word):
    """The elected sign where the vote is exactly zero."""

    POSITIVE = "positive"
    NEGATIVE = "negative"
    MAJORITY = "majority"  # sign of the sum of all elected signs of the tensor (or model)
    DROP = "drop"  # the result is 0 there


class Contributors(_Word):
    """Which experts enter the reduction of an element."""

    AGREEING = "agreeing"  # non-zero and of the elected sign (needs a vote)
    NONZERO = "nonzero"
    ALL = "all"


class Reduce(_Word):
    SUM = "sum"
    MEAN = "mean"  # ÷ max(1, number of contributors)
    WEIGHTED_MEAN = "weighted_mean"  # ÷ Σ weights (of the contributors where there is a vote)
    MAX = "max"  # the largest magnitude
    MEDIAN = "median"  # lower median               (reference only)


class Variant(_Word):
    """How the calibration coefficient ξ of a row is computed (docs/methods.md)."""

    MANIFOLD = "manifold"
    MANIFOLD_EXACT = "manifold_exact"
    SPHERE = "sphere"
    SPECTRAL = "spectral"


class Granularity(_Word):
    ROW = "row"
    TENSOR = "tensor"


class EpsMode(_Word):
    ABSOLUTE = "absolute"  # the four 1e-8 as the authors wrote them
    RELATIVE = "relative"  # scale-free
    NONE = "none"


class Direction(_Word):
    """Which side of 1 a coefficient may act on."""

    AUTO = "auto"  # from the list of sensitive tensors; no list: FREE
    FREE = "free"
    GROW = "grow"  # only ξ > 1 acts
    SHRINK = "shrink"  # only ξ < 1 acts


_WITHOUT_DENSITY = (TrimRule.NONE, TrimRule.GIVEN, TrimRule.THRESHOLD)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class Trim:
    """Which entries of each expert's task vector stay. Per-expert fields have one number per
    expert.

    Attributes:
        rule: the trim.
        density: kept fraction q of each expert, in (0, 1]; q = 1 keeps all and skips every other
            check. ``VARIANCE``: of the entries that differ between experts, one for all experts.
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
                _check(
                    0 <= e < math.inf,
                    f"epsilon of expert {k}: expected a finite number >= 0, got {e!r}.",
                )
            return
        for k, q in enumerate(self.density):
            if self.rule is TrimRule.STD:
                _check(
                    q >= 0 and math.isfinite(q),
                    f"threshold of expert {k}: expected >= 0, got {q!r}.",
                )
                continue
            _check(
                isinstance(q, int | float) and 0 < q <= 1,
                f"density of expert {k}: expected a fraction in (0, 1], got {q!r}. "
                "It is the kept fraction, never a percentage.",
            )
            if q == 1:
                continue
            if self.rule is TrimRule.RANKED:
                e = self.epsilon[k]
                _check(
                    0 <= e and 0 < q - e and q + e < 1,
                    f"epsilon of expert {k}: expected 0 < density − epsilon and density + "
                    "epsilon < 1, "
                    f"got density {q!r} and epsilon {e!r}.",
                )
            if self.rule is TrimRule.BAND:
                g = self.gamma[k]
                _check(
                    0 <= g < 1, f"gamma of expert {k}: expected a fraction in [0, 1), got {g!r}."
                )

    def active(self, k: int) -> bool:
        """Whether expert ``k`` loses any entry at all under this trim (a density of 1 skips it)."""
        if self.rule is TrimRule.NONE:
            return False
        if self.rule in (TrimRule.GIVEN, TrimRule.STD, TrimRule.THRESHOLD):
            return True
        return self.density[k] < 1

    @property
    def is_random(self) -> bool:
        """Whether coins decide (so masks can be fed in instead)."""
        return self.rule in (TrimRule.RANDOM, TrimRule.RANKED)

    @property
    def by_magnitude(self) -> bool:
        """Whether thresholds of |τ| decide (so a ``select`` pass is needed)."""
        return self.rule in (TrimRule.MAGNITUDE, TrimRule.BAND)

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

    def band_counts(self, k: int, n: int) -> tuple[int, int]:
        """(n_top, kept) of a band trim: entries ``n_top <= rank < n_top + kept`` stay."""
        kept = math.trunc(float(n) * float(self.density[k]))
        top = math.trunc(float(n) * float(self.gamma[k]))
        if self.empty_band_zeroes and top == 0:
            return 0, 0
        return min(top, n - kept), kept


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
        _check(k >= 1, "experts: expected at least one, got none.")
        for i, w in enumerate(self.weights):
            _check(math.isfinite(w), f"weight of expert {i}: expected a finite number, got {w!r}.")
        _check(math.isfinite(self.scale), f"scale: expected a finite number, got {self.scale!r}.")
        t = self.trim
        for what, values, needed in (
            ("density", t.density, t.rule not in _WITHOUT_DENSITY),
            ("gamma", t.gamma, t.rule is TrimRule.BAND),
            ("epsilon", t.epsilon, t.rule in (TrimRule.RANKED, TrimRule.THRESHOLD)),
        ):
            _check(
                not needed or len(values) == k,
                f"{what}: expected one number per expert ({k}), got {len(values)}.",
            )
        _check(
            (self.contributors is Contributors.AGREEING) <= (self.vote is not Vote.NONE),
            "contributors='agreeing': expected a vote, got vote='none'.",
        )
        _check(
            t.rule is not TrimRule.VARIANCE or len(set(t.density)) == 1,
            f"density of the trim 'variance': expected one for all experts, got {t.density}.",
        )
        voted = self.vote is Vote.MASS and self.vote_on is VoteOn.UNWEIGHTED
        agreeing = voted and self.contributors is Contributors.AGREEING
        _check(
            self.weigh is Weigh.GIVEN or (agreeing and self.reduce is Reduce.WEIGHTED_MEAN),
            "weigh='energy': expected a weighted mean of those that agree with an unweighted vote "
            "of masses.",
        )
        _check(
            self.alone is None
            or (self.contributors is Contributors.NONZERO and self.reduce is Reduce.MEAN),
            "alone: expected a mean of the entries that are not zero.",
        )
        _check(
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
    def phases(self) -> dict[str, bool]:
        """What is found by passes of their own, in this order, and whether it is needed."""
        return {
            "variance": self.needs_variance,
            "factors": self.needs_factors,
            "weights": self.weigh is Weigh.ENERGY,
            "alone": self.alone is not None,
            "majority": self.needs_majority,
        }

    @property
    def looks_across(self) -> bool:
        """Whether weights or factors come of what the experts hold together."""
        return self.weigh is Weigh.ENERGY or self.alone is not None

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


@dataclass(frozen=True)
class Selection:
    """What ``select`` found, K numbers each: an entry of expert k stays if its rank by
    (|τ| descending, flat index ascending) lies at or below (threshold, tie_cut) and above (top_*).

    Attributes:
        threshold: smallest kept magnitude (float32 value; inf keeps nothing).
        tie_cut: entries equal to the threshold stay while their flat index is < tie_cut.
        top_threshold, top_tie_cut: the same pair for the outliers a band drops (inf, 0: none).
        factor: what each kept entry is multiplied by (norm rescale or 1/density, times the
            alignment), a float32 value.
        majority: sign for zero votes under ``ZeroVote.MAJORITY``: −1, 0 or 1.
        weights: those found (``Weigh.ENERGY``), float32 values; empty where they are given.
        alone: factor of what each expert alone holds (:class:`Alone`); empty without.

    Under ``TrimRule.VARIANCE`` threshold and cut are of the variance, equal for all experts.
    """

    threshold: tuple[float, ...]
    tie_cut: tuple[int, ...]
    top_threshold: tuple[float, ...]
    top_tie_cut: tuple[int, ...]
    factor: tuple[float, ...]
    majority: int = 0
    weights: tuple[float, ...] = ()
    alone: tuple[float, ...] = ()

    @staticmethod
    def keep_everything(num_experts: int, numel: int) -> Selection:
        k = num_experts
        return Selection((0.0,) * k, (numel,) * k, (math.inf,) * k, (0,) * k, (1.0,) * k, 0)


@dataclass(frozen=True)
class RowCalibration:
    """WSC resolved for one tensor: what the kernels need (docs/methods.md).

    ``direction`` is never AUTO here. ``rows`` × ``cols`` is the row view of the tensor: ``axes``
    moved to the front and flattened, everything else flattened behind (a 1-D tensor is [n, 1]).
    Where ``axes`` are the leading ones in order, that is the contiguous tensor itself.
    ``included`` says which experts count (those of weight 0 are left out); empty means all.
    """

    rows: int
    cols: int
    axes: tuple[int, ...] = (0,)
    variant: Variant = Variant.MANIFOLD
    granularity: Granularity = Granularity.ROW
    p: float = 2
    eps_mode: EpsMode = EpsMode.RELATIVE
    guards: bool = True
    clamp: tuple[float, float] | None = (0.1, 10.0)
    strength: float = 1.0
    scale: float = 1.0
    direction: Direction = Direction.FREE
    included: tuple[bool, ...] = ()


def stream_of(name: str) -> int:
    """Philox stream of a tensor: little-endian u64 of BLAKE2b-64 of the UTF-8 output name ('' if
    bare).

    >>> hex(stream_of("model.layers.0.mlp.up_proj.weight"))
    '0x345b65baf420f1e5'
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def per_expert(value: float | Sequence[float], num_experts: int, what: str) -> tuple[float, ...]:
    """K numbers from one number or K numbers; an error says which parameter had another count."""
    if isinstance(value, int | float):
        return (float(value),) * num_experts
    values = tuple(float(v) for v in value)
    _check(
        len(values) == num_experts,
        f"{what}: expected one number or one per expert ({num_experts}), got {len(values)}.",
    )
    return values
