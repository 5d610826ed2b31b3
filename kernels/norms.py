"""Sums over a whole tensor that a merge needs first: norms before and after the trim, votes, and
who holds what alone."""

from __future__ import annotations

import triton
import triton.language as tl

from .delta import trimmed_values
from .load import load_base, load_taus, positions, room
from .rowstats import zero_sums
from .vote import tally
from .words import KEEP_ALL


@triton.jit
def _block_values(
    block, base, experts, masks, integers, numbers, n, offset,
    K: tl.constexpr, HAS_BASE: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(K task vectors, the same trimmed) of one block of elements, 0 beyond the end."""
    position = positions(LANES, VEC)
    start = block * (LANES * VEC)
    at = start + position
    inside = position < room(n, start, LANES * VEC)
    b = load_base(base, at, inside, HAS_BASE)
    taus = load_taus(experts, at, inside, b, K, HAS_BASE)
    values, _ = trimmed_values(
        taus, masks, integers, numbers, at, inside, position, start + offset,
        K, KINDS, RULE, ALIGNED, LANES, VEC,
    )  # fmt: skip
    return taus, values


@triton.jit
def norm_sums(
    base, experts, masks, integers, numbers, partial, n, chunks, offset,
    K: tl.constexpr, HAS_BASE: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr,
    P: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """float64 [programs, K, 2]: Σ|τ|^P before and after the trim (P = 0: the largest |τ|) of
    ``chunks`` blocks in a row a program; experts that lose nothing are left out. RULE: without
    factors and weights."""
    program = tl.program_id(0).to(tl.int64)
    before = zero_sums(K, LANES, True)
    after = zero_sums(K, LANES, True)
    for c in range(chunks):
        taus, values = _block_values(
            program * chunks + c, base, experts, masks, integers, numbers, n, offset,
            K, HAS_BASE, KINDS, RULE, ALIGNED, LANES, VEC,
        )  # fmt: skip
        new_before = ()
        new_after = ()
        for k in tl.static_range(K):
            x = before[k]
            y = after[k]
            if KINDS[k] != KEEP_ALL:
                raw = tl.abs(taus[k]).to(tl.float64)
                trimmed = tl.abs(values[k]).to(tl.float64)
                if P == 0:
                    x = tl.maximum(x, tl.max(raw, axis=1))
                    y = tl.maximum(y, tl.max(trimmed, axis=1))
                elif P == 1:
                    x = x + tl.sum(raw, axis=1)
                    y = y + tl.sum(trimmed, axis=1)
                else:
                    x = x + tl.sum(raw * raw, axis=1)
                    y = y + tl.sum(trimmed * trimmed, axis=1)
            new_before = new_before + (x,)
            new_after = new_after + (y,)
        before = new_before
        after = new_after
    for k in tl.static_range(K):
        if KINDS[k] != KEEP_ALL:
            to = partial + (program * K + k) * 2
            if P == 0:
                tl.store(to, tl.max(before[k], axis=0))
                tl.store(to + 1, tl.max(after[k], axis=0))
            else:
                tl.store(to, tl.sum(before[k], axis=0))
                tl.store(to + 1, tl.sum(after[k], axis=0))


@triton.jit
def vote_sums(
    base, experts, masks, integers, numbers, partial, n, offset,
    K: tl.constexpr, HAS_BASE: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """int32 [programs]: the signs elected in one block a program, zero votes as 0, summed."""
    program = tl.program_id(0).to(tl.int64)
    _taus, values = _block_values(
        program, base, experts, masks, integers, numbers, n, offset,
        K, HAS_BASE, KINDS, RULE, ALIGNED, LANES, VEC,
    )  # fmt: skip
    s = tally(values, K, RULE)
    signs = (s > 0).to(tl.int32) - (s < 0).to(tl.int32)
    tl.store(partial + program, tl.sum(tl.sum(signs, axis=1), axis=0))


@triton.jit
def held_counts(
    base, experts, masks, integers, numbers, partial, n, offset,
    K: tl.constexpr, HAS_BASE: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """int32 [programs, K, 2]: entries of one block a program that an expert holds alone, and with
    others, after the trim."""
    program = tl.program_id(0).to(tl.int64)
    _taus, values = _block_values(
        program, base, experts, masks, integers, numbers, n, offset,
        K, HAS_BASE, KINDS, RULE, ALIGNED, LANES, VEC,
    )  # fmt: skip
    holders = tl.zeros(values[0].shape, tl.int32)
    for k in tl.static_range(K):
        holders = holders + (values[k] != 0).to(tl.int32)
    for k in tl.static_range(K):
        holds = values[k] != 0
        alone = (holds & (holders == 1)).to(tl.int32)
        shared = (holds & (holders > 1)).to(tl.int32)
        to = partial + (program * K + k) * 2
        tl.store(to, tl.sum(tl.sum(alone, axis=1), axis=0))
        tl.store(to + 1, tl.sum(tl.sum(shared, axis=1), axis=0))
