"""The stages of one block, from the bytes of the experts to d: trim → factor → weight → reduce."""

from __future__ import annotations

import triton
import triton.language as tl

from .compete import competed
from .keys import variance
from .load import load_taus, widened
from .trim import keep_mask
from .vote import finish_delta, reduce_values
from .words import (
    ABOVE,
    FACTOR,
    KEEP_ALL,
    VARIED,
    WEIGHT,
)


@triton.jit
def trimmed_values(
    taus, masks, integers, numbers, at, inside, position, flat,
    K: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr, ALIGNED: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(values that are voted on, bool keep masks): K of each."""
    values = ()
    kept = ()
    for k in tl.static_range(K):
        x = taus[k]
        keep = inside
        if KINDS[k] != KEEP_ALL:
            if KINDS[k] == VARIED:
                keep = keep_mask(
                    variance(taus, K), k, masks[k], integers, at, inside, position, flat,
                    K, ABOVE, ALIGNED, LANES, VEC,
                )  # fmt: skip
            else:
                keep = keep_mask(
                    x, k, masks[k], integers, at, inside, position, flat,
                    K, KINDS[k], ALIGNED, LANES, VEC,
                )  # fmt: skip
            x = tl.where(keep, x, 0.0)
        if RULE.factored:
            x = x * tl.load(numbers + FACTOR * K + k)
        if RULE.weighted and not RULE.unweighted:
            x = x * tl.load(numbers + WEIGHT * K + k)
        values = values + (x,)
        kept = kept + (keep,)
    return values, kept


@triton.jit
def block_delta(
    b, experts, merged, masks, task_masks, integers, numbers, at, inside, position, flat,
    K: tl.constexpr, HAS_BASE: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(d, raw task vectors, keep masks) of one block.

    ``b``: base as stored; ``at``: int64 element offsets into the arrays; ``flat``: index of the
    block's first element in the whole tensor. With RULE.merged d is merged − base.
    """
    taus = load_taus(experts, at, inside, b, K, HAS_BASE)
    if RULE.merged:
        d = widened(tl.load(merged + at, mask=inside, other=0.0))
        if HAS_BASE:
            d = d - widened(b)
        kept = ()
    else:
        values, kept = trimmed_values(
            taus, masks, integers, numbers, at, inside, position, flat,
            K, KINDS, RULE, ALIGNED, LANES, VEC,
        )  # fmt: skip
        if RULE.scored:
            total = competed(taus, integers, numbers, K)
        else:
            total = reduce_values(values, integers, numbers, K, RULE)
        d = finish_delta(total, taus, task_masks, numbers, at, inside, K, RULE)
    return d, taus, kept
