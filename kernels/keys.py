"""What a search compares, as int32 that orders as it does: |τ| of an expert, the variance over all
of them, or the score of an expert's entry.

A score P lies within [−1, 1], so the bits of |P| leave room for its sign: 2^30 + bits upwards from
0, 2^30 − 1 − bits downwards from −0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .compete import score, total_of
from .load import load_tau, load_taus, magnitude_bits
from .words import BY_MAGNITUDE, BY_VARIANCE


@triton.jit
def variance(taus, K: tl.constexpr):
    """Biased variance of each entry over the experts, summed in their order."""
    experts = tl.full(taus[0].shape, K, tl.float32)
    mean = taus[0]
    for k in tl.static_range(1, K):
        mean = mean + taus[k]
    mean = tl.div_rn(mean, experts)
    spread = tl.zeros(mean.shape, tl.float32)
    for k in tl.static_range(K):
        apart = taus[k] - mean
        spread = spread + apart * apart
    return tl.div_rn(spread, experts)


@triton.jit
def _of_score(p):
    bits = magnitude_bits(p)
    return tl.where(p.to(tl.int32, bitcast=True) >= 0, 0x40000000 + bits, 0x3FFFFFFF - bits)


@triton.jit
def keys_together(
    experts, at, inside, b, integers, K: tl.constexpr, HAS_BASE: tl.constexpr, KEY: tl.constexpr
):
    """What all experts of an entry say: its variance (one block), or K scores."""
    taus = load_taus(experts, at, inside, b, K, HAS_BASE)
    keys = ()
    if KEY == BY_VARIANCE:
        keys = keys + (magnitude_bits(variance(taus, K)),)
    else:
        total = total_of(taus, K)
        for k in tl.static_range(K):
            keys = keys + (_of_score(score(taus[k], total, integers, k, K)),)
    return keys


@triton.jit
def load_key(
    experts, at, inside, b, integers,
    OWNER: tl.constexpr, K: tl.constexpr, HAS_BASE: tl.constexpr, KEY: tl.constexpr,
):  # fmt: skip
    """The key of one expert (of all: OWNER 0)."""
    if KEY == BY_MAGNITUDE:
        key = magnitude_bits(load_tau(experts[OWNER], at, inside, b, HAS_BASE))
    else:
        key = keys_together(experts, at, inside, b, integers, K, HAS_BASE, KEY)[OWNER]
    return key
