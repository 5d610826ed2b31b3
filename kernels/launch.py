"""Launch configurations by rule: pure functions of K, the columns and the element sizes.

The figures follow from the register file (65 536 registers a multiprocessor on sm_80 and sm_90) and
from 16-byte accesses. With MAGIC_FAST_AUTOTUNE set, the number of warps of ``merge_blocks`` is
tried out instead, once per K, dtypes and recipe.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass

FUSED_EXPERTS = 8  # up to here all inner products of a row fit the registers beside the row
KEPT_ELEMENTS = 32  # of d and base that a thread keeps between the sums and the store
KEPT_EXPERTS = 4  # up to here d and the base of a row stay in registers too
MOST_COLS = 65535  # of a row in one program: counts of kept entries are 16 bits wide
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


def measured(run: Callable[[], object]) -> float:
    """Milliseconds of one launch."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=20))


_tuned: dict[Hashable, Shape] = {}


def tuned(key: Hashable, derived: Shape, run: Callable[[Shape], object]) -> Shape:
    """``derived``, or, under MAGIC_FAST_AUTOTUNE, the quickest number of warps for ``key``.

    Only for kernels without sums over lanes: there the threads do not change a bit of the result.
    """
    if not autotune():
        return derived
    if key not in _tuned:
        trials = [Shape(32 * warps, derived.vec, warps) for warps in (2, 4, 8)]
        times = {shape: measured(lambda shape=shape: run(shape)) for shape in trials}
        _tuned[key] = min(times, key=times.__getitem__)
    return _tuned[key]


def vector(num_experts: int, widest: int, trims: bool = False) -> int:
    """Elements a lane owns: 16 bytes of 16-bit inputs; half of it where float32 inputs, or K task
    vectors and K trimmed ones, would not fit the registers."""
    return 8 if widest == 2 and num_experts <= (4 if trims else 8) else 4


def block_shape(num_experts: int, widest: int, trims: bool = False, warps: int = WARPS) -> Shape:
    """For kernels without row sums. ``widest``: bytes of the widest input element; ``trims``:
    whether values are kept beside the task vectors (a trim, a vote)."""
    return Shape(32 * warps, vector(num_experts, widest, trims), warps)


@dataclass(frozen=True)
class RowShape(Shape):
    """One program a row: ``chunks`` blocks; ``kept``: d and base stay in registers, else d waits
    in a scratch row."""

    chunks: int
    kept: bool


def row_shape(
    num_experts: int, widest: int, cols: int, trims: bool = False, scored: bool = False
) -> RowShape | None:
    """A program that calibrates a row, or None where the row (or K) is too long for one.

    A thread has one accumulator a pair of vectors (45 for K = 8), the K task vectors of one chunk
    and, where they are kept, d and the base of all chunks. From K = 5 on, or four chunks, these do
    not fit 255 registers: d waits in a scratch row of the program, which stays in the L2 cache
    (two programs of 4 warps on each of 132 multiprocessors: 9 MB for rows of 8192). The finish of
    a row costs a warp some 2000 instructions, so fewer warps are better. Scores (PCB) leave no room
    for a row beside them either.
    """
    if num_experts > FUSED_EXPERTS or cols > MOST_COLS:
        return None
    vec = vector(num_experts, widest, trims)
    for warps in (WARPS, 2 * WARPS, 4 * WARPS):
        chunks = -(-cols // (32 * warps * vec))
        if chunks * vec <= KEPT_ELEMENTS and num_experts <= KEPT_EXPERTS and not scored:
            return RowShape(32 * warps, vec, warps, chunks, True)
    return RowShape(32 * WARPS, vec, WARPS, -(-cols // (32 * WARPS * vec)), False)


def segments_for(blocks: int, multiprocessors: int) -> tuple[int, int]:
    """(programs, blocks of each) for a pass whose programs keep counters: a few programs a
    multiprocessor, equally long."""
    chunks = max(1, -(-blocks // (8 * multiprocessors)))
    return -(-blocks // chunks), chunks


def row_programs(n_rows: int, multiprocessors: int) -> int:
    """Programs that walk over the rows, each with a scratch row of its own."""
    return min(n_rows, 2 * multiprocessors)


def stages(trims: bool) -> int:
    """Chunks in flight where a row is read in a loop: the next one is loaded while this one is
    worked on, unless a trim needs the registers and its arithmetic hides the load anyway."""
    return 1 if trims else 2
