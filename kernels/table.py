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
from .store import count_kept, nonfinite_of, note_block, write_result


@triton.jit
def merge_table(
    table, block_job, block_start, integers, numbers, counts, report,
    K: tl.constexpr, HAS_BASE: tl.constexpr, DTYPES: tl.constexpr, KINDS: tl.constexpr,
    RULE: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """out = base + d of the tensors in ``table``; one block a program.

    Args:
        table: int64 [jobs, K + 4]: addresses of base, out and K experts, elements, offset.
        block_job, block_start: int32 and int64 [programs]: which tensor, and where in it.
        integers, numbers: one set a job, [jobs, 6 K + 2] and [jobs, 3 K + 2].
        counts: int32 [programs, K]; report: int64 [jobs, K + 3].
        DTYPES: of base, out and K experts.
    """
    program = tl.program_id(0).to(tl.int64)
    job = tl.load(block_job + program).to(tl.int64)
    start = tl.load(block_start + program)
    row = table + job * (K + 4)
    base = tl.load(row).to(tl.pointer_type(DTYPES[0]))
    out = tl.load(row + 1).to(tl.pointer_type(DTYPES[1]))
    experts = ()
    for k in tl.static_range(K):
        experts = experts + (tl.load(row + 2 + k).to(tl.pointer_type(DTYPES[2 + k])),)
    n = tl.load(row + K + 2)
    offset = tl.load(row + K + 3)
    mine = integers + job * (6 * K + 2)
    my_numbers = numbers + job * (3 * K + 2)
    position = positions(LANES, VEC)
    inside = position < room(n, start, LANES * VEC)
    at = tl.multiple_of(start, 8) + position
    b = load_base(base, at, inside, HAS_BASE)
    d, taus, kept = block_delta(
        b, experts, base, experts, experts, mine, my_numbers, at, inside, position,
        start + offset, K, HAS_BASE, KINDS, RULE, ALIGNED, LANES, VEC,
    )  # fmt: skip
    over = write_result(out, b, d, 1.0, base, at, inside, HAS_BASE, False, False)
    count_kept(kept, counts, program, K, KINDS, RULE)
    z = nonfinite_of(taus, d, K, RULE)
    note_block(
        z, over, base, experts, base, report + job * (K + 3), at, position, offset, inside,
        K, HAS_BASE, RULE,
    )  # fmt: skip
