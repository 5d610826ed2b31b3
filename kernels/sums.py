"""Sums of rows of any length for any K: what the two-pass calibration and ``row_stats`` need."""

from __future__ import annotations

import triton
import triton.language as tl

from .delta import block_delta
from .load import load_base, positions, room, widened
from .rowstats import add_dots, add_pairs, add_powers, lane_sums, zero_sums


@triton.jit
def sum_rows(
    base, experts, merged, masks, task_masks, integers, numbers, partial, powers,
    cols, splits, chunks, offset,
    K: tl.constexpr, HAS_BASE: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr,
    GRAM: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums of one split of one row a program; grid (rows · splits,).

    A split is ``chunks`` blocks in a row. ``partial``: float64 [rows, splits, COUNT], COUNT the
    pairs of K + 1 vectors with GRAM, else K dots and the squared norm of d. ``powers``: float64
    [rows, splits, K + 1] of |x|^P (P = 0: largest magnitude; P = −1: not wanted).
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    position = positions(LANES, VEC)
    M: tl.constexpr = K + 1
    if GRAM:
        COUNT: tl.constexpr = (K + 1) * (K + 2) // 2
    else:
        COUNT: tl.constexpr = K + 1
    sums = zero_sums(COUNT, LANES, WIDE)
    raised = zero_sums(M, LANES, True)
    for c in range(chunks):
        start = ((program % splits) * chunks + c) * (LANES * VEC)
        first = row * cols + start
        at = first + position
        inside = position < room(cols, start, LANES * VEC)
        b = load_base(base, at, inside, HAS_BASE)
        d, taus, _kept = block_delta(
            b, experts, merged, masks, task_masks, integers, numbers, at, inside, position,
            first + offset, K, HAS_BASE, KINDS, RULE, ALIGNED, LANES, VEC,
        )  # fmt: skip
        if GRAM:
            sums = add_pairs(sums, taus + (d,), M, VEC, WIDE)
        else:
            sums = add_dots(sums, taus + (d,), d, M, VEC, WIDE)
        if P >= 0:
            raised = add_powers(raised, taus + (d,), M, P)
    totals = lane_sums(sums, COUNT)
    for i in tl.static_range(COUNT):
        tl.store(partial + program * COUNT + i, totals[i])
    if P >= 0:
        for i in tl.static_range(M):
            if P == 0:
                one = tl.max(raised[i], axis=0)
            else:
                one = tl.sum(raised[i], axis=0)
            tl.store(powers + program * M + i, one)


@triton.jit
def sum_gram_tile(
    base, left, right, partial, cols, splits, chunks,
    A: tl.constexpr, B: tl.constexpr, HAS_BASE: tl.constexpr, WIDE: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """⟨τ_i, τ_j⟩ of A × B experts, one tile of the Gram matrix where all pairs are too many for the
    registers; ``partial``: float64 [rows, splits, A·B]; grid (rows · splits,)."""
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    position = positions(LANES, VEC)
    sums = zero_sums(A * B, LANES, WIDE)
    for c in range(chunks):
        start = ((program % splits) * chunks + c) * (LANES * VEC)
        at = row * cols + start + position
        inside = position < room(cols, start, LANES * VEC)
        b = load_base(base, at, inside, HAS_BASE)
        new = ()
        for i in tl.static_range(A):
            x = widened(tl.load(left[i] + at, mask=inside, other=0.0))
            if HAS_BASE:
                x = x - widened(b)
            ys = ()
            olds = ()
            for j in tl.static_range(B):
                y = widened(tl.load(right[j] + at, mask=inside, other=0.0))
                if HAS_BASE:
                    y = y - widened(b)
                ys = ys + (y,)
                olds = olds + (sums[i * B + j],)
            new = new + add_dots(olds, ys, x, B, VEC, WIDE)
        sums = new
    totals = lane_sums(sums, A * B)
    for i in tl.static_range(A * B):
        tl.store(partial + program * (A * B) + i, totals[i])
