"""The end of a block: base + factor·d rounded once, and notes of what is not finite."""

from __future__ import annotations

import triton
import triton.language as tl

from .load import INF_BITS, any_nonfinite, magnitude_bits, note_nonfinite
from .words import KEEP_ALL, MERGED


@triton.jit
def overflow_bits(DTYPE: tl.constexpr):
    """Bits of the least |float32| that rounds to infinity in DTYPE."""
    if DTYPE == tl.bfloat16:
        limit: tl.constexpr = 0x7F7F8000
    elif DTYPE == tl.float16:
        limit: tl.constexpr = 0x477FF000  # 65520
    else:
        limit: tl.constexpr = 0x7F800000
    return limit


@triton.jit
def write_result(
    out, b, d, factor, merged, at, inside,
    HAS_BASE: tl.constexpr, FACTORS: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """Stores base + factor·d; returns bool: finite results that the output dtype cannot hold.

    KEEPS: where the factor is 1, the values of ``merged`` as they are, not base + (merged − base).
    """
    r = d
    if FACTORS:
        r = r * factor
    if HAS_BASE:
        r = b.to(tl.float32) + r
    if KEEPS:
        same = tl.load(merged + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.where(factor == 1.0, same, r)
    tl.store(out + at, r.to(out.dtype.element_ty), mask=inside)
    bits = magnitude_bits(r)
    return (bits >= overflow_bits(out.dtype.element_ty)) & (bits < INF_BITS) & inside


@triton.jit
def note_block(
    z, overflowed, base, experts, merged, report, at, position, offset, inside,
    K: tl.constexpr, HAS_BASE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Where something of a block is not finite, or overflowed: which, and the first of them.

    ``report``: int64 [K + 3], smallest flat index of each expert, the merged tensor, the base and
    the overflow. The atomics run only where something is wrong; a minimum has no order.
    """
    bad = (z != 0) | overflowed
    if tl.max(tl.max(bad.to(tl.int32), axis=1), axis=0) > 0:
        flat = at + offset
        for k in tl.static_range(K):
            note_nonfinite(experts[k], report, k, at, flat, inside)
        if RULE[MERGED]:
            note_nonfinite(merged, report, K, at, flat, inside)
        if HAS_BASE:
            note_nonfinite(base, report, K + 1, at, flat, inside)
        where_over = tl.where(overflowed, flat, 0x7FFFFFFFFFFFFFFF)
        first = tl.min(tl.min(where_over, axis=1), axis=0)
        if first != 0x7FFFFFFFFFFFFFFF:
            tl.atomic_min(report + K + 2, first)


@triton.jit
def nonfinite_of(taus, d, K: tl.constexpr, RULE: tl.constexpr):
    """float32: not 0 (NaN) where an input is not finite."""
    z = any_nonfinite(taus, K)
    if RULE[MERGED]:
        z = tl.fma(d, 0.0, z)
    return z


@triton.jit
def count_kept(kept, counts, program, K: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr):
    """How many entries of each trimmed expert this program kept: ``counts[program, k]``, int32."""
    if not RULE[MERGED]:
        for k in tl.static_range(K):
            if KINDS[k] != KEEP_ALL:
                n = tl.sum(tl.sum(kept[k].to(tl.int32), axis=1), axis=0)
                tl.store(counts + program * K + k, n)
