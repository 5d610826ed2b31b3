"""What a recipe says of one tensor, as the kernels of a GPU take it, Triton's and CUDA's: words and
numbers."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

from magic_fast.ops.job import Job
from magic_fast.recipe import (
    Align,
    Contributors,
    Recipe,
    Rescale,
    TieRule,
    TrimRule,
    Weigh,
    codes,
)
from magic_fast.recipe.codes import TIE_RULES, GpuTrim, Rule

_INF_BITS = 0x7F800000
_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

#: Of d = merged − base.
MERGED_RULE = Rule(contributors=codes.CONTRIBUTORS[Contributors.ALL], merged=1)


def bits_of(value: float) -> int:
    """Bit pattern of a float32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def float_of(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _signed(word: int) -> int:
    """A 64-bit word as int64 has it."""
    word &= _MASK_64
    return word - (1 << 64) if word >= 1 << 63 else word


@dataclass(frozen=True)
class Target:
    """One threshold to find: the ``count``-th largest |τ| of expert ``owner``."""

    owner: int
    count: int
    top: bool
    ties: int


@dataclass
class Numbers:
    """What a recipe says of one tensor: for the compiler (``kinds``, ``rule``) and for the device
    (``integers`` [6 K + 2], ``numbers`` [6 K + 4]; magic_fast.recipe.codes names the rows)."""

    kinds: tuple[int, ...]
    rule: Rule
    integers: list[int]
    numbers: list[float]
    targets: list[Target] = field(default_factory=list)


def _kind(job: Job, k: int, n: int) -> int:
    trim = job.recipe.trim
    given = job.masks is not None and job.masks[k] is not None
    if given:
        return GpuTrim.BYTES
    if trim.rule in (TrimRule.GIVEN, TrimRule.COMPETE) or not trim.active(k):
        return GpuTrim.ALL
    if trim.rule is TrimRule.VARIANCE:
        return GpuTrim.VARIED
    if n == 0:
        return GpuTrim.ALL
    if trim.rule is TrimRule.RANDOM:
        return GpuTrim.RANDOM
    if trim.rule is TrimRule.RANKED:
        return GpuTrim.BYTES
    # a threshold that is given counts, too
    return GpuTrim.BAND if trim.rule is TrimRule.BAND else GpuTrim.ABOVE


def _targets(recipe: Recipe, k: int, kind: int, n: int) -> tuple[list[Target], bool]:
    """Thresholds of expert ``k``, and whether it keeps everything after all."""
    trim = recipe.trim
    if trim.rule is TrimRule.COMPETE:  # bounds of the magnitudes: nothing is cut among equals
        low, high = trim.tail_ranks(n)
        keeps, drops = TIE_RULES[TieRule.KEEP_ALL], TIE_RULES[TieRule.DROP_ALL]
        return [Target(k, low, False, keeps), Target(k, high, True, drops)], False
    if kind == GpuTrim.BAND:
        top, kept = trim.band_counts(k, n)
        wanted = [(top + kept, False), (top, True)] if kept else []
        exact = TIE_RULES[TieRule.EXACT]
        return [Target(k, count, is_top, exact) for count, is_top in wanted if count > 0], False
    if trim.tie_rule is TieRule.DROP_ALL:
        dropped = trim.drop_count(k, n)
        if dropped == 0:
            return [], True
        return [Target(k, n - dropped + 1, False, TIE_RULES[trim.tie_rule])], False
    count = trim.kept_count(k, n)
    return ([Target(k, count, False, TIE_RULES[trim.tie_rule])] if count > 0 else []), False


def _factor(job: Job, k: int, n: int) -> float:
    """Factor of expert ``k`` that needs no sums: ÷ density where something is dropped."""
    recipe = job.recipe
    if recipe.rescale is not Rescale.KEEP_PROBABILITY:
        return 1.0
    given = job.masks is not None and job.masks[k] is not None
    drops = given or (recipe.trim.rule is not TrimRule.GIVEN and recipe.trim.active(k) and n != 0)
    return 1.0 / recipe.trim.density[k] if drops else 1.0


def numbers_of(job: Job) -> Numbers:
    """The recipe of one job. Thresholds of a selection that is given are filled in; the others are
    left for ``select`` on the device."""
    recipe, count = job.recipe, len(job.experts)
    total = job.experts[0].numel() if job.total is None else job.total
    selection = job.selection
    competes = recipe.trim.rule is TrimRule.COMPETE
    low, cut = [_INF_BITS] * count, [0] * count
    high, top_cut = [_INF_BITS] * count, [0] * count
    kinds: list[int] = []
    targets: list[Target] = []
    factors: list[float] = []
    for k in range(count):
        kind = _kind(job, k, total)
        factor = _factor(job, k, total)
        if selection is not None:
            factor = selection.factor[k]
            low[k], cut[k] = bits_of(selection.threshold[k]), selection.tie_cut[k]
            high[k], top_cut[k] = bits_of(selection.top_threshold[k]), selection.top_tie_cut[k]
        elif recipe.trim.rule is TrimRule.THRESHOLD and kind == GpuTrim.ABOVE:
            low[k], cut[k] = bits_of(recipe.trim.epsilon[k]), 0
        elif kind in (GpuTrim.ABOVE, GpuTrim.BAND) or (competes and total):
            found, everything = _targets(recipe, k, kind, total)
            targets += found
            if everything:
                kind = GpuTrim.ALL
        if kind not in (GpuTrim.ABOVE, GpuTrim.BAND, GpuTrim.VARIED) and selection is None:
            low[k], cut[k] = 0, total
        if kind == GpuTrim.ALL and recipe.align is not Align.NONE and total and not competes:
            kind = GpuTrim.ABOVE  # 0, which keeps everything: what trims nothing has no factor
        kinds.append(kind)
        factors.append(factor)
    streams = [_signed(job.stream + k * _GOLDEN) for k in range(count)]
    density = recipe.trim.density or (1.0,) * count
    bounds = [math.floor(float(q) * 2.0**32) for q in density]
    majority = 0 if selection is None else selection.majority
    consensus = recipe.consensus
    lambdas = consensus.lambdas if consensus is not None and not consensus.given else (0.0,) * count
    return Numbers(
        kinds=tuple(kinds),
        rule=_rule(recipe, any(f != 1 for f in factors) or recipe.needs_factors),
        integers=[
            *(low + cut + high + top_cut + streams + bounds),
            *(_signed(recipe.trim.seed), majority),
        ],
        numbers=[
            *(*factors, *_weights(job), *lambdas, *_found(job)),
            *(recipe.scale, 0.0 if consensus is None else float(consensus.min_tasks)),
            *(recipe.limit or 0.0, recipe.least),
        ],
        targets=targets,
    )


def _weights(job: Job) -> tuple[float, ...]:
    """Those given or found; equal ones where they are still to be found, as for no elements."""
    k = job.recipe.num_experts
    if job.selection is not None and job.selection.weights:
        return job.selection.weights
    return (1.0 / k,) * k if job.recipe.weigh is Weigh.ENERGY else job.recipe.weights


def _found(job: Job) -> tuple[float, ...]:
    """What the experts of an entry hold together, as far as it is known: factors of what one holds
    alone, bounds of the scores."""
    k, found = job.recipe.num_experts, job.selection
    alone = found.alone if found is not None else ()
    cut, top = (found.score_cut, found.score_top) if found is not None else ((), ())
    zeros = (0.0,) * k
    return (*(alone or (1.0,) * k), *(cut or zeros), *(top or zeros))


def _rule(recipe: Recipe, factored: bool) -> Rule:
    return Rule(
        vote=codes.VOTES[recipe.vote],
        zero_vote=codes.ZERO_VOTES[recipe.zero_vote],
        contributors=codes.CONTRIBUTORS[recipe.contributors],
        reduce=codes.REDUCES[recipe.reduce],
        unweighted=codes.VOTES_ON[recipe.vote_on],
        factored=int(factored),
        weighted=int(any(w != 1 for w in recipe.weights) or recipe.weigh is Weigh.ENERGY),
        consensus=codes.consensus_code(recipe),
        scaled=int(recipe.scale != 1),
        limited=int(recipe.limit is not None),
        singled=int(recipe.alone is not None),
        floored=int(recipe.least > 0),
        scored=int(recipe.weigh is Weigh.SCORE),
    )
