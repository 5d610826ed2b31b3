"""The leading singular triples of a matrix: filtered subspace iteration where few are wanted, the
eigenvectors of the Gram matrix where many are, each with a measured error bound, else exact."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from magic_fast.reference.spectral import ExactFactorizations, rank_cutoff
from magic_fast.spectral.precision import full_float32
from magic_fast.spectral.products import gram, multiply, normalized, start_block

log = logging.getLogger("magic_fast")

Triples = tuple[Tensor, Tensor, Tensor]

MAX_ERROR = 1e-3  # of the norm of the truncated matrix
_TARGET = MAX_ERROR / 3  # where the iteration stops: the bound is itself an estimate
_MAX_SHARE = 0.4  # of the smaller side that a block may take; two cores, side 4096, a block of
#   1536: 5.5 s, all eigenvectors in float64 6.3 s
_MAX_SHARE_GPU = 0.1  # H100, side 4096, a block of 640: 265 ms, all eigenvectors in float64 126 ms
_ROUNDS = 8
_DEGREE = 16  # of one filter
_MOST = 48  # degrees of a round's filters together; where it takes more, eigenvectors are cheaper
_MOST_DOUBLE = 12  # the same in float64, at eight times the time
_GROWTH = 1e5  # of λ_max over the smallest wanted λ by one filter: float32 keeps that one beside it
_FIRST = 1e3  # what the first round is to gain: the edge that it knows is too low
_FLOOR = 2e-7  # of σ, the residual to aim at: about what float32 leaves
_CLOSE = 16.0  # λ_max over the smallest wanted λ up to which rounding in x xᵀ does not show
_MIN_SIDE = 64  # below it a decomposition is instant
_TRUSTED = 1e-4  # σ/σ_max down to which eigenvectors of a float64 Gram matrix are good to 1e-8


def leading(x: Tensor, count: int, *, label: str = "a matrix") -> Triples:
    """(U [m, count], σ [count] descending, V [n, count]) of the largest singular values.

    Args:
        x: float32 or float64 [m, n], finite; any device.
        count: 0 … min(m, n).
        label: what to call it in the log, where the exact decomposition has to step in.

    Returns:
        dtype of ``x``. U·diag(σ)·Vᵀ is within 1e-3 of the exact truncation by a bound measured
        from residuals and gaps; where that fails, by the singular value decomposition in float64,
        with one line in the log. Columns of U and V are zero where σ is
        (:func:`~magic_fast.reference.spectral.rank_cutoff`).

    >>> u, s, v = leading(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
    >>> s
    tensor([3., 2.])
    """
    if x.shape[0] > x.shape[1]:
        v, s, u = leading(x.T, count, label=label)
        return u, s, v
    with full_float32():
        return _wide_leading(x, count, label)


def _wide_leading(x: Tensor, count: int, label: str) -> Triples:
    scaled, unit = normalized(x)
    if count == 0 or unit == 0 or x.shape[0] <= _MIN_SIDE:
        return _exact(x, count)
    found = None
    block = count + max(16, count // 2)
    if block <= (_MAX_SHARE_GPU if x.is_cuda else _MAX_SHARE) * x.shape[0]:
        found = _subspace(scaled, count, block)
    if found is None:
        found = _eigenvectors(scaled, count)
    if found is None:
        log.info("singular triples of %s by singular value decomposition: %s", label,
                 f"no faster way is within {MAX_ERROR:g}")  # fmt: skip
        return _exact(x, count)
    u, s, v = found
    return u, (s.double() * unit).to(x.dtype), v


def _exact(x: Tensor, count: int) -> Triples:
    u, s, v = ExactFactorizations(rank_cutoff(x.dtype)).leading(x.double(), count)
    return u.to(x.dtype), s.to(x.dtype), v.to(x.dtype)


def error_bound(sigma: Tensor, residuals: Tensor, count: int, next_sigma: float) -> float:
    """Bound of ‖truncation − exact‖_F / ‖exact‖_F by sin θ ≤ residual / gap (Wedin): direction i
    is off by at most its residual over its distance from the largest σ left out.

    Args:
        sigma, residuals: float64 [≥ count], descending σ and ‖X v − σ u‖ or its transpose's.
        next_sigma: the largest singular value that is left out, as far as known.
    """
    s, r = sigma[:count], residuals[:count]
    gap = (s - next_sigma).clamp_min(1e-300)
    off = (r / gap).square().clamp_max(2.0)
    norm = float(s.square().sum())
    return math.sqrt(float((off * s.square()).sum()) / norm) if norm > 0 else 0.0


def _subspace(x: Tensor, count: int, block: int) -> Triples | None:
    """Randomised subspace iteration on x xᵀ with Chebyshev filters, for a wide matrix; None where
    the bound is not met in a few rounds, or would take too many products.

    A round has as many filters as its residual asks for. They multiply by the Gram matrix, whose
    rounding is relative to λ_max, the last one by x and xᵀ, where it is relative to σ_max. Where
    the bound stalls all the same, the iteration goes on in float64.
    """
    dtype, a, previous = x.dtype, gram(x), math.inf
    q = _orthonormal(multiply(a, multiply(a, start_block(x.shape[0], block, x))))
    for number in range(_ROUNDS):
        u, s, v, q = _rayleigh_ritz(x, q)
        residuals = torch.linalg.vector_norm(q - u * s.to(u.dtype), dim=0).double()
        bound = error_bound(s, residuals, count, float(s[count]))
        if bound <= _TARGET:
            return _trimmed(u.to(dtype), s, v.to(dtype), count)
        stalled = not bound < 0.9 * previous
        if stalled and x.dtype == torch.float64:
            return None
        if stalled:
            x, q = x.double(), q.double()
        previous = bound
        gain = float(residuals[:count].max() / s[count - 1].clamp_min(1e-300)) / _FLOOR
        gain = max(gain, 10.0) if number else min(gain, _FIRST)
        plan = _filters(s.square(), count, gain, _MOST_DOUBLE if stalled else _MOST)
        if plan is None:
            return None
        for left in reversed(range(plan.times)):
            fine = number > 0 and left == 0 and float(s[0] / s[count - 1]) ** 2 > _CLOSE
            by = _by_both(x) if fine or x.dtype != a.dtype else partial(multiply, a)
            q = _orthonormal(_filtered(by, q, plan))
    return None


def _orthonormal(q: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(q)[0]
    return basis


@dataclass(frozen=True)
class _Filters:
    """``times`` Chebyshev polynomials of ``degree``, at most 1 on eigenvalues in [0, 2·half]."""

    half: float
    degree: int
    times: int


def _filters(values: Tensor, count: int, gain: float, most: int) -> _Filters | None:
    """Those that let the first ``count`` of ``values``, descending, grow by ``gain`` over the
    last, between which float32 still keeps them apart from the first; None where that takes more
    than ``most`` degrees together."""
    top, wanted, edge = (float(values[i]) for i in (0, count - 1, -1))
    half = max(edge, 1e-12 * top, 1e-300) / 2
    # a polynomial of degree d grows by cosh(d·rate)
    highest, rate = (math.acosh(max(x / half - 1, 1 + 1e-9)) for x in (top, wanted))
    total = math.log(gain) / rate
    if total > most:
        return None
    degree = min(_DEGREE, max(2, int(math.log(_GROWTH) / max(highest - rate, 1e-9))))
    times = max(1, math.ceil(total / degree))
    return _Filters(half, max(2, math.ceil(total / times)), times)


def _rayleigh_ritz(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(U, σ float64, V, X V) of the best triples whose left vectors lie in the columns of q."""
    rows = multiply(q.T, x)
    values, w = torch.linalg.eigh(gram(rows.double()))
    values, w = values.flip(0), w.flip(1)
    s = values.clamp_min(0).sqrt()
    w = w.to(x.dtype)
    v = multiply(rows.T, w) / s.clamp_min(1e-30 + 1e-7 * float(s[0])).to(x.dtype)
    return multiply(q, w), s, v, multiply(x, v)


def _by_both(x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda q: multiply(x, multiply(q.T, x).T)  # multiply(x.T, q) would copy x


def _filtered(by: Callable[[Tensor], Tensor], q: Tensor, plan: _Filters) -> Tensor:
    """A Chebyshev polynomial times ``q`` of the matrix that ``by`` multiplies by."""
    before, now = q, by(q).div_(plan.half).sub_(q)
    for _ in range(plan.degree - 1):
        # T_{j+1}(y) = 2y·T_j(y) − T_{j−1}(y), y = A/half − 1
        after = by(now).mul_(2 / plan.half).sub_(before).sub_(now, alpha=2)
        before, now = now, after
    return now


def _eigenvectors(x: Tensor, count: int) -> Triples | None:
    """From the eigenvectors of x xᵀ in float64, for a wide matrix; None where the wanted σ reach
    below what a Gram matrix resolves."""
    y = x.double()
    values, vectors = torch.linalg.eigh(gram(y))
    s = values.flip(0).clamp_min(0).sqrt()
    u = vectors.flip(1)[:, :count]
    rows = u.T @ y  # σ vᵀ
    s_kept = torch.linalg.vector_norm(rows, dim=1)
    v = (rows / s_kept.clamp_min(1e-300)[:, None]).T
    residuals = torch.linalg.vector_norm(y @ v - u * s_kept, dim=0)
    left_out = float(s[count]) if count < len(s) else 0.0
    if float(s_kept[-1]) < _TRUSTED * float(s[0]):
        return None
    if error_bound(s_kept, residuals, count, left_out) > MAX_ERROR:
        return None
    return _trimmed(u.to(x.dtype), s_kept, v.to(x.dtype), count)


def _trimmed(u: Tensor, s: Tensor, v: Tensor, count: int) -> Triples:
    """The first ``count`` triples, zero where σ is below what the products resolve."""
    keep = s[:count] > (1e-6 if u.dtype == torch.float32 else 1e-8) * s[0]
    s = (s[:count] * keep).to(u.dtype)
    return u[:, :count] * keep, s, v[:, :count] * keep
