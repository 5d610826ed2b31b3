"""Which entries of a task vector stay: thresholds, coins or bytes."""

from __future__ import annotations

import triton
import triton.language as tl

from .load import magnitude_bits
from .philox import random_words
from .words import ABOVE, BAND, BOUND, CUT, HIGH, LOW, RANDOM, SEED, STREAM, TOP_CUT


@triton.jit
def _at_or_above(bits, position, threshold, cut, flat, BLOCK: tl.constexpr):
    """Rank by (|τ| descending, flat index ascending) at or above (threshold, cut)."""
    before = tl.minimum(tl.maximum(cut - flat, 0), BLOCK).to(tl.int32)  # of this block
    return bits > threshold - (position < before).to(tl.int32)  # equal ones before the cut: >=


@triton.jit
def keep_mask(
    tau, k, mask, integers, at, inside, position, flat,
    K: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """bool [LANES, VEC]: the entries of expert ``k`` that stay; nothing outside.

    ``flat``: int64, index of the block's first element in the whole tensor. A NaN lies above every
    threshold, so an ABOVE trim keeps it.
    """
    if KIND == RANDOM:
        stream = tl.load(integers + STREAM * K + k)
        bound = tl.load(integers + BOUND * K + k)
        words = random_words(flat, stream, tl.load(integers + SEED * K), LANES, VEC, ALIGNED)
        keep = words < bound.to(tl.uint32)
        # always true, and free: ties the coins to the layout of τ, else the compiler draws them
        # a second time in its own
        keep = keep & (magnitude_bits(tau) >= 0)
    elif KIND == ABOVE or KIND == BAND:
        bits = magnitude_bits(tau)
        low = tl.load(integers + LOW * K + k).to(tl.int32)
        cut = tl.load(integers + CUT * K + k)
        keep = _at_or_above(bits, position, low, cut, flat, LANES * VEC)
        if KIND == BAND:
            high = tl.load(integers + HIGH * K + k).to(tl.int32)
            top_cut = tl.load(integers + TOP_CUT * K + k)
            top = _at_or_above(bits, position, high, top_cut, flat, LANES * VEC)
            keep = keep & (top == 0)
    else:
        keep = tl.load(mask + at, mask=inside, other=0) != 0
    return keep & inside
