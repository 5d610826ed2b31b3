"""The end of a block: base + factor·d rounded once, and notes of what is not finite."""

from __future__ import annotations

import triton
import triton.language as tl

from .load import INF_BITS, any_nonfinite, magnitude_bits, note_nonfinite, widened


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
def rounded(x, DTYPE: tl.constexpr):
    """float32 → DTYPE, to nearest even. bfloat16 by integer operations, as everywhere in this
    package: no conversion of a device or of the interpreter may flush denormals."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        word = tl.where((bits & 0x7FFFFFFF) > INF_BITS, quiet, up)
        y = word.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


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
        r = widened(b) + r
    if KEEPS:
        same = widened(tl.load(merged + at, mask=inside, other=0.0))
        r = tl.where(factor == 1.0, same, r)
    tl.store(out + at, rounded(r, out.dtype.element_ty), mask=inside)
    bits = magnitude_bits(r)
    return (bits >= overflow_bits(out.dtype.element_ty)) & (bits < INF_BITS) & inside


@triton.jit
def anywhere(bad):
    """Whether any element of a block is marked: one reduction."""
    return tl.max(tl.max(bad.to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def note_inputs(
    base, experts, merged, report, at, offset, inside,
    K: tl.constexpr, HAS_BASE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """First NaN or infinity of every input of a block; run only where there is one.

    ``report``: int64 [K + 3], smallest flat index of each expert, the merged tensor, the base and
    the overflow. A minimum has no order, so the atomics change nothing between runs.
    """
    flat = at + offset
    for k in tl.static_range(K):
        note_nonfinite(experts[k], report, k, at, flat, inside)
    if RULE.merged:
        note_nonfinite(merged, report, K, at, flat, inside)
    if HAS_BASE:
        note_nonfinite(base, report, K + 1, at, flat, inside)


@triton.jit
def note_overflow(overflowed, report, at, offset, K: tl.constexpr):
    """First overflow of a block into ``report[K + 2]``."""
    flat = tl.where(overflowed, at + offset, 0x7FFFFFFFFFFFFFFF)
    first = tl.min(tl.min(flat, axis=1), axis=0)
    if first != 0x7FFFFFFFFFFFFFFF:
        tl.atomic_min(report + K + 2, first)


@triton.jit
def nonfinite_of(taus, d, K: tl.constexpr, RULE: tl.constexpr):
    """float32: not 0 (NaN) where an input is not finite."""
    z = any_nonfinite(taus, K)
    if RULE.merged:
        z = tl.fma(d, 0.0, z)
    return z


@triton.jit
def kept_of_lanes(kept, K: tl.constexpr, WORDS: tl.constexpr):
    """WORDS = ⌈K / 2⌉ (0: nobody trims) int32 [LANES]: entries that stay, two experts in one word,
    16 bits each: a program covers fewer than 65 536 elements."""
    words = ()
    for w in tl.static_range(WORDS):
        word = tl.sum(kept[2 * w].to(tl.int32), axis=1)
        if 2 * w + 1 < K:
            word += tl.sum(kept[2 * w + 1].to(tl.int32), axis=1) << 16
        words = words + (word,)
    return words


@triton.jit
def store_kept(words, counts, program, K: tl.constexpr, WORDS: tl.constexpr):
    """``counts[program, k]``, int32, from the words of the lanes."""
    for w in tl.static_range(WORDS):
        total = tl.sum(words[w], axis=0)
        tl.store(counts + program * K + 2 * w, total & 0xFFFF)
        if 2 * w + 1 < K:
            tl.store(counts + program * K + 2 * w + 1, (total >> 16) & 0xFFFF)
