"""The merge without row statistics: one program a block, one read and one write.

Also the second pass of rows that are too long for one program, and ``scale``: with FACTORS every
row of d is multiplied by its factor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta import block_delta
from .load import load_base, positions, room, widened
from .store import (
    anywhere,
    kept_of_lanes,
    nonfinite_of,
    note_inputs,
    note_overflow,
    store_kept,
    write_result,
)


@triton.jit
def merge_blocks(
    base, experts, merged, out, masks, task_masks, integers, numbers, factors, counts, report,
    cols, blocks_per_row, offset,
    K: tl.constexpr, HAS_BASE: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr,
    FACTORS: tl.constexpr, KEEPS: tl.constexpr, ALIGNED: tl.constexpr, WORDS: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """out = base + factor[row]·d over [rows, cols]; grid (rows · blocks_per_row,).

    Args:
        factors: float32 [rows] with FACTORS.
        counts: int32 [programs, K] of kept entries; report: see ``note_inputs``.
        KEEPS: a row of factor 1 keeps the bits of ``merged``.
        ALIGNED: every block starts at a multiple of 4 of the whole tensor.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_per_row
    start = (program % blocks_per_row) * (LANES * VEC)
    position = positions(LANES, VEC)
    inside = position < room(cols, start, LANES * VEC)
    first = row * cols + start
    at = first + position
    b = load_base(base, at, inside, HAS_BASE)
    d, taus, kept = block_delta(
        b, experts, merged, masks, task_masks, integers, numbers, at, inside, position,
        first + offset, K, HAS_BASE, KINDS, RULE, ALIGNED, LANES, VEC,
    )  # fmt: skip
    factor = 1.0
    if FACTORS:
        factor = tl.load(factors + row)
    overflowed = write_result(out, b, d, factor, merged, at, inside, HAS_BASE, FACTORS, KEEPS)
    store_kept(kept_of_lanes(kept, K, WORDS), counts, program, K, WORDS)
    bad = nonfinite_of(taus, d, K, RULE) != 0
    if anywhere(bad | overflowed):
        note_inputs(base, experts, merged, report, at, offset, inside, K, HAS_BASE, RULE)
        note_overflow(overflowed, report, at, offset, K)


@triton.jit
def scale_blocks(
    base, merged, out, factors, cols, blocks_per_row,
    HAS_BASE: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """out = base + factor[row]·(merged − base); grid (rows · blocks_per_row,)."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_per_row
    start = (program % blocks_per_row) * (LANES * VEC)
    position = positions(LANES, VEC)
    inside = position < room(cols, start, LANES * VEC)
    at = row * cols + start + position
    b = load_base(base, at, inside, HAS_BASE)
    d = widened(tl.load(merged + at, mask=inside, other=0.0))
    if HAS_BASE:
        d = d - widened(b)
    write_result(out, b, d, tl.load(factors + row), merged, at, inside, HAS_BASE, True, False)
