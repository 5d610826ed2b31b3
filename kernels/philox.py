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
        # all by lanes and joined last: a lane's words are born where they are compared
        counter = first // 4 + tl.arange(0, LANES).to(tl.int64) * (VEC // 4)
        a0, a1, a2, a3 = _words(counter, stream, seed)
        if VEC == 8:
            b0, b1, b2, b3 = _words(counter + 1, stream, seed)
            a0 = tl.join(a0, b0)
            a1 = tl.join(a1, b1)
            a2 = tl.join(a2, b2)
            a3 = tl.join(a3, b3)
        # [LANES, (counter,) word div 2, word mod 2]
        return tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), [LANES, VEC])
    else:
        index = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
        return words_at(first + index.to(tl.int64), stream, seed)


@triton.jit
def words_at(flat, stream, seed):
    """uint32: the word of every flat index (int64), one call each."""
    w0, w1, w2, w3 = _words(flat // 4, stream, seed)
    i = flat % 4
    return tl.where(i < 2, tl.where(i == 0, w0, w1), tl.where(i == 2, w2, w3))
