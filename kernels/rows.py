"""Calibrated merges: one program a row that fits its registers, or sums of longer rows.

``merge_rows`` reads base and experts once: the inner products of the row accumulate while d and
the base are kept in registers, the coefficient is finished, and the row is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .calibrate import acting_factor, row_coefficient
from .delta import block_delta
from .load import load_base, positions, room
from .rowstats import add_dots, add_pairs, add_powers, add_squares, lane_sums, zero_sums
from .store import nonfinite_of, note_block, write_result
from .words import KEEP_ALL, MANIFOLD, MERGED, SPHERE


@triton.jit
def merge_rows(
    base, experts, merged, out, masks, task_masks, integers, numbers, policy,
    coefficients, repairs, norms2, counts, report, cols, offset,
    K: tl.constexpr, HAS_BASE: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr,
    CHOSEN: tl.constexpr, VARIANT: tl.constexpr, EPS_MODE: tl.constexpr, GUARDS: tl.constexpr,
    CLAMPS: tl.constexpr, POWER: tl.constexpr, DIRECTION: tl.constexpr, KEEPS: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """out = base + factor·d of one row a program; grid (rows,), cols ≤ CHUNKS·LANES·VEC.

    Args:
        policy: float64 [4], see ``acting_factor``.
        coefficients: float32 [rows], raw ξ; repairs: uint8 [rows].
        norms2: float64 [rows, K + 2]: ‖τ_k‖², ‖d‖² before and after the factor.
        counts: int32 [rows, K] of kept entries; report: see ``note_block``.
    """
    row = tl.program_id(0).to(tl.int64)
    position = positions(LANES, VEC)
    M: tl.constexpr = K + 1
    if VARIANT == SPHERE:
        COUNT: tl.constexpr = K + 1
    else:
        COUNT: tl.constexpr = (K + 1) * (K + 2) // 2
    sums = zero_sums(COUNT, LANES, False)
    stayed = ()
    for _ in tl.static_range(K):
        stayed = stayed + (tl.zeros([LANES], tl.int32),)
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
        if VARIANT == MANIFOLD:
            sums = add_pairs(sums, taus + (d,), M, VEC, False)
        else:
            sums = add_squares(sums, taus + (d,), M, VEC)
        if not RULE[MERGED]:
            more = ()
            for k in tl.static_range(K):
                if KINDS[k] != KEEP_ALL:
                    more = more + (stayed[k] + tl.sum(kept[k].to(tl.int32), axis=1),)
                else:
                    more = more + (stayed[k],)
            stayed = more
        z = z + nonfinite_of(taus, d, K, RULE)
        bases = bases + (b,)
        deltas = deltas + (d,)

    totals = lane_sums(sums, COUNT)
    raw = row_coefficient(totals, M, CHOSEN, VARIANT, EPS_MODE)
    norm2 = totals[COUNT - 1]
    experts_norm2 = norm2 * 0.0
    for k in tl.static_range(K):
        if VARIANT == SPHERE:
            own = totals[k]
        else:
            own = totals[k * M - k * (k - 1) // 2]
        tl.store(norms2 + row * (K + 2) + k, own)
        for n in tl.static_range(len(CHOSEN)):
            if CHOSEN[n] == k:
                experts_norm2 = experts_norm2 + own
    wide, repaired = acting_factor(
        raw, experts_norm2, norm2, policy, GUARDS, CLAMPS, POWER, DIRECTION
    )
    factor = wide.to(tl.float32)
    tl.store(norms2 + row * (K + 2) + K, norm2)
    tl.store(norms2 + row * (K + 2) + K + 1, norm2 * factor.to(tl.float64) * factor.to(tl.float64))
    tl.store(coefficients + row, raw.to(tl.float32))
    tl.store(repairs + row, repaired.to(tl.uint8))
    for k in tl.static_range(K):
        if KINDS[k] != KEEP_ALL:
            tl.store(counts + row * K + k, tl.sum(stayed[k], axis=0))

    for c in tl.static_range(CHUNKS):
        at = row * cols + c * (LANES * VEC) + position
        inside = position < room(cols, c * (LANES * VEC), LANES * VEC)
        over = write_result(
            out, bases[c], deltas[c], factor, merged, at, inside, HAS_BASE, True, KEEPS
        )
        note_block(
            z, over, base, experts, merged, report, at, position, offset, inside,
            K, HAS_BASE, RULE,
        )  # fmt: skip


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
            x = tl.load(left[i] + at, mask=inside, other=0.0).to(tl.float32)
            if HAS_BASE:
                x = x - b.to(tl.float32)
            ys = ()
            olds = ()
            for j in tl.static_range(B):
                y = tl.load(right[j] + at, mask=inside, other=0.0).to(tl.float32)
                if HAS_BASE:
                    y = y - b.to(tl.float32)
                ys = ys + (y,)
                olds = olds + (sums[i * B + j],)
            new = new + add_dots(olds, ys, x, B, VEC, WIDE)
        sums = new
    totals = lane_sums(sums, A * B)
    for i in tl.static_range(A * B):
        tl.store(partial + program * (A * B) + i, totals[i])
