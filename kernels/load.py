"""Blocks of [LANES, VEC] elements: one lane owns VEC neighbours, a 16-byte access in 16-bit dtypes.

Every kernel walks memory in such blocks, so that a sum over the second axis stays within a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF_BITS = tl.constexpr(0x7F800000)


@triton.jit
def positions(LANES: tl.constexpr, VEC: tl.constexpr):
    """int32 [LANES, VEC]: element number inside the block."""
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def room(size, start, BLOCK: tl.constexpr):
    """How many elements of the block at ``start`` lie within ``size`` (int32, 0 … BLOCK)."""
    return tl.minimum(tl.maximum(size - start, 0), BLOCK).to(tl.int32)


@triton.jit
def widened(x):
    """float32 of what is stored, exactly. bfloat16 by its bits: the interpreter's conversion
    flushes denormals, and on a GPU it is the same one instruction."""
    if x.dtype == tl.bfloat16:
        y = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def load_base(base, at, inside, HAS_BASE: tl.constexpr):
    """θ₀ as it is stored; zeros (float32) where there is none."""
    if HAS_BASE:
        b = tl.load(base + at, mask=inside, other=0.0)
    else:
        b = tl.zeros(inside.shape, tl.float32)
    return b


@triton.jit
def load_tau(expert, at, inside, b, HAS_BASE: tl.constexpr):
    """τ = fl(θ − θ₀), float32, zeros outside."""
    tau = widened(tl.load(expert + at, mask=inside, other=0.0))
    if HAS_BASE:
        tau = tau - widened(b)
    return tau


@triton.jit
def load_taus(experts, at, inside, b, K: tl.constexpr, HAS_BASE: tl.constexpr):
    """K task vectors."""
    taus = ()
    for k in tl.static_range(K):
        taus = taus + (load_tau(experts[k], at, inside, b, HAS_BASE),)
    return taus


@triton.jit
def magnitude_bits(x):
    """int32 bit pattern of |x|: it orders as |x| does, NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def any_nonfinite(taus, K: tl.constexpr):
    """float32: 0 where all are finite, NaN elsewhere. One instruction an element."""
    z = taus[0] * 0.0
    for k in tl.static_range(1, K):
        z = tl.fma(taus[k], 0.0, z)
    return z


@triton.jit
def note_nonfinite(source, report, slot, at, flat, inside):
    """Smallest flat index of a NaN or infinity of this block into ``report[slot]``."""
    x = widened(tl.load(source + at, mask=inside, other=0.0))
    bad = magnitude_bits(x) >= INF_BITS
    first = tl.min(tl.min(tl.where(bad, flat, 0x7FFFFFFFFFFFFFFF), axis=1), axis=0)
    if first != 0x7FFFFFFFFFFFFFFF:
        tl.atomic_min(report + slot, first)
