"""The words of a recipe as the kernels take them: compile-time numbers."""

from __future__ import annotations

import triton.language as tl

# How an expert is trimmed.
KEEP_ALL = tl.constexpr(0)
ABOVE = tl.constexpr(1)  # rank by (|tau| descending, flat index ascending) at or above a threshold
BAND = tl.constexpr(2)  # ... and below another
RANDOM = tl.constexpr(3)  # Philox word < bound
BYTES = tl.constexpr(4)  # keep masks in memory
VARIED = tl.constexpr(5)  # ABOVE, by the variance over the experts

# Places in RULE, the tuple that says what to do with the trimmed values.
VOTE = tl.constexpr(0)
ZERO = tl.constexpr(1)
WHO = tl.constexpr(2)
HOW = tl.constexpr(3)
UNWEIGHTED = tl.constexpr(4)  # the vote is on values before their weights
FACTORED = tl.constexpr(5)  # some factor is not 1
WEIGHTED = tl.constexpr(6)  # some weight is not 1
CONSENSUS = tl.constexpr(7)
SCALED = tl.constexpr(8)  # the scale is not 1
MERGED = tl.constexpr(9)  # delta = merged - base: the recipe is not run
LIMITED = tl.constexpr(10)  # large entries of delta are shortened
SINGLED = tl.constexpr(11)  # what one expert alone holds has a factor
FLOORED = tl.constexpr(12)  # a sum of weights has a least value
SCORED = tl.constexpr(13)  # scores weigh each entry (PCB)

# RULE[VOTE]
NO_VOTE = tl.constexpr(0)
MASS = tl.constexpr(1)
COUNT = tl.constexpr(2)
# RULE[ZERO]
ZERO_POSITIVE = tl.constexpr(0)
ZERO_NEGATIVE = tl.constexpr(1)
ZERO_MAJORITY = tl.constexpr(2)
ZERO_DROP = tl.constexpr(3)
# RULE[WHO]
AGREEING = tl.constexpr(0)
NONZERO = tl.constexpr(1)
EVERYBODY = tl.constexpr(2)
# RULE[HOW]
SUM = tl.constexpr(0)
MEAN = tl.constexpr(1)
WEIGHTED_MEAN = tl.constexpr(2)
MAX = tl.constexpr(3)
# RULE[CONSENSUS]
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

# Variants of the calibration that a row can finish on its own.
MANIFOLD = tl.constexpr(0)
SPHERE = tl.constexpr(1)
EPS_ABSOLUTE = tl.constexpr(0)
EPS_RELATIVE = tl.constexpr(1)
EPS_NONE = tl.constexpr(2)
FREE = tl.constexpr(0)
GROW = tl.constexpr(1)
SHRINK = tl.constexpr(2)
