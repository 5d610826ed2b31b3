"""Philox 4x32-10: element i of a tensor takes word i mod 4 of counter i div 4 (docs/methods.md)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _words(counter, stream, seed):
    """The four words (uint32) of int64 counters; ``stream``, ``seed``: int64 scalars."""
    c0 = (counter & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = c0 * 0
    c2 = zero + (stream & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + ((stream >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, c3, k0, k1, 10)


@triton.jit
def random_words(
    first, stream, seed, LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr
):
    """uint32 [LANES, VEC]: the words of elements [first, first + LANES·VEC).

    ALIGNED: ``first`` is a multiple of 4, so that one call serves four neighbours; else one call
    an element.
    """
    if ALIGNED:
        lane = tl.arange(0, LANES)[:, None] * (VEC // 4) + tl.arange(0, VEC // 4)[None, :]
        w0, w1, w2, w3 = _words(first // 4 + lane.to(tl.int64), stream, seed)
        even_odd = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [LANES, VEC / 4, 2, 2]
        return tl.reshape(even_odd, [LANES, VEC])
    else:
        index = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
        return words_at(first + index.to(tl.int64), stream, seed)


@triton.jit
def words_at(flat, stream, seed):
    """uint32: the word of every flat index (int64), one call each."""
    w0, w1, w2, w3 = _words(flat // 4, stream, seed)
    i = flat % 4
    return tl.where(i < 2, tl.where(i == 0, w0, w1), tl.where(i == 2, w2, w3))
