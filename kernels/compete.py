"""The balance of competing parameters (PCB): an entry of an expert counts by how large it is among
the expert's own, and by how far it points where all together do.

exp and tanh are the polynomials of csrc/common/scores.h, operation by operation, so that scores
and their bounds have the same bits on every backend of ours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .load import magnitude_bits
from .words import HIGH, LOW, SCORE_CUT, SCORE_TOP


@triton.jit
def _exp(x):
    """e^x for x ≤ 0, relative error below 2e-7; below −86 it is that of −86."""
    x = tl.where(x < -86.0, -86.0, x)
    shift = 12582912.0  # 1.5 · 2^23: what is added to it is rounded to a number
    shifted = x * 1.44269504 + shift
    n = shifted - shift
    r = (x - n * 0.693359375) - n * -2.12194440e-4  # ln 2 in two parts
    q = r * 1.392692677e-3 + 8.363774046e-3
    q = q * r + 4.166654870e-2
    q = q * r + 1.666657329e-1
    q = q * r + 0.5
    y = q * r * r + r + 1.0
    power = shifted.to(tl.int32, bitcast=True) - 0x4B400000  # the bits of the shift
    return (y.to(tl.int32, bitcast=True) + (power << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _tanh(x):
    """tanh x, relative error below 3e-7 from the smallest x on."""
    z = x * x
    q = z * 2.292744815e-3 + -8.343945257e-3
    q = q * z + 2.176891826e-2
    q = q * z + -5.395925790e-2
    q = q * z + 1.333330423e-1
    q = q * z + -3.333333433e-1
    e = _exp(-2.0 * tl.abs(x))
    far = tl.div_rn(1.0 - e, 1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * z * q, _with_sign_of(far, x))


@triton.jit
def _with_sign_of(size, x):
    """|size| with the sign of ``x``."""
    sign = x.to(tl.int32, bitcast=True) ^ magnitude_bits(x)
    return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def total_of(taus, K: tl.constexpr):
    total = tl.zeros(taus[0].shape, tl.float32)
    for k in tl.static_range(K):
        total = total + taus[k]
    return total


@triton.jit
def _bound(integers, row, k, K: tl.constexpr):
    return tl.load(integers + row * K + k).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _held(tau, low, high):
    """|τ| within the bounds; a NaN stays one."""
    a = tl.abs(tau)
    a = tl.where(a < low, low, a)
    return tl.where(a > high, high, a)


@triton.jit
def score(tau, total, integers, k, K: tl.constexpr):
    """exp(K·(minmax(held)² − 1))·tanh(τ·Σ): the paper's score over e^K, which cancels later."""
    low = _bound(integers, LOW, k, K)
    high = _bound(integers, HIGH, k, K)
    span = tl.zeros(tau.shape, tl.float32) + (high - low)
    share = tl.div_rn(_held(tau, low, high) - low, tl.where(span > 0, span, 1.0))
    share = tl.where(span > 0, share, 0.0)
    return _exp((share * share - 1.0) * K) * _tanh(tau * total)


@triton.jit
def competed(taus, integers, numbers, K: tl.constexpr):
    """Σ s_k·sign(τ_k)·held_k ÷ max(Σ s_k, 1e-12), s_k the score's place between cut and top."""
    total = total_of(taus, K)
    sum_ = tl.zeros(total.shape, tl.float32)
    shares = sum_
    for k in tl.static_range(K):
        cut = tl.load(numbers + SCORE_CUT * K + k)
        top = tl.load(numbers + SCORE_TOP * K + k)
        found = score(taus[k], total, integers, k, K)
        found = tl.where(found < cut, cut, found)
        found = tl.where(found > top, top, found)
        span = tl.zeros(total.shape, tl.float32) + (top - cut)
        share = tl.div_rn(found - cut, tl.where(span > 0, span, 1.0))
        share = tl.where(span > 0, share, 0.0)
        low = _bound(integers, LOW, k, K)
        held = _with_sign_of(_held(taus[k], low, _bound(integers, HIGH, k, K)), taus[k])
        sum_ = sum_ + share * tl.where(taus[k] == 0, 0.0, held)
        shares = shares + share
    found = tl.div_rn(sum_, tl.where(shares < 1e-12, 1e-12, shares))
    return tl.where(total == total, found, total)  # a NaN passes
