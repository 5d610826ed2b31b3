"""Many small tensors in one launch: a table of addresses instead of arguments.

Norms, biases and LoRA factors are too small to fill a device one by one, and a launch each costs
more than their bytes. Each program looks up which tensor its block belongs to and runs the same
stages as ``merge_blocks``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta import block_delta
from .load import load_base, positions, room
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
def _pointer(place, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    pointer = tl.load(place).to(tl.pointer_type(DTYPE))
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def merge_table(
    table, block_job, block_start, integers, numbers, counts, report,
    K: tl.constexpr, HAS_BASE: tl.constexpr, DTYPES: tl.constexpr, KINDS: tl.constexpr,
    RULE: tl.constexpr, ALIGNED: tl.constexpr, WORDS: tl.constexpr, WIDE: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """out = base + d of the tensors in ``table``; one block a program.

    Args:
        table: int64 [jobs, K + 4]: addresses of base, out and K experts, elements, offset.
        block_job, block_start: int64 [programs]: which tensor, and which of its blocks.
        integers, numbers: one set a job, [jobs, 6 K + 2] and [jobs, 6 K + 4].
        counts: int32 [programs, K]; report: int64 [jobs, K + 3].
        DTYPES: of base, out and K experts. WIDE: all addresses and sizes are multiples of 16.
    """
    program = tl.program_id(0).to(tl.int64)
    job = tl.load(block_job + program).to(tl.int64)
    start = tl.load(block_start + program) * (LANES * VEC)
    row = table + job * (K + 4)
    base = _pointer(row, DTYPES[0], WIDE)
    out = _pointer(row + 1, DTYPES[1], WIDE)
    experts = ()
    for k in tl.static_range(K):
        experts = experts + (_pointer(row + 2 + k, DTYPES[2 + k], WIDE),)
    n = tl.load(row + K + 2)
    if WIDE:
        n = tl.multiple_of(n, 16)
    offset = tl.load(row + K + 3)
    mine = integers + job * (6 * K + 2)
    my_numbers = numbers + job * (6 * K + 4)
    position = positions(LANES, VEC)
    inside = position < room(n, start, LANES * VEC)
    at = start + position
    b = load_base(base, at, inside, HAS_BASE)
    d, taus, kept = block_delta(
        b, experts, base, experts, experts, mine, my_numbers, at, inside, position,
        start + offset, K, HAS_BASE, KINDS, RULE, ALIGNED, LANES, VEC,
    )  # fmt: skip
    over = write_result(out, b, d, 1.0, base, at, inside, HAS_BASE, False, False)
    store_kept(kept_of_lanes(kept, K, WORDS), counts, program, K, WORDS)
    bad = nonfinite_of(taus, d, K, RULE) != 0
    if anywhere(bad | over):
        notes = report + job * (K + 3)
        note_inputs(base, experts, base, notes, at, offset, inside, K, HAS_BASE, RULE)
        note_overflow(over, notes, at, offset, K)
