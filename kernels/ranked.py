"""Keep masks of ranked trims (DELLA) from sorted rows.

The sort itself is torch's: a radix sort of whole rows on the device is a solved problem, and the
mask is one byte an element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .load import load_base, load_tau, magnitude_bits, positions, room
from .philox import words_at


@triton.jit
def magnitudes(
    base, expert, bits, n, HAS_BASE: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr
):
    """int32 [n]: bit patterns of |τ|."""
    start = tl.program_id(0).to(tl.int64) * (LANES * VEC)
    position = positions(LANES, VEC)
    inside = position < room(n, start, LANES * VEC)
    at = start + position
    tau = load_tau(expert, at, inside, load_base(base, at, inside, HAS_BASE), HAS_BASE)
    tl.store(bits + at, magnitude_bits(tau), mask=inside)


@triton.jit
def keep_ranked(
    order, mask, integers, chances, k, cols, blocks_per_row, offset,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mask[row, order[row, r]] = word < ⌊p(r)·2³²⌋ with p rising from density − ε to density + ε.

    ``order``: int64 [rows, cols], ascending; ``chances``: float64 [2 K], density − ε and 2 ε of
    every expert, then density [K] for rows of one element; grid (rows · blocks_per_row,).
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_per_row
    rank = (program % blocks_per_row) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = rank < cols
    column = tl.load(order + row * cols + rank, mask=inside, other=0)
    flat = row * cols + column
    low = tl.load(chances + k)
    span = tl.load(chances + K + k)
    p = low + span * rank.to(tl.float64) / tl.maximum(cols - 1, 1).to(tl.float64)
    if cols == 1:
        p = p * 0.0 + tl.load(chances + 2 * K + k)
    bound = tl.floor(p * 4294967296.0)
    word = words_at(flat + offset, tl.load(integers + 4 * K + k), tl.load(integers + 6 * K))
    tl.store(mask + flat, (word.to(tl.float64) < bound).to(tl.uint8), mask=inside)
