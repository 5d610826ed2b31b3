"""Row sums: the inner products of K task vectors and d, and p-norm sums.

A sum runs over one accumulator a lane: the VEC elements that a lane owns are taken apart (in
registers, nothing moves) and added by explicit fma, so the rest of a kernel can be compiled
without contraction. ``pairs``: upper triangle of M = K + 1 vectors, row by row, the last one d.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns(x):
    """[LANES, VEC] → VEC tensors of [LANES], VEC 4 or 8, in any order that is the same for all."""
    L: tl.constexpr = x.shape[0]
    V: tl.constexpr = x.shape[1]
    low, high = tl.split(tl.reshape(x, [L, V // 2, 2]))
    low0, low1 = tl.split(tl.reshape(low, [L, V // 4, 2]))
    high0, high1 = tl.split(tl.reshape(high, [L, V // 4, 2]))
    if V == 4:
        a = tl.reshape(low0, [L])
        b = tl.reshape(low1, [L])
        c = tl.reshape(high0, [L])
        d = tl.reshape(high1, [L])
        return (a, b, c, d)
    else:
        a, b = tl.split(low0)
        c, d = tl.split(low1)
        e, f = tl.split(high0)
        g, h = tl.split(high1)
        return (a, b, c, d, e, f, g, h)


@triton.jit
def _parts(vectors, M: tl.constexpr, WIDE: tl.constexpr):
    parts = ()
    for i in tl.static_range(M):
        if WIDE:
            parts = parts + (columns(vectors[i].to(tl.float64)),)
        else:
            parts = parts + (columns(vectors[i]),)
    return parts


@triton.jit
def zero_sums(COUNT: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr):
    """COUNT accumulators of [LANES]."""
    sums = ()
    for _ in tl.static_range(COUNT):
        if WIDE:
            sums = sums + (tl.zeros([LANES], tl.float64),)
        else:
            sums = sums + (tl.zeros([LANES], tl.float32),)
    return sums


@triton.jit
def zero_counts(COUNT: tl.constexpr, LANES: tl.constexpr):
    """COUNT counters of [LANES], int32."""
    counts = ()
    for _ in tl.static_range(COUNT):
        counts = counts + (tl.zeros([LANES], tl.int32),)
    return counts


@triton.jit
def add_pairs(sums, vectors, M: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Adds the products of all pairs (i ≤ j). WIDE: in float64, where those of float32 are
    exact."""
    parts = _parts(vectors, M, WIDE)
    new = ()
    for i in tl.static_range(M):
        for j in tl.static_range(i, M):
            total = sums[len(new)]
            for e in tl.static_range(VEC):
                total = tl.fma(parts[i][e], parts[j][e], total)
            new = new + (total,)
    return new


@triton.jit
def add_squares(sums, vectors, M: tl.constexpr, VEC: tl.constexpr):
    """Adds the squares of M vectors: what ``sphere`` needs."""
    parts = _parts(vectors, M, False)
    new = ()
    for i in tl.static_range(M):
        total = sums[i]
        for e in tl.static_range(VEC):
            total = tl.fma(parts[i][e], parts[i][e], total)
        new = new + (total,)
    return new


@triton.jit
def add_dots(sums, vectors, d, K: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Adds ⟨τ_k, d⟩ of K vectors."""
    with_d = _parts((d,), 1, WIDE)
    parts = _parts(vectors, K, WIDE)
    new = ()
    for k in tl.static_range(K):
        total = sums[k]
        for e in tl.static_range(VEC):
            total = tl.fma(parts[k][e], with_d[0][e], total)
        new = new + (total,)
    return new


@triton.jit
def add_powers(sums, vectors, M: tl.constexpr, P: tl.constexpr):
    """Adds |x|^P of M vectors in float64 (P = 0: keeps the largest |x|)."""
    new = ()
    for i in tl.static_range(M):
        x = tl.abs(vectors[i]).to(tl.float64)
        if P == 0:
            new = new + (tl.maximum(sums[i], tl.max(x, axis=1)),)
        else:
            y = x
            for _ in tl.static_range(P - 1):
                y = y * x
            new = new + (sums[i] + tl.sum(y, axis=1),)
    return new


@triton.jit
def _eight_sums(sums, i: tl.constexpr):
    """Sums i … i + 7 by one reduction, so that eight share its barriers."""
    ab = tl.join(tl.join(sums[i], sums[i + 1]), tl.join(sums[i + 2], sums[i + 3]))
    cd = tl.join(tl.join(sums[i + 4], sums[i + 5]), tl.join(sums[i + 6], sums[i + 7]))
    total = tl.sum(tl.join(ab, cd), axis=0)  # [2, 2, 2]
    left, right = tl.split(total)
    a, b = tl.split(left)
    c, d = tl.split(right)
    return tl.split(a) + tl.split(b) + tl.split(c) + tl.split(d)


@triton.jit
def lane_sums(sums, COUNT: tl.constexpr):
    """COUNT scalars, float64: the lanes of each accumulator added in float64 by a fixed tree.

    The few terms of a lane are added in float32; over the lanes that would not do (a coefficient is
    good to one unit in its last place).
    """
    wide = ()
    for i in tl.static_range(COUNT):
        wide = wide + (sums[i].to(tl.float64),)
    found = ()
    for i in tl.static_range(0, COUNT - COUNT % 8, 8):
        found = found + _eight_sums(wide, i)
    for i in tl.static_range(COUNT - COUNT % 8, COUNT):
        found = found + (tl.sum(wide[i], axis=0),)
    return found
