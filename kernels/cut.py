"""The tie cut: the flat index up to which entries equal to the threshold stay.

``scan`` has counted the heavy values per segment; a threshold that is none of them, and of which
not all stay, is counted by one more pass (rare in 16-bit checkpoints, where thresholds are heavy).
A prefix over the segments then leaves one segment to look into.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import load_key
from .load import load_base, positions, room
from .select import EQUAL, HEAVIES, HEAVY, NEEDED, THRESHOLD, WIDTH
from .words import DROP_EQUAL, EXACT


@triton.jit
def _uncounted(state, t):
    """Whether the cut of target ``t`` needs counts that the scans do not have."""
    row = state + t * WIDTH
    return (tl.load(row + HEAVY) < 0) & (tl.load(row + NEEDED) < tl.load(row + EQUAL))


@triton.jit
def count_equals(
    base, experts, integers, state, equals, n, chunks,
    K: tl.constexpr, TARGETS: tl.constexpr, OWNERS: tl.constexpr, RULES: tl.constexpr,
    HAS_BASE: tl.constexpr, KEY: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Entries equal to the threshold, per segment, into ``equals[segment, t, 0]`` (see ``scan``),
    for the targets that need it."""
    segment = tl.program_id(0).to(tl.int64)
    position = positions(LANES, VEC)
    for t in tl.static_range(TARGETS):
        if RULES[t] == EXACT and _uncounted(state, t):
            threshold = tl.load(state + t * WIDTH + THRESHOLD).to(tl.int32)
            same = tl.zeros([LANES], tl.int32)
            for c in range(chunks):
                start = (segment * chunks + c) * (LANES * VEC)
                at = start + position
                inside = position < room(n, start, LANES * VEC)
                b = load_base(base, at, inside, HAS_BASE)
                bits = load_key(experts, at, inside, b, integers, OWNERS[t], K, HAS_BASE, KEY)
                same += tl.sum((inside & (bits == threshold)).to(tl.int32), axis=1)
            tl.store(equals + (segment * TARGETS + t) * HEAVIES, tl.sum(same, axis=0))


@triton.jit
def _segment_of(equals, stride, column, segments, needed, BLOCK: tl.constexpr):
    """(segment that holds the ``needed``-th equal entry, how many of it lie in that segment)."""
    found = tl.full([], -1, tl.int64)
    left = needed
    passed = tl.full([], 0, tl.int64)
    for start in range(0, segments, BLOCK):
        i = start + tl.arange(0, BLOCK)
        count = tl.load(equals + i.to(tl.int64) * stride + column, mask=i < segments, other=0)
        running = passed + tl.cumsum(count.to(tl.int64), axis=0)
        reached = running >= needed
        first = tl.min(tl.where(reached, i, 0x7FFFFFFF), axis=0)
        here = (found < 0) & (first != 0x7FFFFFFF)
        before = tl.sum(tl.where(i == first, running - count.to(tl.int64), 0), axis=0)
        left = tl.where(here, needed - before, left)
        found = tl.where(here, first.to(tl.int64), found)
        passed = passed + tl.sum(count.to(tl.int64), axis=0)
    return found, left


@triton.jit
def _index_of(
    base, experts, integers, threshold, segment, left, n, length,
    OWNER: tl.constexpr, K: tl.constexpr, HAS_BASE: tl.constexpr, KEY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Flat index of the ``left``-th entry equal to ``threshold`` of a segment."""
    index = tl.full([], 0, tl.int64)
    passed = tl.full([], 0, tl.int64)
    for start in range(0, length, BLOCK):
        if passed < left:
            place = start + tl.arange(0, BLOCK)
            at = segment * length + place
            inside = (place < length) & (at < n)
            b = load_base(base, at, inside, HAS_BASE)
            bits = load_key(experts, at, inside, b, integers, OWNER, K, HAS_BASE, KEY)
            hit = (inside & (bits == threshold)).to(tl.int64)
            running = passed + tl.cumsum(hit, axis=0)
            mine = (hit > 0) & (running == left)
            index += tl.sum(tl.where(mine, at, 0), axis=0)
            passed += tl.sum(hit, axis=0)
    return index


@triton.jit
def find_cuts(
    base, experts, state, equals, integers, n, segments, length,
    K: tl.constexpr, TARGETS: tl.constexpr, OWNERS: tl.constexpr, TOPS: tl.constexpr,
    RULES: tl.constexpr, HAS_BASE: tl.constexpr, KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(threshold bits, tie cut) of one target a program into ``integers``; grid (TARGETS,).

    ``length``: elements of a segment. TOPS: 1 where the target is the upper edge of a band.
    """
    program = tl.program_id(0)
    for t in tl.static_range(TARGETS):
        if program == t:
            row = state + t * WIDTH
            threshold = tl.load(row + THRESHOLD)
            needed = tl.load(row + NEEDED)
            cut = n + needed * 0  # all that are equal stay
            if RULES[t] == DROP_EQUAL:
                cut = needed * 0
            if RULES[t] == EXACT:
                if needed < tl.load(row + EQUAL):
                    column = t * HEAVIES + tl.maximum(tl.load(row + HEAVY), 0)
                    segment, left = _segment_of(
                        equals, TARGETS * HEAVIES, column, segments, needed, BLOCK
                    )
                    cut = 1 + _index_of(
                        base, experts, integers, threshold.to(tl.int32), segment, left, n, length,
                        OWNERS[t], K, HAS_BASE, KEY, BLOCK,
                    )  # fmt: skip
            to = integers + 2 * TOPS[t] * K + OWNERS[t]
            tl.store(to, threshold)
            tl.store(to + K, cut)
