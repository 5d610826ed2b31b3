"""Launch configurations by rule: pure functions of K, the columns and the element sizes.

The figures follow from the register file (65 536 registers a multiprocessor on sm_80 and sm_90) and
from 16-byte accesses; docs/kernels.md derives them. With MAGIC_FAST_AUTOTUNE set, the number of
warps of the merge kernels is tried out instead, once per kernel and shape class.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

MOST_EXPERTS = 64  # every loop over experts is unrolled
FUSED_EXPERTS = 8  # up to here all inner products of a row fit the registers beside the row
FUSED_CHUNKS = 4
#: of one program; the interpreter's time goes by operations, not by elements
WARPS = 16 if os.environ.get("TRITON_INTERPRET") == "1" else 4
GRAM_TILE = 4  # experts on each side of a tile of the Gram matrix where there are more


@dataclass(frozen=True)
class Shape:
    """One program: ``lanes`` threads own ``vec`` neighbouring elements each."""

    lanes: int
    vec: int
    warps: int

    @property
    def block(self) -> int:
        return self.lanes * self.vec


def autotune() -> bool:
    """Whether MAGIC_FAST_AUTOTUNE asks for measured instead of derived configurations."""
    return os.environ.get("MAGIC_FAST_AUTOTUNE", "0") not in ("", "0")


def vector(num_experts: int, widest: int) -> int:
    """Elements a lane owns: 16 bytes of 16-bit inputs; half of it where K or float32 inputs would
    not leave registers for K vectors of them."""
    return 8 if widest == 2 and num_experts <= 8 else 4


def block_shape(num_experts: int, widest: int, warps: int = WARPS) -> Shape:
    """For kernels without row sums. ``widest``: bytes of the widest input element."""
    return Shape(32 * warps, vector(num_experts, widest), warps)


def row_shape(num_experts: int, widest: int, cols: int) -> tuple[Shape, int] | None:
    """(shape, chunks) of a program that keeps a whole row, or None where the row is too long.

    A thread keeps d and the base of ``chunks · vec`` elements, the K task vectors of one chunk and
    one accumulator a pair of vectors: 45 for K = 8.
    """
    if num_experts > FUSED_EXPERTS:
        return None
    vec = vector(num_experts, widest)
    for warps in (WARPS, 2 * WARPS, 4 * WARPS):
        chunks = -(-cols // (32 * warps * vec))
        if chunks <= FUSED_CHUNKS:
            return Shape(32 * warps, vec, warps), chunks
    return None


def segments_for(blocks: int, multiprocessors: int) -> tuple[int, int]:
    """(programs, blocks of each) for a pass whose programs keep counters: a few programs a
    multiprocessor, equally long."""
    chunks = max(1, -(-blocks // (8 * multiprocessors)))
    return -(-blocks // chunks), chunks
