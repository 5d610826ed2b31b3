"""Products, triangular factors and bounds that the decompositions share."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_PARTS = 8  # blocks of rows in a product of which half is known
_FINE = 256  # rows that a block of a large product has: 174 for 187 ms at a side of 4096
_SPLIT = 512  # rows below which one product is faster than blocks of one
_LARGE = 128**3  # multiplications from which one library or another makes a difference


def normalized(x: Tensor) -> tuple[Tensor, float]:
    """(x / unit, unit): the largest magnitude brought into [½, 1) by a power of two, which rounds
    nothing (at condition 1e6 one rounding costs 1e-3); unit 0 for x = 0."""
    peak = max(-float(x.min()), float(x.max())) if x.numel() else 0.0
    if peak == 0:
        return x, 0.0
    exponent = min(max(math.frexp(peak)[1], -1000), 1000)
    wide = x if abs(exponent) < 100 else x.double()
    return (wide * 2.0**-exponent).to(x.dtype).contiguous(), 2.0**exponent


@functools.cache
def _has_onednn() -> bool:
    """Whether this PyTorch has oneDNN's product of dense float32 matrices, and it works."""
    try:
        eye = torch.eye(2)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(eye, eye, None, "none", [], ""), eye)
    except (AttributeError, RuntimeError):
        return False


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b. In float32 on a CPU by oneDNN, where PyTorch has it: MKL, its default, leaves AVX-512
    unused on CPUs of AMD (4096³ on two cores of Zen 5: 0.31 s by oneDNN, 0.65 s by MKL)."""
    large = a.shape[0] * a.shape[1] * b.shape[1] >= _LARGE
    if large and a.dtype == torch.float32 and a.device.type == "cpu" and _has_onednn():
        # a second factor with gaps between its rows is left to a loop 5000 times as slow
        weight = b.T if b.T.is_contiguous() else b.contiguous().T
        found: Tensor = torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")
        return found
    return a @ b


def gram(x: Tensor) -> Tensor:
    """x xᵀ [m, m]: the blocks on and below the diagonal computed, the others mirrored."""
    return symmetric_product(x, x)


def _blocks(rows: int) -> list[slice]:
    step = min(-(-rows // _PARTS), max(_FINE, -(-rows // (2 * _PARTS))))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ [m, m] where that is symmetric, by little more than half of a full product."""
    m = a.shape[0]
    if m < _SPLIT:
        return multiply(a, b.T)
    out = a.new_empty(m, m)
    for part in _blocks(m):
        out[part, : part.stop] = multiply(a[part], b[: part.stop].T)
        out[: part.start, part] = out[part, : part.start].T
    return out


def lower_times(t: Tensor, x: Tensor) -> Tensor:
    """t x for a lower triangular ``t`` [m, m], by little more than half of the products."""
    if t.shape[0] < _SPLIT:
        return multiply(t, x)
    out = torch.empty_like(x)
    for part in _blocks(t.shape[0]):
        out[part] = multiply(t[part, : part.stop], x[: part.stop])
    return out


def lower_transposed_times(t: Tensor, x: Tensor) -> Tensor:
    """tᵀ x for a lower triangular ``t`` [m, m], by little more than half of the products."""
    if t.shape[0] < _SPLIT:
        return multiply(t.T, x)
    out = torch.empty_like(x)
    for part in _blocks(t.shape[0]):
        out[part] = multiply(t[part.start :, part].T, x[part.start :])
    return out


def inverse_factor(b: Tensor) -> Tensor | None:
    """Lower triangular T [m, m] with T b Tᵀ = I, the inverse of the Cholesky factor, so that
    b⁻¹ = TᵀT; None where ``b`` is not positive definite to its precision.

    On a CPU by halves: products do nearly all of the work, and they run at twice the speed of
    LAPACK's factorization and five times that of its inverse (two cores, float64). On a GPU whole:
    the halves took 14.4 ms for a side of 4096 on an H100, cuSOLVER and cuBLAS 5.6 ms.
    """
    m = b.shape[0]
    if m <= _SPLIT or b.is_cuda:
        factor, failed = torch.linalg.cholesky_ex(b)
        if int(failed):
            return None
        eye = torch.eye(m, dtype=b.dtype, device=b.device)
        found: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
        return found
    h = m // 2
    first = inverse_factor(b[:h, :h])
    if first is None:
        return None
    # L₂₁ = b₂₁ T₁₁ᵀ; laid out once, or every product of a block would copy its share
    below = lower_times(first, b[:h, h:].contiguous()).T.contiguous()
    second = inverse_factor(b[h:, h:] - gram(below))
    if second is None:
        return None
    t = b.new_zeros(m, m)
    t[:h, :h], t[h:, h:] = first, second
    # T₂₁ = −T₂₂ L₂₁ T₁₁
    corner = lower_times(second, below).T.contiguous()
    t[h:, :h] = lower_transposed_times(first, corner).T.neg()
    return t


def _draw(rows: int, columns: int, like: Tensor) -> Tensor:
    """Normal numbers, the same for a shape on every machine and call."""
    generator = torch.Generator().manual_seed(rows * 0x9E37 + columns)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(like)


def start_block(rows: int, columns: int, like: Tensor) -> Tensor:
    """Orthonormal columns in a random position, dtype and device of ``like``."""
    q: Tensor = torch.linalg.qr(_draw(rows, columns, like))[0]
    return q


def largest_eigenvalue(*factors: Tensor, steps: int = 10) -> float:
    """Estimate from below of the largest eigenvalue of the product of ``factors``, symmetric and
    semidefinite, good to a few per cent: power steps on eight vectors, in float32, since reading
    the factors is what they cost."""
    singles = [factor.float() for factor in factors]

    def applied(q: Tensor) -> Tensor:
        for factor in reversed(singles):
            q = factor @ q
        return q

    rows = factors[-1].shape[1]
    q = start_block(rows, min(8, rows), singles[0])
    for _ in range(steps):
        q = torch.linalg.qr(applied(q))[0]
    return float(torch.linalg.eigvalsh(q.T @ applied(q))[-1])


def norm_by_probes(*factors: Tensor, probes: int = 32) -> float:
    """‖product of ``factors``‖_F, from its action on random vectors: without bias in its square,
    good to a few per cent (one dominant direction: to a fifth)."""
    rows = factors[-1].shape[1]
    z = _draw(rows, probes, factors[0])
    for factor in reversed(factors):
        z = factor @ z
    return float(torch.linalg.vector_norm(z)) / math.sqrt(probes)


def isometry_defect(y: Tensor) -> float:
    """‖y yᵀ − I‖_F, of a large ``y`` by random vectors (:func:`norm_by_probes`)."""
    if y.shape[0] < _SPLIT:
        off = gram(y)
        off.diagonal().sub_(1)
        return float(torch.linalg.vector_norm(off))
    z = _draw(y.shape[0], 32, y)
    return float(torch.linalg.vector_norm(y @ (y.T @ z) - z)) / math.sqrt(z.shape[1])
