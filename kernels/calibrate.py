"""From the sums of a row to ξ and to what multiplies the row, in float64, within the program.

The formulas are those of docs/methods.md (``manifold`` and ``sphere`` with p = 2). What needs more
than sums of scalars (``manifold_exact``: eigenvalues of K × K matrices) or another norm is finished
by torch on the device, between two kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .words import EPS_ABSOLUTE, EPS_NONE, EPS_RELATIVE, FREE, GROW, SHRINK, SPHERE

EPS = tl.constexpr(1e-8)


@triton.jit
def _pair(sums, i: tl.constexpr, j: tl.constexpr, M: tl.constexpr):
    """⟨i, j⟩ with i ≤ j."""
    return sums[i * M - i * (i - 1) // 2 + (j - i)]


@triton.jit
def _mean_norm(norms, COUNT: tl.constexpr):
    total = norms[0]
    for n in tl.static_range(1, COUNT):
        total = total + norms[n]
    return total / COUNT


@triton.jit
def _manifold(sums, norms, M: tl.constexpr, CHOSEN: tl.constexpr, EPS_MODE: tl.constexpr):
    """[ Σ a_k² + ‖d − Σ a_k τ_k‖² / n̄² ]^(−½) with the epsilons of the mode."""
    mean = _mean_norm(norms, len(CHOSEN))
    eps = mean * 0.0
    if EPS_MODE == EPS_ABSOLUTE:
        eps = eps + EPS
    elif EPS_MODE == EPS_RELATIVE:
        eps = EPS * mean * mean
    a = ()
    ellipsoid = mean * 0.0
    cross = mean * 0.0
    for n in tl.static_range(len(CHOSEN)):
        dot = _pair(sums, CHOSEN[n], M - 1, M)
        a_n = dot / (_pair(sums, CHOSEN[n], CHOSEN[n], M) + eps)
        term = a_n
        if EPS_MODE == EPS_ABSOLUTE:
            term = a_n * norms[n] / (norms[n] + EPS)
        elif EPS_MODE == EPS_NONE:
            term = a_n * norms[n] / norms[n]
        ellipsoid = ellipsoid + term * term
        cross = cross + a_n * dot
        a = a + (a_n,)
    within = mean * 0.0
    for n in tl.static_range(len(CHOSEN)):
        within = within + a[n] * a[n] * _pair(sums, CHOSEN[n], CHOSEN[n], M)
        for m in tl.static_range(n + 1, len(CHOSEN)):
            within = within + 2 * a[n] * a[m] * _pair(sums, CHOSEN[n], CHOSEN[m], M)
    rest = _pair(sums, M - 1, M - 1, M) - 2 * cross + within
    rest = tl.where(rest < 0, 0.0, rest)
    return 1 / tl.sqrt(ellipsoid + rest / (mean * mean + eps) + EPS)


@triton.jit
def row_coefficient(
    sums, M: tl.constexpr, CHOSEN: tl.constexpr, VARIANT: tl.constexpr, EPS_MODE: tl.constexpr
):
    """Raw ξ, float64. ``sums``: all pairs (MANIFOLD) or M squared norms (SPHERE); ``CHOSEN``: the
    experts that count."""
    norms = ()
    for n in tl.static_range(len(CHOSEN)):
        if VARIANT == SPHERE:
            norms = norms + (tl.sqrt(sums[CHOSEN[n]]),)
        else:
            norms = norms + (tl.sqrt(_pair(sums, CHOSEN[n], CHOSEN[n], M)),)
    if VARIANT == SPHERE:
        raw = _mean_norm(norms, len(CHOSEN)) / tl.sqrt(sums[M - 1])
    else:
        raw = _manifold(sums, norms, M, CHOSEN, EPS_MODE)
    return raw


@triton.jit
def acting_factor(
    raw, experts_norm2, norm2, policy, GUARDS: tl.constexpr, CLAMPS: tl.constexpr,
    POWER: tl.constexpr, DIRECTION: tl.constexpr,
):  # fmt: skip
    """(what multiplies the row, whether the guards left it alone): raw → repair → side → strength →
    clamp; 1 where ξ does not act.

    ``policy``: float64 [4] strength, scale, least, most. POWER: the strength is not 1.
    """
    finite = (raw - raw) == 0
    sized = (experts_norm2 > 0) & (norm2 > 0)
    xi = raw
    acts = finite | (finite == 0)
    repaired = acts == 0
    if GUARDS:
        repaired = (finite & sized) == 0
        acts = repaired == 0
        xi = tl.where(repaired, 1.0, raw)
    elif DIRECTION != FREE:
        xi = tl.where(raw == raw, raw, 1.0)
    if DIRECTION == GROW:
        acts = acts & (xi > 1)
    elif DIRECTION == SHRINK:
        acts = acts & (xi < 1)
    if POWER:
        xi = tl.exp2(tl.load(policy) * tl.log2(xi))
    if CLAMPS:
        least = tl.load(policy + 2)
        most = tl.load(policy + 3)
        xi = tl.where(xi < least, least, xi)
        xi = tl.where(xi > most, most, xi)
    factor = tl.where(acts, tl.load(policy + 1) * xi, 1.0)
    return factor, repaired


@triton.jit
def finish_row(
    totals, policy, coefficients, repairs, norms2, row,
    K: tl.constexpr, CHOSEN: tl.constexpr, VARIANT: tl.constexpr, EPS_MODE: tl.constexpr,
    GUARDS: tl.constexpr, CLAMPS: tl.constexpr, POWER: tl.constexpr, DIRECTION: tl.constexpr,
):  # fmt: skip
    """The factor of a row, float32; what the caller wants to know of it is stored (``merge_rows``
    lists it)."""
    raw = row_coefficient(totals, K + 1, CHOSEN, VARIANT, EPS_MODE)
    norm2 = totals[len(totals) - 1]
    experts_norm2 = norm2 * 0.0
    for k in tl.static_range(K):
        if VARIANT == SPHERE:
            own = totals[k]
        else:
            own = totals[k * (K + 1) - k * (k - 1) // 2]
        tl.store(norms2 + row * (K + 2) + k, own)
        for n in tl.static_range(len(CHOSEN)):
            if CHOSEN[n] == k:
                experts_norm2 = experts_norm2 + own
    wide, repaired = acting_factor(
        raw, experts_norm2, norm2, policy, GUARDS, CLAMPS, POWER, DIRECTION
    )
    factor = wide.to(tl.float32)
    applied = factor.to(tl.float64)
    tl.store(norms2 + row * (K + 2) + K, norm2)
    tl.store(norms2 + row * (K + 2) + K + 1, norm2 * applied * applied)
    tl.store(coefficients + row, raw.to(tl.float32))
    tl.store(repairs + row, repaired.to(tl.uint8))
    return factor
