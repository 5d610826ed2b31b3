"""Products and bounds that the decompositions share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SPLIT = 512  # below it one product is faster than four blocks of one


def normalized(x: Tensor) -> tuple[Tensor, float]:
    """(x / unit, unit): the largest magnitude brought into [½, 1) by a power of two, which rounds
    nothing (at condition 1e6 one rounding costs 1e-3); unit 0 for x = 0."""
    peak = float(x.abs().max()) if x.numel() else 0.0
    if peak == 0:
        return x, 0.0
    exponent = min(max(math.frexp(peak)[1], -1000), 1000)
    return (x.double() * 2.0**-exponent).to(x.dtype), 2.0**exponent


def gram(x: Tensor) -> Tensor:
    """x xᵀ [m, m]: the blocks on and below the diagonal computed, the others mirrored."""
    return symmetric_product(x, x)


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ [m, m] where that is symmetric, by 10/16 of the products of a full one."""
    m = a.shape[0]
    if m < _SPLIT:
        return a @ b.T
    out = a.new_empty(m, m)
    step = -(-m // 4)
    for start in range(0, m, step):
        stop = min(start + step, m)
        torch.mm(a[start:stop], b[:stop].T, out=out[start:stop, :stop])
        out[:start, start:stop] = out[start:stop, :start].T
    return out


def _draw(rows: int, columns: int, like: Tensor) -> Tensor:
    """Normal numbers, the same for a shape on every machine and call."""
    generator = torch.Generator().manual_seed(rows * 0x9E37 + columns)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(like)


def start_block(rows: int, columns: int, like: Tensor) -> Tensor:
    """Orthonormal columns in a random position, dtype and device of ``like``."""
    q: Tensor = torch.linalg.qr(_draw(rows, columns, like))[0]
    return q


def largest_eigenvalue(a: Tensor, steps: int = 10) -> float:
    """Estimate from below of the largest eigenvalue of a symmetric, semidefinite ``a``, good to a
    few per cent: power steps on eight vectors."""
    q = start_block(a.shape[0], min(8, a.shape[0]), a)
    for _ in range(steps):
        q = torch.linalg.qr(a @ q)[0]
    return float(torch.linalg.eigvalsh(q.T @ (a @ q))[-1])


def smallest_eigenvalue(factor: Tensor, steps: int = 6) -> float:
    """Estimate from above of the smallest eigenvalue of L Lᵀ, by inverse power steps.

    Args:
        factor: lower triangular L [m, m].
    """
    q = start_block(factor.shape[0], min(8, factor.shape[0]), factor)
    for _ in range(steps):
        q = torch.linalg.qr(torch.cholesky_solve(q, factor))[0]
    return 1 / float(torch.linalg.eigvalsh(q.T @ torch.cholesky_solve(q, factor))[-1])
