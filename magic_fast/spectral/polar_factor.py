"""The polar factor of a matrix by matrix products, with a certificate and an exact fallback.

With A = X Xᵀ, rational steps x(a + b·x²)/(1 + c·x²) of the singular values, each the best one for
the interval that they lie in, by T, the inverse Cholesky factor of I + c·A:
Y = (b/c)·X + (a − b/c)·Tᵀ(T X). Two of them take a condition of 1e5 to 1.4, the first with T in
float64: its gain on a direction of relative size 1e-5 is 1e4, and float32 would lose that
direction in A. A polynomial of degree 13 does the rest.

* condition up to 50, as A shows in float32: without the first step;
* up to 1e6: with it, applied in float32 but for the weakest directions where those are few;
* A without a Cholesky factor, or beyond: eigenvectors of A where a gap separates the zeros from
  the rest (low rank: the partial isometry), else the singular value decomposition in float64.
"""

from __future__ import annotations

import itertools
import logging
import math

import torch
from torch import Tensor

from magic_fast.reference.spectral import ExactFactorizations, rank_cutoff
from magic_fast.spectral.precision import full_float32
from magic_fast.spectral.products import (
    gram,
    inverse_factor,
    isometry_defect,
    largest_eigenvalue,
    lower_times,
    lower_transposed_times,
    multiply,
    norm_by_probes,
    normalized,
    start_block,
    symmetric_product,
)
from magic_fast.spectral.schedule import Finish, Rational, finish, quintics, rational

log = logging.getLogger("magic_fast")

_SINGLE_FROM = 0.02  # σ_min from which float32 resolves A
_WIDE = 1.5  # columns per row from which that is likely enough to look for
_USUAL = 3e-6  # σ_min that the first step is made for: 8e-3 is left of 7e-7, 0.036 of 3e-6 or more
_FEW = 16  # σ below that of the first step, up to which 32 vectors find them all
_QUINTIC_FROM = 0.6  # a quintic step from here leaves 1e-2, which a cubic one ends
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


def polar(x: Tensor, *, dtype: torch.dtype | None = None, label: str = "a matrix") -> Tensor:
    """U Vᵀ of ``x`` = U Σ Vᵀ over the non-zero singular values: the nearest partial isometry.

    Args:
        x: float32 or float64 [m, n], finite; any device.
        dtype: of the result, None: of ``x``. A float64 ``x`` for a float32 result costs little
            more than a float32 one, and at condition 1e6 its last bits decide.
        label: what to call it in the log, where the exact decomposition has to step in.

    Returns:
        Shape of ``x``. Held to :func:`tolerance` of its dtype; where that fails, computed from the
        singular value decomposition in float64, with one line in the log. Singular values up to
        2⁻²³ (float64: 1e-14) of the largest count as zero.

    >>> polar(torch.tensor([[3.0, 0.0], [0.0, -2.0]])).round(decimals=5) + 0.0
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    dtype = dtype or x.dtype
    if x.shape[0] > x.shape[1]:
        return polar(x.T, dtype=dtype, label=label).T
    with full_float32():
        return _wide_polar(x, dtype, label)


def _wide_polar(x: Tensor, dtype: torch.dtype, label: str) -> Tensor:
    scaled, unit = normalized(x)
    if unit == 0:
        return torch.zeros_like(x, dtype=dtype)
    found = _full_rank(scaled, dtype)
    if found is None and dtype == torch.float32:  # float64's zero is below what A resolves
        found = _low_rank(scaled, dtype)
    if found is not None:
        return found
    log.info("polar factor of %s by singular value decomposition: its condition is above %g, or "
             "matrix products miss the certificate", label, _MAX_CONDITION)  # fmt: skip
    exact = ExactFactorizations(rank_cutoff(dtype))
    return exact.polar(scaled.double()).to(dtype)


def _full_rank(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The polar factor, in ``dtype``, of a wide matrix of condition up to 1e6, else None."""
    if dtype == torch.float32 and x.shape[1] >= _WIDE * x.shape[0]:
        single = x.to(dtype)
        a, unit = _scaled_gram(single)
        low = _LOW * _smallest(a)
        if low >= _SINGLE_FROM:
            return _converge(*_rational_step(single / unit, a, low))
        del a, single
    if (begun := _first_step(x, dtype)) is None:
        return None
    y, low = begun
    if low < _QUINTIC_FROM:
        y, low = _rational_step(y, gram(y), low)
    return _converge(y, low)


