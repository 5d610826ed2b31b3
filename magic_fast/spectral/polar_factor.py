"""The polar factor of a matrix by matrix products, with a certificate and an exact fallback.

With A = X Xᵀ in float64 a Cholesky factor tells the smallest singular value, so the steps are
fitted to the matrix in hand:

* condition up to 50: quintic steps at once (three products each, two of them symmetric);
* up to 1e6: one rational step before them, (I + c·A)⁻¹ in float64: its gain on a direction of
  relative size 1e-6 is 1.6e4, for the price of about two quintic steps, and float64 keeps what
  float32 steps would lose there;
* no Cholesky factor, or beyond: eigenvectors of A where a gap separates the zeros from the rest
  (low rank: the partial isometry), else the singular value decomposition in float64.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from magic_fast.reference.spectral import ExactFactorizations, rank_cutoff
from magic_fast.spectral.products import (
    gram,
    largest_eigenvalue,
    normalized,
    smallest_eigenvalue,
    symmetric_product,
)
from magic_fast.spectral.schedule import quintics, rational

log = logging.getLogger("magic_fast")

_QUINTIC_FROM = 0.02  # float32 steps amplify their own rounding by at most 50
_MAX_CONDITION = 2e6  # 1e6 is promised; the estimates of σ are good to tens of per cent
_HEADROOM = 1.05  # over an estimate of σ_max from below
_LOW = 0.7  # of an estimate of σ_min from above
_MAX_STEPS = 12


def tolerance(dtype: torch.dtype) -> float:
    """Bound of the certificate ‖X Xᵀ X − X‖_F ≤ tolerance·‖X‖_F."""
    return 2e-5 if dtype == torch.float32 else 1e-12


def residual(x: Tensor) -> float:
    """‖X Xᵀ X − X‖_F / ‖X‖_F, 0 for X = 0: zero exactly where X is a partial isometry."""
    norm = float(torch.linalg.vector_norm(x))
    if norm == 0:
        return 0.0
    wide = x if x.shape[0] <= x.shape[1] else x.T
    return float(torch.linalg.vector_norm(gram(wide) @ wide - wide)) / norm


def polar(x: Tensor, *, label: str = "a matrix") -> Tensor:
    """U Vᵀ of ``x`` = U Σ Vᵀ over the non-zero singular values: the nearest partial isometry.

    Args:
        x: float32 or float64 [m, n], finite; any device.
        label: what to call it in the log, where the exact decomposition has to step in.

    Returns:
        Shape and dtype of ``x``. Held to :func:`tolerance`; where that fails, computed from the
        singular value decomposition in float64, with one line in the log. Singular values up to
        2⁻²³ (float64: 1e-14) of the largest count as zero.

    >>> polar(torch.tensor([[3.0, 0.0], [0.0, -2.0]]))
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    if x.shape[0] > x.shape[1]:
        return polar(x.T, label=label).T
    scaled, unit = normalized(x)
    if unit == 0:
        return torch.zeros_like(x)
    found, why = _full_rank(scaled)
    if found is None:
        found, why = _low_rank(scaled, why)
    if found is not None:
        return found
    log.info("polar factor of %s by singular value decomposition: %s", label, why)
    exact = ExactFactorizations(rank_cutoff(x.dtype))
    return exact.polar(scaled.double()).to(x.dtype)


def _full_rank(x: Tensor) -> tuple[Tensor | None, str]:
    """The polar factor of a wide matrix of condition up to 1e6, or (None, why not)."""
    a = gram(x.double())
    top = largest_eigenvalue(a) * _HEADROOM**2
    a /= top
    factor, failed = torch.linalg.cholesky_ex(a)
    if int(failed):
        return None, "its rows are dependent"
    low = math.sqrt(smallest_eigenvalue(factor)) * _LOW
    if not low * _MAX_CONDITION > _LOW / _HEADROOM:
        return None, f"its condition is above {_MAX_CONDITION:g}"
    del factor
    y = x / math.sqrt(top)
    if low < _QUINTIC_FROM:
        p, q, c, low = rational(low)
        y = x.double() / math.sqrt(top)
        a.mul_(c).diagonal().add_(1)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(a))
        # x(p + q·x²)/(1 + c·x²) = (q/c)·x + (p − q/c)·x/(1 + c·x²)
        y = torch.addmm(y, inverse, y, beta=q / c, alpha=p - q / c)
    return _converge(y.to(x.dtype), min(low, 1.0))


def _converge(y: Tensor, low: float) -> tuple[Tensor | None, str]:
    """Quintic steps on a wide matrix of full rank with singular values in [low, 1], until
    ‖Y Yᵀ − I‖_F ≤ tolerance·√m, which implies the certificate.

    With F = Y Yᵀ − I a last cubic step (I − F/2)Y leaves −¾F² + ¼F³: where that is below half
    the bound it costs one product, and needs no look at its result.
    """
    bound = tolerance(y.dtype) * math.sqrt(y.shape[0])
    steps = quintics(low)
    error = math.inf
    for _ in range(_MAX_STEPS):
        g = gram(y)
        g.diagonal().sub_(1)
        error = float(torch.linalg.vector_norm(g))
        if error <= bound:
            return y, ""
        if 0.75 * error**2 + 0.25 * error**3 <= bound / 2:
            return torch.addmm(y, g, y, alpha=-0.5), ""
        if not math.isfinite(error):
            break
        g.diagonal().add_(1)
        a, b, c = next(steps)
        h = symmetric_product(g, g).mul_(c).add_(g, alpha=b)
        y = torch.addmm(y, h, y, beta=a)
    return None, f"matrix products left ‖XXᵀ − I‖ = {error:.1e}"


def _low_rank(x: Tensor, why: str) -> tuple[Tensor | None, str]:
    """The partial isometry of a wide matrix from the eigenvectors of its Gram matrix in float64,
    where a gap separates the zero singular values from the others; else (None, why)."""
    if x.dtype == torch.float64:  # its cutoff is far below what a Gram matrix resolves
        return None, why
    y = x.double()
    values, vectors = torch.linalg.eigh(gram(y))
    relative = (values / values[-1]).clamp_min(0).sqrt()
    kept = relative > 1 / _MAX_CONDITION
    if bool(((relative > rank_cutoff(x.dtype)) & ~kept).any()):
        return None, why
    u = vectors[:, kept]
    rows = u.T @ y
    rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    # the rows are orthogonal to about 1e-16·condition²: one third-order step makes them so exactly
    found, fault = _converge(rows, 0.99) if len(rows) else (rows, "")
    if found is None:
        return None, fault
    result = (u @ found).to(x.dtype)
    if not residual(result) <= tolerance(x.dtype):
        return None, "the eigenvectors of its Gram matrix fail the certificate"
    return result, ""
