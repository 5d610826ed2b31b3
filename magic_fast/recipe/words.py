"""The choices at each stage of a merge, and of its calibration."""

from __future__ import annotations

from enum import Enum


class Word(str, Enum):
    """An enum whose members are their own words, so that a string is accepted at the public
    edge."""

    def __str__(self) -> str:
        return str(self.value)


class TrimRule(Word):
    """Which entries of a task vector stay."""

    NONE = "none"
    MAGNITUDE = "magnitude"  # the largest |τ|
    RANDOM = "random"  # a coin per entry (DARE)
    RANKED = "ranked"  # a coin whose bias follows the rank in the row (DELLA)
    BAND = "band"  # the largest but for the very largest (Breadcrumbs)
    THRESHOLD = "threshold"  # |τ| > ε (RAM)
    VARIANCE = "variance"  # the largest variance over the experts, the same entries of each (SCE)
    COMPETE = "compete"  # none drops out: magnitudes are held within bounds, scores weigh (PCB)
    GIVEN = "given"  # keep masks fed in
    STD = "std"  # |x − mean| > t·std            (reference only)
    NORM_FRACTION = "norm_fraction"  # shortest prefix by x²/‖x‖² (reference only)


class CountRule(Word):
    """How many entries a magnitude trim keeps; ``⌊q·n⌋`` is ``trunc(double(n)·double(q))``."""

    FLOOR = "floor"  # max(min_kept, ⌊q·n⌋)
    FLOOR_PLUS_ONE = "floor_plus_one"  # ⌊q·n⌋ + 1
    COMPLEMENT_PLUS_ONE = "complement_plus_one"  # n − max(⌊(1−q)·n⌋, 1) + 1


class TieRule(Word):
    """What happens to entries whose magnitude equals the threshold."""

    EXACT = "exact"  # the lowest flat index first, until the count is reached
    KEEP_ALL = "keep_all"
    DROP_ALL = "drop_all"


class TrimScope(Word):
    TENSOR = "tensor"
    MODEL = "model"  # one threshold per expert over all merged tensors, names sorted, row-major


class Rescale(Word):
    """What makes up for the trimmed entries."""

    NONE = "none"
    KEEP_PROBABILITY = "keep_probability"  # ÷ density
    L1 = "l1"  # × norm before ÷ norm after, whole tensor
    L2 = "l2"
    LINF = "linf"


class Align(Word):
    """Whether the task vectors of a tensor are brought to one length before anything is added."""

    NONE = "none"
    MIN_NORM = "min_norm"  # × smallest L2 norm other than 0 ÷ own L2 norm, of the raw task vectors


class Weigh(Word):
    """Where the weights come from."""

    GIVEN = "given"
    ENERGY = "energy"  # mean(τ²) of the trimmed task vector as a share of all K, tensor by tensor
    SCORE = "score"  # of each entry, by its size and the experts' agreement (PCB)


class Vote(Word):
    NONE = "none"
    MASS = "mass"  # sign(Σ v_k)
    COUNT = "count"  # sign(Σ sign(v_k))
    NORM_FRACTION = "norm_fraction"  # sign of the entry with the largest x²/‖x‖² (reference only)
    NORM_MASS = "norm_mass"  # sign(Σ sign(x)·x²/‖x‖²)                    (reference only)


class VoteOn(Word):
    WEIGHTED = "weighted"
    UNWEIGHTED = "unweighted"


class ZeroVote(Word):
    """The elected sign where the vote is exactly zero."""

    POSITIVE = "positive"
    NEGATIVE = "negative"
    MAJORITY = "majority"  # sign of the sum of all elected signs of the tensor (or model)
    DROP = "drop"  # the result is 0 there


class Contributors(Word):
    """Which experts enter the reduction of an element."""

    AGREEING = "agreeing"  # non-zero and of the elected sign (needs a vote)
    NONZERO = "nonzero"
    ALL = "all"


class Reduce(Word):
    SUM = "sum"
    MEAN = "mean"  # ÷ max(1, number of contributors)
    WEIGHTED_MEAN = "weighted_mean"  # ÷ Σ weights (of the contributors where there is a vote)
    MAX = "max"  # the largest magnitude
    MEDIAN = "median"  # lower median               (reference only)


class Variant(Word):
    """How the calibration coefficient ξ of a row is computed (docs/methods.md)."""

    MANIFOLD = "manifold"
    MANIFOLD_EXACT = "manifold_exact"
    SPHERE = "sphere"
    SPECTRAL = "spectral"


class Granularity(Word):
    ROW = "row"
    TENSOR = "tensor"


class EpsMode(Word):
    ABSOLUTE = "absolute"  # the four 1e-8 as the authors wrote them
    RELATIVE = "relative"  # scale-free
    NONE = "none"


class Direction(Word):
    """Which side of 1 a coefficient may act on."""

    AUTO = "auto"  # from the list of sensitive tensors; no list: FREE
    FREE = "free"
    GROW = "grow"  # only ξ > 1 acts
    SHRINK = "shrink"  # only ξ < 1 acts