def _scaled_gram(x: Tensor) -> tuple[Tensor, float]:
    """(A / unit², unit) with singular values of x / unit up to about 1/1.05."""
    a = gram(x)
    top = largest_eigenvalue(a) * _HEADROOM**2
    a /= top
    return a, math.sqrt(top)


def _smallest(a: Tensor) -> float:
    """Estimate from above of the smallest singular value that belongs to the Gram matrix ``a``; 0
    where it has no Cholesky factor."""
    t = inverse_factor(a)
    return 0.0 if t is None else 1 / math.sqrt(largest_eigenvalue(t.T, t))


def _shifted_factor(a: Tensor, c: float) -> Tensor:
    """T of I + c·A."""
    b = a * c
    b.diagonal().add_(1)
    t = inverse_factor(b)
    assert t is not None  # c is far below 1/rounding
    return t


def _first_step(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, float] | None:
    """(y, low) with the polar factor of x and singular values in [low, 1], in ``dtype``; None where
    those of x reach below 1/2e6 of the largest.

    In float32 the step is made for one and the same σ: its gain hardly depends on that, and where
    few singular values are that small, T itself leads to them, and A needs no factor of its own.
    """
    y = x.double()
    a, unit = _scaled_gram(y)
    y = y / unit if y is x else y.div_(unit)
    weak = None
    if dtype == torch.float32:
        step = rational(_USUAL)
        t = _shifted_factor(a, step.c)
        if float(torch.linalg.vector_norm(t)) ** 2 <= _FEW:  # tr (I + c·A)⁻¹ counts σ < 1/√c
            weak = _weak_directions(t)
            low = _LOW * float(torch.linalg.svdvals(weak.T @ y)[-1])
        else:
            low = _LOW * _smallest(a)
    else:
        low = _LOW * _smallest(a)
        step = rational(min(max(low, 1 / _MAX_CONDITION), 1.0))
        t = _shifted_factor(a, step.c)
    if not low * _MAX_CONDITION > _LOW / _HEADROOM:
        return None
    del a
    if weak is None:
        return _apply(y, t, step).to(dtype), min(step.low, step(low))
    # float32, but for its weak rows, where rounding would cost 1e-7/σ
    after = _apply(y.to(dtype), t.to(dtype), step)
    share = step.b / step.c
    # rows times t, since MKL takes ten times as long for t.T times columns in float64
    rows = (share * weak.T + (step.a - share) * ((t @ weak).T @ t)) @ y
    off = (rows - weak.T @ after.double()).to(dtype)
    return after.addmm_(weak.to(dtype), off), min(step.low, step(low))


def _weak_directions(t: Tensor, steps: int = 4) -> Tensor:
    """Orthonormal columns, float64, that hold the left singular vectors of the smallest σ, where
    I + c·A = (TᵀT)⁻¹ holds back all others."""
    single = t.float()
    q = start_block(t.shape[0], min(2 * _FEW, t.shape[0]), single)
    for _ in range(steps):
        q = torch.linalg.qr(single.T @ (single @ q))[0]
    found: Tensor = torch.linalg.qr(q.double())[0]
    return found


