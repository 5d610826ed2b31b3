"""Calibrated merges: one program a row, base and experts read from memory once.

The inner products of the row accumulate while d is formed, the coefficient is finished in the
program, and the row is written. Where K is small d and the base stay in registers in between
(``merge_rows``); where K inner products leave no room for them d waits in the L2 cache
(``merge_rows_scratch``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .calibrate import finish_row
from .delta import block_delta
from .load import load_base, positions, room
from .rowstats import add_pairs, add_squares, lane_sums, zero_counts, zero_sums
from .store import (
    anywhere,
    kept_of_lanes,
    nonfinite_of,
    note_inputs,
    note_overflow,
    store_kept,
    write_result,
)
from .words import MANIFOLD


@triton.jit
def _add_chunk(sums, taus, d, M: tl.constexpr, VARIANT: tl.constexpr, VEC: tl.constexpr):
    """All inner products (MANIFOLD), or the squared norms, of one chunk added."""
    if VARIANT == MANIFOLD:
        sums = add_pairs(sums, taus + (d,), M, VEC, False)
    else:
        sums = add_squares(sums, taus + (d,), M, VEC)
    return sums


@triton.jit
def _add_words(words, more, COUNT: tl.constexpr):
    total = ()
    for i in tl.static_range(COUNT):
        total = total + (words[i] + more[i],)
    return total


@triton.jit
def merge_rows(
    base, experts, merged, out, masks, task_masks, integers, numbers, policy,
    coefficients, repairs, norms2, counts, report, cols, offset,
    K: tl.constexpr, HAS_BASE: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr,
    CHOSEN: tl.constexpr, VARIANT: tl.constexpr, EPS_MODE: tl.constexpr, GUARDS: tl.constexpr,
    CLAMPS: tl.constexpr, POWER: tl.constexpr, DIRECTION: tl.constexpr, KEEPS: tl.constexpr,
    ALIGNED: tl.constexpr, SUMS: tl.constexpr, WORDS: tl.constexpr, CHUNKS: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """out = base + factor·d of one row a program; grid (rows,), cols ≤ CHUNKS·LANES·VEC.

    Args:
        policy: float64 [4], see ``acting_factor``.
        coefficients: float32 [rows], raw ξ; repairs: uint8 [rows].
        norms2: float64 [rows, K + 2]: ‖τ_k‖², ‖d‖² before and after the factor.
        counts: int32 [rows, K] of kept entries; report: see ``note_inputs``.
        SUMS: accumulators, the pairs of K + 1 vectors or K + 1 squares. WORDS: of the counts.
    """
    row = tl.program_id(0).to(tl.int64)
    position = positions(LANES, VEC)
    sums = zero_sums(SUMS, LANES, False)
    stayed = zero_counts(WORDS, LANES)
    bases = ()
    deltas = ()
    z = tl.zeros([LANES, VEC], tl.float32)
    for c in tl.static_range(CHUNKS):
        first = row * cols + c * (LANES * VEC)
        at = first + position
        inside = position < room(cols, c * (LANES * VEC), LANES * VEC)
        b = load_base(base, at, inside, HAS_BASE)
        d, taus, kept = block_delta(
            b, experts, merged, masks, task_masks, integers, numbers, at, inside, position,
            first + offset, K, HAS_BASE, KINDS, RULE, ALIGNED, LANES, VEC,
        )  # fmt: skip
        sums = _add_chunk(sums, taus, d, K + 1, VARIANT, VEC)
        stayed = _add_words(stayed, kept_of_lanes(kept, K, WORDS), WORDS)
        z = z + nonfinite_of(taus, d, K, RULE)
        bases = bases + (b,)
        deltas = deltas + (d,)

    factor = finish_row(
        lane_sums(sums, SUMS), policy, coefficients, repairs, norms2, row,
        K, CHOSEN, VARIANT, EPS_MODE, GUARDS, CLAMPS, POWER, DIRECTION,
    )  # fmt: skip
    store_kept(stayed, counts, row, K, WORDS)

    overs = ()
    bad = z != 0
    for c in tl.static_range(CHUNKS):
        at = row * cols + c * (LANES * VEC) + position
        inside = position < room(cols, c * (LANES * VEC), LANES * VEC)
        over = write_result(
            out, bases[c], deltas[c], factor, merged, at, inside, HAS_BASE, True, KEEPS
        )
        overs = overs + (over,)
        bad = bad | over
    if anywhere(bad):
        for c in range(CHUNKS):
            at = row * cols + c * (LANES * VEC) + position
            inside = position < room(cols, c * (LANES * VEC), LANES * VEC)
            note_inputs(base, experts, merged, report, at, offset, inside, K, HAS_BASE, RULE)
        for c in tl.static_range(CHUNKS):
            at = row * cols + c * (LANES * VEC) + position
            note_overflow(overs[c], report, at, offset, K)


@triton.jit
def merge_rows_scratch(
    base, experts, merged, out, masks, task_masks, integers, numbers, policy,
    coefficients, repairs, norms2, counts, report, cols, scratch, rows, chunks, offset,
    K: tl.constexpr, HAS_BASE: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr,
    CHOSEN: tl.constexpr, VARIANT: tl.constexpr, EPS_MODE: tl.constexpr, GUARDS: tl.constexpr,
    CLAMPS: tl.constexpr, POWER: tl.constexpr, DIRECTION: tl.constexpr, KEEPS: tl.constexpr,
    ALIGNED: tl.constexpr, SUMS: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """``merge_rows`` where d does not fit beside the sums; grid (programs,), each takes every
    programs-th row.

    ``scratch``: float32 [programs, chunks·LANES·VEC], small enough to stay in the L2 cache. STAGES:
    chunks in flight.
    """
    program = tl.program_id(0)
    position = positions(LANES, VEC)
    own = scratch + program.to(tl.int64) * chunks * (LANES * VEC) + position
    for line in range(program, rows, tl.num_programs(0)):
        row = tl.full([], 0, tl.int64) + line
        sums = zero_sums(SUMS, LANES, False)
        stayed = zero_counts(WORDS, LANES)
        z = tl.zeros([LANES, VEC], tl.float32)
        for c in tl.range(0, chunks, num_stages=STAGES):
            first = row * cols + c * (LANES * VEC)
            at = first + position
            inside = position < room(cols, c * (LANES * VEC), LANES * VEC)
            b = load_base(base, at, inside, HAS_BASE)
            d, taus, kept = block_delta(
                b, experts, merged, masks, task_masks, integers, numbers, at, inside, position,
                first + offset, K, HAS_BASE, KINDS, RULE, ALIGNED, LANES, VEC,
            )  # fmt: skip
            tl.store(own + c * (LANES * VEC), d)
            sums = _add_chunk(sums, taus, d, K + 1, VARIANT, VEC)
            stayed = _add_words(stayed, kept_of_lanes(kept, K, WORDS), WORDS)
            z = z + nonfinite_of(taus, d, K, RULE)

        factor = finish_row(
            lane_sums(sums, SUMS), policy, coefficients, repairs, norms2, row,
            K, CHOSEN, VARIANT, EPS_MODE, GUARDS, CLAMPS, POWER, DIRECTION,
        )  # fmt: skip
        store_kept(stayed, counts, row, K, WORDS)

        tl.debug_barrier()  # what one thread wrote another may read
        wrong = anywhere(z != 0)
        for c in range(chunks):
            at = row * cols + c * (LANES * VEC) + position
            inside = position < room(cols, c * (LANES * VEC), LANES * VEC)
            b = load_base(base, at, inside, HAS_BASE)
            d = tl.load(own + c * (LANES * VEC))
            over = write_result(out, b, d, factor, merged, at, inside, HAS_BASE, True, KEEPS)
            if wrong:
                note_inputs(base, experts, merged, report, at, offset, inside, K, HAS_BASE, RULE)
            if anywhere(over):
                note_overflow(over, report, at, offset, K)
        tl.debug_barrier()
