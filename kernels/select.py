"""Exact k-th magnitudes and tie cuts of K experts, without a sort and without asking the host.

A target is one threshold: the ``count``-th largest |τ| of one expert (a band has two targets), or
the count-th largest of what else ``keys.py`` compares. Its
``state``, int64 [targets, 8] on the device, goes through

    sample → bracket → scan, locate → scan, locate → … → count_equals → find_cut

A sample brackets the threshold. ``scan`` reads everything once: what lies above the bracket is
counted, what lies inside goes into bins by integer atomics, and a few values that the sample shows
in the bracket are counted by themselves, per segment: in 16-bit checkpoints one value can be 5 %
of all elements, too many for one address. ``locate`` finds the bin; a bin of one value is the
threshold, a wider one (or a bracket that missed) is the next bracket. As many scans are launched as
the worst input needs; those with nothing left to do return at once. Counts have no order, so the
result does not depend on the schedule.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import keys_together, load_key
from .load import load_base, positions, room
from .rowstats import columns, zero_counts
from .words import BY_MAGNITUDE

# Columns of `state`.
BRACKET_LOW = tl.constexpr(0)
BRACKET_HIGH = tl.constexpr(1)
DONE = tl.constexpr(2)
THRESHOLD = tl.constexpr(3)
NEEDED = tl.constexpr(4)  # of those equal to the threshold
EQUAL = tl.constexpr(5)  # how many there are
HEAVY = tl.constexpr(6)  # which of the heavy values the threshold is, −1: none
SHIFT = tl.constexpr(7)
WIDTH = tl.constexpr(8)
HEAVIES = tl.constexpr(2)
FLUSH = tl.constexpr(31)  # blocks whose counts of 8 a lane fit 8 bits
MOST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _shift_for(low, high, LOG_BINS: tl.constexpr):
    """Least shift for which the bracket has at most 2^LOG_BINS bins."""
    shift = low * 0
    for _ in tl.static_range(32 - LOG_BINS):
        shift = shift + (((high - low) >> shift) >= (1 << LOG_BINS)).to(tl.int64)
    return shift


@triton.jit
def sample_keys(
    base, experts, integers, sample, n, stride, runs,
    K: tl.constexpr, HAS_BASE: tl.constexpr, KEY: tl.constexpr, WIDTH_OF: tl.constexpr,
    RUNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """int32 [WIDTH_OF, runs · RUN]: keys in short runs at mixed places, one run every ``stride``;
    grid (⌈runs / RUNS⌉,). ``runs · RUN`` ≤ n. WIDTH_OF: K, or 1 where the experts have one key."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS).to(tl.int64)
    # a multiplicative hash: sample places must not share a period with the rows
    mixed = ((run * 40503) >> 3) % tl.maximum(stride - RUN + 1, 1)
    start = tl.minimum(run * stride + mixed, n - RUN)
    at = start[:, None] + tl.arange(0, RUN)[None, :]
    to = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    inside = to < runs * RUN
    b = load_base(base, at, inside, HAS_BASE)
    for k in tl.static_range(WIDTH_OF):
        bits = load_key(experts, at, inside, b, integers, k, K, HAS_BASE, KEY)
        tl.store(sample + k * runs * RUN + to, bits, mask=inside)


