"""From the values of K experts to the merged task vector: vote, contributors, reduction, consensus.

Every sum runs in expert order and no product is contracted into a sum (the kernels are compiled
with fp fusion off): the signs elected here are those of every other backend, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .words import (
    AGREEING,
    ALONE,
    BY_LAMBDA,
    EVERYBODY,
    LAMBDA,
    LEAST,
    LIMIT,
    MAJORITY,
    MASS,
    MAX,
    MEAN,
    MIN_TASKS,
    NO_CONSENSUS,
    NO_VOTE,
    NONZERO,
    SCALE,
    WEIGHT,
    WEIGHTED_MEAN,
    ZERO_MAJORITY,
    ZERO_NEGATIVE,
    ZERO_POSITIVE,
)


@triton.jit
def tally(values, K: tl.constexpr, RULE: tl.constexpr):
    """Σ_k v_k, or Σ_k sign(v_k): what is voted, float32."""
    s = tl.zeros(values[0].shape, tl.float32)
    for k in tl.static_range(K):
        if RULE.vote == MASS:
            s = s + values[k]
        else:
            s = s + (values[k] > 0).to(tl.float32) - (values[k] < 0).to(tl.float32)
    return s


@triton.jit
def _elect(values, integers, K: tl.constexpr, RULE: tl.constexpr):
    """The elected sign, float32 −1, 0 (nobody) or 1, zero votes resolved."""
    s = tally(values, K, RULE)
    if RULE.zero_vote == ZERO_POSITIVE:
        tie = 1.0
    elif RULE.zero_vote == ZERO_NEGATIVE:
        tie = -1.0
    elif RULE.zero_vote == ZERO_MAJORITY:
        majority = tl.load(integers + 6 * K + (MAJORITY - 6))
        # an undecided majority keeps the negatives, but elects no maximum
        if RULE.reduce == MAX:
            tie = majority.to(tl.float32)
        else:
            tie = tl.where(majority > 0, 1.0, -1.0)
    else:
        tie = 0.0
    return tl.where(s > 0, 1.0, tl.where(s < 0, -1.0, tie))


@triton.jit
def _divide(total, count, numbers, K: tl.constexpr, RULE: tl.constexpr):
    """total ÷ count with the rule for a count that cannot divide."""
    if RULE.reduce == MEAN:
        divisor = tl.maximum(count, 1.0)
    elif RULE.floored:
        least = tl.load(numbers + SCALE * K + (LEAST - SCALE))
        divisor = tl.where(count < least, least, count)
    elif RULE.vote == NO_VOTE:
        divisor = tl.where(tl.abs(count) < 1e-8, 1.0, count)
    else:
        divisor = tl.where(count == 0, 1.0, count)
    return tl.div_rn(total, divisor)


@triton.jit
def reduce_values(values, integers, numbers, K: tl.constexpr, RULE: tl.constexpr):
    """Δ before consensus and scale."""
    zeros = tl.zeros(values[0].shape, tl.float32)
    total = zeros
    count = zeros
    best = zeros - 1.0
    own = zeros
    if RULE.vote != NO_VOTE:
        elected = _elect(values, integers, K, RULE)
    for k in tl.static_range(K):
        v = values[k]
        x = v
        weight = tl.load(numbers + WEIGHT * K + k)
        if RULE.unweighted and RULE.weighted:
            x = x * weight
        if RULE.contributors == AGREEING:
            contributes = v * elected > 0  # a product with ±1 is exact; 0 elects nobody
        elif RULE.contributors == NONZERO:
            contributes = v != 0
        else:
            contributes = tl.full(v.shape, 1, tl.int1)
        if RULE.reduce == MAX:
            magnitude = tl.abs(x)
            # without a vote the later of two equal ones wins
            wins = magnitude >= best if RULE.vote == NO_VOTE else magnitude > best
            wins = wins & contributes
            best = tl.where(wins, magnitude, best)
            total = tl.where(wins, x, total)
        elif RULE.contributors == EVERYBODY:
            total = total + x
        else:
            total = total + tl.where(contributes, x, 0.0)
        if RULE.singled:
            own = tl.where(contributes, tl.load(numbers + ALONE * K + k), own)
        if RULE.reduce == MEAN:
            count = count + tl.where(contributes, 1.0, 0.0)
        elif RULE.reduce == WEIGHTED_MEAN:
            count = count + tl.where(contributes, weight, 0.0)
    if RULE.reduce == MEAN or RULE.reduce == WEIGHTED_MEAN:
        total = _divide(total, count, numbers, K, RULE)
    if RULE.singled:
        total = tl.where(count == 1, total * own, total)
    return total


@triton.jit
def _needed(taus, delta, task_masks, numbers, at, inside, K: tl.constexpr, RULE: tl.constexpr):
    """bool: at least ``min_tasks`` experts need the coordinate, |τ_k| > λ_k·|Δ − τ_k|."""
    tasks = tl.zeros(delta.shape, tl.float32)
    for k in tl.static_range(K):
        if RULE.consensus == BY_LAMBDA:
            bar = tl.load(numbers + LAMBDA * K + k) * tl.abs(delta - taus[k])
            tasks = tasks + (tl.abs(taus[k]) > bar).to(tl.float32)
        else:
            given = tl.load(task_masks[k] + at, mask=inside, other=0)
            tasks = tasks + (given != 0).to(tl.float32)
    return tasks >= tl.load(numbers + SCALE * K + (MIN_TASKS - SCALE))


@triton.jit
def finish_delta(total, taus, task_masks, numbers, at, inside, K: tl.constexpr, RULE: tl.constexpr):
    """d = scale·Δ, what consensus drops set to 0, what a limit shortens shortened."""
    d = total
    if RULE.consensus != NO_CONSENSUS:
        d = tl.where(_needed(taus, d, task_masks, numbers, at, inside, K, RULE), d, 0.0)
    if RULE.limited:
        limit = tl.load(numbers + SCALE * K + (LIMIT - SCALE))
        distance = tl.abs(d)
        # where(): as torch's clamp, a NaN stays one
        share = tl.div_rn(limit, tl.where(distance < 1e-6, 1e-6, distance))
        d = d * tl.where(share > 1, 1.0, share)
    if RULE.scaled:
        d = d * tl.load(numbers + SCALE * K)
    return d