def _rational_step(x: Tensor, a: Tensor, low: float) -> tuple[Tensor, float]:
    """(y, low of y) by the best step for singular values in [low, 1]; ``a`` = x xᵀ."""
    step = rational(min(low, 1.0))
    t = _shifted_factor(a, step.c)
    assert t is not None  # I + c·A is positive definite, with c·‖A‖ far below 1/rounding
    return _apply(x, t, step), step.low


def _apply(x: Tensor, t: Tensor, step: Rational) -> Tensor:
    """(b/c)·x + (a − b/c)·(I + c·A)⁻¹x, which is x(a + b·x²)/(1 + c·x²)."""
    share = step.b / step.c
    y = lower_transposed_times(t, lower_times(t, x))
    return y.mul_(step.a - share).add_(x, alpha=share)


def _converge(y: Tensor, low: float) -> Tensor | None:
    """‖Y Yᵀ − I‖_F ≤ tolerance·√m, which implies the certificate, from a wide matrix of full rank
    with singular values in [low, 1]; None where the steps do not get there.

    One step of degree 13 where that is enough, else quintic ones. With F = Y Yᵀ − I a cubic step
    (I − F/2)Y leaves −¾F² + ¼F³: where that is below the bound it is the last, for one product.
    Random vectors tell ‖F²‖, and look at the result.
    """
    bound = tolerance(y.dtype) * math.sqrt(y.shape[0])
    if 0.5 < low < 0.97 and 2 * (last := finish(low)).error * math.sqrt(y.shape[0]) <= bound / 2:
        y, low = _finished(y, last), 1 - last.error
        if isometry_defect(y) <= bound:
            return y
    for step in itertools.islice(quintics(min(low, 1.0)), _MAX_STEPS):
        f = gram(y)
        f.diagonal().sub_(1)
        error = float(torch.linalg.vector_norm(f))
        if error <= bound:
            return y
        if not math.isfinite(error):
            break
        if 0.75 * norm_by_probes(f, f) <= bound:
            y = multiply(f, y).mul_(-0.5).add_(y)
            expected = 0.0
        else:
            f.diagonal().add_(1)
            a, b, c = step.coefficients
            h = symmetric_product(f, f).mul_(c).add_(f, alpha=b)
            y = multiply(h, y).add_(y, alpha=a)
            expected = 2 * step.error * math.sqrt(y.shape[0])
        if expected <= bound and isometry_defect(y) <= bound:
            return y
    return None


def _finished(y: Tensor, last: Finish) -> Tensor:
    """q(S)·y, S = (y yᵀ − middle·I)/half, by four symmetric products and a full one."""
    s = gram(y)
    s.diagonal().sub_(last.middle)
    s /= last.half
    s2 = symmetric_product(s, s)
    s3 = symmetric_product(s2, s)
    c = last.coefficients
    # q = (c₀ + c₁S + c₂S²) + S³(c₃ + c₄S + c₅S² + c₆S³)
    upper = (s3 * c[6]).add_(s2, alpha=c[5]).add_(s, alpha=c[4])
    upper.diagonal().add_(c[3])
    q = symmetric_product(s3, upper).add_(s, alpha=c[1]).add_(s2, alpha=c[2])
    q.diagonal().add_(c[0])
    return multiply(q, y)


def _low_rank(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The partial isometry, in ``dtype``, of a wide matrix from the eigenvectors of its Gram
    matrix in float64, where a gap separates the zero singular values from the others; else None."""
    y = x.double()
    values, vectors = torch.linalg.eigh(gram(y))
    relative = (values / values[-1]).clamp_min(0).sqrt()
    kept = relative > 1 / _MAX_CONDITION
    if bool(((relative > rank_cutoff(dtype)) & ~kept).any()):
        return None
    u = vectors[:, kept]
    rows = u.T @ y
    rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    # the rows are orthogonal to about 1e-16·condition²: one third-order step makes them so exactly
    found = _converge(rows, 0.99) if len(rows) else rows
    if found is None:
        return None
    result = (u @ found).to(dtype)
    return result if residual(result) <= tolerance(dtype) else None
