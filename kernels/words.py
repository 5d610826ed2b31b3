"""The words of a recipe as the kernels take them: compile-time numbers, those of
magic_fast/recipe/codes.py."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

# How an expert is trimmed.
KEEP_ALL = tl.constexpr(0)
ABOVE = tl.constexpr(1)  # rank by (|tau| descending, flat index ascending) at or above a threshold
BAND = tl.constexpr(2)  # ... and below another
RANDOM = tl.constexpr(3)  # Philox word < bound
BYTES = tl.constexpr(4)  # keep masks in memory
VARIED = tl.constexpr(5)  # ABOVE, by the variance over the experts


class Rule(NamedTuple):
    """RULE: what is done with the trimmed values; words below, or 0 and 1."""

    vote: int = 0
    zero_vote: int = 0
    contributors: int = 0
    reduce: int = 0
    unweighted: int = 0  # the vote is on values before their weights
    factored: int = 0  # some factor is not 1
    weighted: int = 0  # some weight is not 1
    consensus: int = 0
    scaled: int = 0  # the scale is not 1
    merged: int = 0  # delta = merged - base: the recipe is not run
    limited: int = 0  # large entries of delta are shortened
    singled: int = 0  # what one expert alone holds has a factor
    floored: int = 0  # a sum of weights has a least value
    scored: int = 0  # scores weigh each entry (PCB)


# RULE.vote
NO_VOTE = tl.constexpr(0)
MASS = tl.constexpr(1)
COUNT = tl.constexpr(2)
# RULE.zero_vote
ZERO_POSITIVE = tl.constexpr(0)
ZERO_NEGATIVE = tl.constexpr(1)
ZERO_MAJORITY = tl.constexpr(2)
ZERO_DROP = tl.constexpr(3)
# RULE.contributors
AGREEING = tl.constexpr(0)
NONZERO = tl.constexpr(1)
EVERYBODY = tl.constexpr(2)
# RULE.reduce
SUM = tl.constexpr(0)
MEAN = tl.constexpr(1)
WEIGHTED_MEAN = tl.constexpr(2)
MAX = tl.constexpr(3)
# RULE.consensus
NO_CONSENSUS = tl.constexpr(0)
BY_LAMBDA = tl.constexpr(1)
GIVEN = tl.constexpr(2)

# Rows of `integers`, int64 [6 K + 2]: what decides, exact.
LOW = tl.constexpr(0)  # bits of the threshold
CUT = tl.constexpr(1)
HIGH = tl.constexpr(2)  # bits of the top threshold
TOP_CUT = tl.constexpr(3)
STREAM = tl.constexpr(4)
BOUND = tl.constexpr(5)
SEED = tl.constexpr(6)  # at 6 K
MAJORITY = tl.constexpr(7)  # at 6 K + 1
# Rows of `numbers`, float32 [6 K + 4].
FACTOR = tl.constexpr(0)
WEIGHT = tl.constexpr(1)
LAMBDA = tl.constexpr(2)
ALONE = tl.constexpr(3)
SCORE_CUT = tl.constexpr(4)
SCORE_TOP = tl.constexpr(5)
SCALE = tl.constexpr(6)  # at 6 K
MIN_TASKS = tl.constexpr(7)  # at 6 K + 1
LIMIT = tl.constexpr(8)  # at 6 K + 2
LEAST = tl.constexpr(9)  # at 6 K + 3

# What a search compares.
BY_MAGNITUDE = tl.constexpr(0)  # |tau| of an expert
BY_VARIANCE = tl.constexpr(1)  # over all experts
BY_SCORE = tl.constexpr(2)  # of an expert's entry
# What becomes of entries equal to a threshold.
EXACT = tl.constexpr(0)
KEEP_EQUAL = tl.constexpr(1)
DROP_EQUAL = tl.constexpr(2)

# Variants of the calibration that a row can finish by itself.
MANIFOLD = tl.constexpr(0)
SPHERE = tl.constexpr(2)
EPS_ABSOLUTE = tl.constexpr(0)
EPS_RELATIVE = tl.constexpr(1)
EPS_NONE = tl.constexpr(2)
FREE = tl.constexpr(0)
GROW = tl.constexpr(1)
SHRINK = tl.constexpr(2)
