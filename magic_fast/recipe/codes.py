"""The number of every word of a recipe, as kernels take it, once.

C and Triton spell the same numbers in csrc/include and kernels/words.py; tests/packaging holds all
three equal. A choice without a number here runs in the reference only.
"""

from __future__ import annotations

from typing import NamedTuple

from magic_fast.recipe.merging import Recipe
from magic_fast.recipe.words import (
    Contributors,
    Direction,
    EpsMode,
    Reduce,
    Rescale,
    TieRule,
    Variant,
    Vote,
    VoteOn,
    ZeroVote,
)


class _Dtypes(dict[object, "int | None"]):
    """By safetensors' word or dtype of torch, which is met once and kept; None: no kernel takes
    it."""

    def __missing__(self, dtype: object) -> int | None:
        word = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        self[dtype] = code = self.get(word.get(str(dtype).removeprefix("torch.")))
        return code


DTYPES = _Dtypes({"F32": 0, "F16": 1, "BF16": 2})
TIE_RULES = {TieRule.EXACT: 0, TieRule.KEEP_ALL: 1, TieRule.DROP_ALL: 2}
RESCALES = {
    Rescale.NONE: 0,
    Rescale.KEEP_PROBABILITY: 0,  # a factor of each expert, not a norm
    Rescale.L1: 1,
    Rescale.L2: 2,
    Rescale.LINF: 3,
}
VOTES = {Vote.NONE: 0, Vote.MASS: 1, Vote.COUNT: 2}
VOTES_ON = {VoteOn.WEIGHTED: 0, VoteOn.UNWEIGHTED: 1}
ZERO_VOTES = {
    ZeroVote.POSITIVE: 0,
    ZeroVote.NEGATIVE: 1,
    ZeroVote.MAJORITY: 2,
    ZeroVote.DROP: 3,
}
CONTRIBUTORS = {Contributors.AGREEING: 0, Contributors.NONZERO: 1, Contributors.ALL: 2}
REDUCES = {Reduce.SUM: 0, Reduce.MEAN: 1, Reduce.WEIGHTED_MEAN: 2, Reduce.MAX: 3}
VARIANTS = {
    Variant.MANIFOLD: 0,
    Variant.MANIFOLD_EXACT: 1,
    Variant.SPHERE: 2,
    Variant.SPECTRAL: 2,  # along a row the singular value is the norm
}
EPS_MODES = {EpsMode.ABSOLUTE: 0, EpsMode.RELATIVE: 1, EpsMode.NONE: 2}
DIRECTIONS = {Direction.FREE: 0, Direction.GROW: 1, Direction.SHRINK: 2}


class ConsensusKind:
    """Which task masks a consensus counts."""

    NONE, LAMBDA, GIVEN = range(3)


class CpuTrim:
    """How the native core trims an expert (``mf_trim``)."""

    NONE, BAND, RANDOM, RANKED, GIVEN, ABOVE, VARIANCE = range(7)


class GpuTrim:
    """How the kernels of a GPU trim an expert (``mf_gpu_kind``, KINDS in Triton). A trim by rank is
    a mask of bytes there; one by variance is one in CUDA alone."""

    ALL, ABOVE, BAND, RANDOM, BYTES, VARIED = range(6)


class Key:
    """What a search on a GPU compares: |τ| of an expert, the variance over all of them, the score
    of an expert's entry."""

    MAGNITUDE, VARIANCE, SCORE = range(3)


class Integers:
    """Rows of the int64 numbers of a GPU job: K each up to BOUND, then one each."""

    LOW, CUT, HIGH, TOP_CUT, STREAM, BOUND, SEED, MAJORITY, END = range(9)


class Floats:
    """Rows of the float32 numbers of a GPU job: K each up to SCORE_TOP, then one each."""

    FACTOR, WEIGHT, LAMBDA, ALONE, SCORE_CUT, SCORE_TOP = range(6)
    SCALE, MIN_TASKS, LIMIT, LEAST, END = range(6, 11)


class Rule(NamedTuple):
    """What the kernels of a GPU do with the trimmed values: codes, then 0 or 1. Triton compiles for
    each; CUDA takes the fields of ``mf_gpu_rule``, which are fewer."""

    vote: int = 0
    zero_vote: int = 0
    contributors: int = 0
    reduce: int = 0
    unweighted: int = 0  # the vote is on values before their weights
    factored: int = 0  # some factor is not 1
    weighted: int = 0  # some weight is not 1
    consensus: int = ConsensusKind.NONE
    scaled: int = 0  # the scale is not 1
    merged: int = 0  # delta = merged − base: the recipe is not run
    limited: int = 0  # large entries of delta are shortened
    singled: int = 0  # what one expert alone holds has a factor
    floored: int = 0  # a sum of weights has a least value
    scored: int = 0  # scores weigh each entry (PCB)


def consensus_code(recipe: Recipe) -> int:
    if recipe.consensus is None:
        return ConsensusKind.NONE
    return ConsensusKind.GIVEN if recipe.consensus.given else ConsensusKind.LAMBDA


def place_of(row: int, num_experts: int) -> int:
    """Where a row of :class:`Integers` or :class:`Floats` starts; END: how many numbers there are.

    >>> place_of(Integers.CUT, 3), place_of(Integers.MAJORITY, 3), place_of(Floats.END, 3)
    (3, 19, 22)
    """
    return min(row, 6) * num_experts + max(row - 6, 0)
