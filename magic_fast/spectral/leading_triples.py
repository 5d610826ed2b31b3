"""The leading singular triples of a matrix: filtered subspace iteration where few are wanted, the
eigenvectors of the Gram matrix where many are, each with a measured error bound, else exact."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from magic_fast.reference.spectral import ExactFactorizations, rank_cutoff
from magic_fast.spectral.precision import full_float32
from magic_fast.spectral.products import gram, multiply, normalized, start_block

log = logging.getLogger("magic_fast")

Triples = tuple[Tensor, Tensor, Tensor]

MAX_ERROR = 1e-3  # of the norm of the truncated matrix
_TARGET = MAX_ERROR / 3  # where the iteration stops: the bound is itself an estimate
_MAX_SHARE = 0.25  # of the smaller side that a block may take; beyond it eigenvectors are cheaper
_MAX_SHARE_GPU = 0.1  # H100, side 4096, a block of 640: 265 ms, all eigenvectors in float64 126 ms
_DENSE_FROM = (
    0.1  # share from which, on a CPU, eigenvectors in float32 are the cheaper start: 3.1 s
)
#   for a side of 4096 on two cores, where a round of filters on 640 columns takes 1.3 s
_ROUNDS = 8
_DEGREE = 16
_GROWTH = 1e5  # of the largest eigenvalue by one filter: float32 keeps the small ones beside it
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
    block = count + max(16, count // 4)
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
    the bound is not met in a few rounds."""
    a = gram(x)
    dense = x.device.type == "cpu" and block > _DENSE_FROM * x.shape[0]
    if dense:
        q = torch.linalg.eigh(a)[1][:, -block:].contiguous()
    else:
        q = start_block(x.shape[0], block, x)
        q = torch.linalg.qr(multiply(a, multiply(a, q)))[0]
    previous = math.inf
    for _ in range(_ROUNDS):
        u, s, v, back = _rayleigh_ritz(x, q)
        bound = _bound_of(u, s, back, count)
        if bound <= _TARGET:
            return _trimmed(u, s, v, count)
        if dense or not bound < 0.9 * previous:  # rounding of float32, then: in the same directions
            found = _rayleigh_ritz(x.double(), torch.linalg.qr(q.double())[0])
            if _bound_of(*found[:2], found[3], count) <= _TARGET:
                u, s, v = (t.to(x.dtype) for t in found[:3])
                return _trimmed(u, s, v, count)
            if not bound < 0.9 * previous:
                return None
        previous, dense = bound, False
        q = torch.linalg.qr(_filtered(a, back, float(s[0]) ** 2, float(s[-1]) ** 2))[0]
    return None


def _bound_of(u: Tensor, s: Tensor, back: Tensor, count: int) -> float:
    residuals = torch.linalg.vector_norm(back - u * s.to(u.dtype), dim=0).double()
    return error_bound(s, residuals, count, float(s[count]))


def _rayleigh_ritz(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(U, σ float64, V, X V) of the best triples whose left vectors lie in the columns of q."""
    rows = multiply(q.T, x)
    values, w = torch.linalg.eigh(gram(rows.double()))
    values, w = values.flip(0), w.flip(1)
    s = values.clamp_min(0).sqrt()
    w = w.to(x.dtype)
    v = multiply(rows.T, w) / s.clamp_min(1e-30 + 1e-7 * float(s[0])).to(x.dtype)
    return multiply(q, w), s, v, multiply(x, v)


def _filtered(a: Tensor, q: Tensor, top: float, edge: float) -> Tensor:
    """A Chebyshev polynomial of ``a`` times ``q``: at most 1 on eigenvalues in [0, edge], growing
    fast above, of a degree that keeps the growth at ``top`` within float32."""
    half = max(edge, 1e-12 * top) / 2
    reach = math.acosh(max(top / half - 1, 1 + 1e-9))
    degree = max(2, min(_DEGREE, int(math.log(_GROWTH) / reach)))
    before, now = q, multiply(a, q).div_(half).sub_(q)
    for _ in range(degree - 1):
        # T_{j+1}(y) = 2y·T_j(y) − T_{j−1}(y), y = a/half − 1
        after = multiply(a, now).mul_(2 / half).sub_(before).sub_(now, alpha=2)
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