@triton.jit
def open_brackets(
    sorted_sample, places, state, heavy, owners, size, n, TARGETS: tl.constexpr,
    LOG_BINS: tl.constexpr,
):  # fmt: skip
    """First bracket and heavy values of one target a program; grid (TARGETS,).

    ``sorted_sample``: int32 [experts, size], ascending. ``places``: int64 [targets, 3]: positions
    in it of the bracket's low end, the expected threshold and the high end (−1, or ``size``: open).
    """
    target = tl.program_id(0)
    sample = sorted_sample + tl.load(owners + target).to(tl.int64) * size
    low_place = tl.load(places + target * 3)
    middle = tl.load(places + target * 3 + 1)
    high_place = tl.load(places + target * 3 + 2)
    low = tl.load(sample + tl.maximum(low_place, 0)).to(tl.int64)
    high = tl.load(sample + tl.minimum(high_place, size - 1)).to(tl.int64)
    low = tl.where(low_place < 0, 0, low)
    high = tl.where(high_place >= size, MOST, high)
    row = state + target * WIDTH
    tl.store(row + BRACKET_LOW, low)
    tl.store(row + BRACKET_HIGH, high)
    tl.store(row + SHIFT, _shift_for(low, high, LOG_BINS))
    # the value expected, and the bracket's quarters where they differ (−2 matches nothing)
    first = tl.maximum(low_place, 0)
    last = tl.minimum(high_place, size - 1)
    a = tl.load(sample + tl.minimum(tl.maximum(middle, 0), size - 1))
    b = tl.load(sample + first + (last - first) // 4)
    c = tl.load(sample + first + (last - first) * 3 // 4)
    other = tl.where(b != a, b, c)
    tl.store(heavy + target * HEAVIES, a)
    tl.store(heavy + target * HEAVIES + 1, tl.where(other != a, other, -2))


@triton.jit
def _scan_block(bits, low, high, shift, first_heavy, second_heavy, bins, LOG_BINS: tl.constexpr):
    """One block of one target: int32 [LANES] of counts above the bracket and of the two heavy
    values, 8 bits each (a lane has at most 8 elements a block); the rest of the bracket goes into
    its bins."""
    is_first = bits == first_heavy
    is_second = bits == second_heavy
    word = tl.where(is_first, 1 << 8, tl.where(is_second, 1 << 16, 0))
    # a heavy value may lie above the bracket of a later scan: it then counts as above too
    word = word + (bits > high).to(tl.int32)
    within = (bits - low).to(tl.uint32, bitcast=True) <= (high - low).to(tl.uint32, bitcast=True)
    within = within & (is_first == 0) & (is_second == 0)
    # the mask changes nothing within; it tells the compiler that only −1 is negative
    bin_of = tl.where(within, ((bits - low) >> shift) & ((1 << LOG_BINS) - 1), -1)
    # by columns: single elements of a lane have the layout of the atomics, nothing is exchanged
    parts = columns(bin_of)
    for e in tl.static_range(len(parts)):
        tl.atomic_add(bins + parts[e], 1, mask=parts[e] >= 0, sem="relaxed")
    return tl.sum(word, axis=1)


@triton.jit
def scan(
    base, experts, integers, state, heavy, bins, above, equals, n, chunks,
    K: tl.constexpr, TARGETS: tl.constexpr, OWNERS: tl.constexpr, HAS_BASE: tl.constexpr,
    KEY: tl.constexpr, LOG_BINS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One pass over all experts; a program takes one segment of ``chunks`` blocks.

    ``bins``: int32 or int64 [targets, 2^LOG_BINS], zeroed; ``above``: int64 [segments, targets];
    ``equals``: int32 [segments, targets, HEAVIES]. ``OWNERS``: expert of every target.
    Targets that are done keep what they have.
    """
    segment = tl.program_id(0).to(tl.int64)
    position = positions(LANES, VEC)
    waiting = 0
    for t in tl.static_range(TARGETS):
        waiting += (tl.load(state + t * WIDTH + DONE) == 0).to(tl.int32)
    if waiting > 0:
        over = zero_counts(TARGETS, LANES)
        first = zero_counts(TARGETS, LANES)
        second = zero_counts(TARGETS, LANES)
        for outer in range(0, chunks, FLUSH):
            packed = zero_counts(TARGETS, LANES)
            for c in range(outer, tl.minimum(outer + FLUSH, chunks)):
                start = (segment * chunks + c) * (LANES * VEC)
                at = start + position
                inside = position < room(n, start, LANES * VEC)
                b = load_base(base, at, inside, HAS_BASE)
                if KEY != BY_MAGNITUDE:
                    keys = keys_together(experts, at, inside, b, integers, K, HAS_BASE, KEY)
                more = ()
                for t in tl.static_range(TARGETS):
                    row = state + t * WIDTH
                    asked = inside & (tl.load(row + DONE) == 0)
                    if KEY == BY_MAGNITUDE:
                        key = load_key(experts, at, asked, b, integers, OWNERS[t], K, HAS_BASE, KEY)
                    else:
                        key = keys[OWNERS[t]]
                    bits = tl.where(asked, key, -1)
                    word = _scan_block(
                        bits,
                        tl.load(row + BRACKET_LOW).to(tl.int32),
                        tl.load(row + BRACKET_HIGH).to(tl.int32),
                        tl.load(row + SHIFT).to(tl.int32),
                        tl.load(heavy + t * HEAVIES),
                        tl.load(heavy + t * HEAVIES + 1),
                        bins + (t << LOG_BINS),
                        LOG_BINS,
                    )
                    more = more + (packed[t] + word,)
                packed = more
            over = _add_field(over, packed, 0, TARGETS)
            first = _add_field(first, packed, 8, TARGETS)
            second = _add_field(second, packed, 16, TARGETS)
        for t in tl.static_range(TARGETS):
            if tl.load(state + t * WIDTH + DONE) == 0:
                tl.store(above + segment * TARGETS + t, tl.sum(over[t], axis=0).to(tl.int64))
                to = equals + (segment * TARGETS + t) * HEAVIES
                tl.store(to, tl.sum(first[t], axis=0))
                tl.store(to + 1, tl.sum(second[t], axis=0))


@triton.jit
def _add_field(counts, packed, SHIFT_BY: tl.constexpr, COUNT: tl.constexpr):
    total = ()
    for t in tl.static_range(COUNT):
        total = total + (counts[t] + ((packed[t] >> SHIFT_BY) & 0xFF),)
    return total


@triton.jit
def _column_sum(values, stride, column, count, BLOCK: tl.constexpr):
    """Σ values[i · stride + column] over ``count`` rows, int64."""
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(values + i.to(tl.int64) * stride + column, mask=i < count, other=0).to(
            tl.int64
        )
    return tl.sum(total, axis=0)


@triton.jit
def locate(
    state, heavy, bins, above, equals, counts, segments,
    TARGETS: tl.constexpr, LOG_BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """After a scan: the threshold of one target a program, or its next bracket; grid (TARGETS,).

    Clears the target's bins. ``counts``: int64 [targets], rank of the threshold from the largest.
    """
    t = tl.program_id(0)
    row = state + t * WIDTH
    mine = bins + (t << LOG_BINS)
    if tl.load(row + DONE) == 0:
        low = tl.load(row + BRACKET_LOW)
        high = tl.load(row + BRACKET_HIGH)
        shift = tl.load(row + SHIFT)
        higher = _column_sum(above, TARGETS, t, segments, BLOCK)
        wanted = tl.load(counts + t) - higher  # rank within the bracket, from 1
        # the heavy values are counted by themselves and join their bins here
        heavy_bins = ()
        heavy_counts = ()
        for h in tl.static_range(HEAVIES):
            value = tl.load(heavy + t * HEAVIES + h).to(tl.int64)
            n_equal = _column_sum(equals, TARGETS * HEAVIES, t * HEAVIES + h, segments, BLOCK)
            within = (value >= low) & (value <= high)
            heavy_bins = heavy_bins + (tl.where(within, (value - low) >> shift, -1),)
            heavy_counts = heavy_counts + (n_equal,)
        # from the highest bin down to the one that reaches the rank
        found = tl.full([], -1, tl.int64)
        in_bin = tl.full([], 0, tl.int64)
        passed = tl.full([], 0, tl.int64)
        for start in range(0, 1 << LOG_BINS, BLOCK):
            i = (1 << LOG_BINS) - 1 - start - tl.arange(0, BLOCK)
            n_bin = tl.load(mine + i).to(tl.int64)
            for h in tl.static_range(HEAVIES):
                n_bin += tl.where(i == heavy_bins[h], heavy_counts[h], 0)
            tl.store(mine + i, 0)
            running = passed + tl.cumsum(n_bin, axis=0)
            reached = (running >= wanted) & (wanted > 0)
            bin_here = tl.max(tl.where(reached, i, -1), axis=0).to(tl.int64)
            first_here = (found < 0) & (bin_here >= 0)
            at_bin = i == bin_here
            before = tl.sum(tl.where(at_bin, running - n_bin, 0), axis=0)
            size = tl.sum(tl.where(at_bin, n_bin, 0), axis=0)
            in_bin = tl.where(first_here, size, in_bin)
            higher = tl.where(first_here, higher + before, higher)
            found = tl.where(first_here, bin_here, found)
            passed = passed + tl.sum(n_bin, axis=0)
        if wanted <= 0:  # the sample misled: it lies above
            new_low = high + 1
            new_high = tl.full([], MOST, tl.int64)
        elif found < 0:  # ... or below
            new_low = tl.full([], 0, tl.int64)
            new_high = low - 1
        else:
            new_low = low + (found << shift)
            new_high = tl.minimum(high, new_low + (tl.full([], 1, tl.int64) << shift) - 1)
        tl.store(row + BRACKET_LOW, new_low)
        tl.store(row + BRACKET_HIGH, new_high)
        tl.store(row + SHIFT, _shift_for(new_low, new_high, LOG_BINS))
        if (found >= 0) & (new_low == new_high):
            tl.store(row + DONE, 1)
            tl.store(row + THRESHOLD, new_low)
            tl.store(row + NEEDED, tl.load(counts + t) - higher)
            tl.store(row + EQUAL, in_bin)
            which = tl.full([], -1, tl.int64)
            for h in tl.static_range(HEAVIES):
                is_it = tl.load(heavy + t * HEAVIES + h).to(tl.int64) == new_low
                which = tl.where(is_it, h, which)
            tl.store(row + HEAVY, which)
