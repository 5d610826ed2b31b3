"""The steps that drive singular values to one: the best odd polynomial of degree five, or the best
rational function of degree (3, 2), for the interval that they lie in."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

#: p(x) = a·x + b·x³ + c·x⁵
Quintic = tuple[float, float, float]

#: third-order convergence at 1, for values within a few per cent of it
POLISH: Quintic = (15 / 8, -10 / 8, 3 / 8)
_NEARLY_ONE = 0.03


def quintic(low: float, high: float) -> tuple[Quintic, float]:
    """(coefficients, error E) of the odd quintic that keeps [low, high] within [1 − E, 1 + E] with
    the smallest E, by Remez exchange (Polar Express, Amsel et al., arXiv 2505.16932).

    >>> _, error = quintic(0.1, 1.0)
    >>> round(error, 3)
    0.453
    """
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    a = b = c = error = 0.0
    for _ in range(50):
        points = (low, q, r, high)
        rows = [[x, x**3, x**5, sign] for x, sign in zip(points, (1, -1, 1, -1), strict=True)]
        solved = torch.linalg.solve(
            torch.tensor(rows, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        )
        a, b, c, new_error = solved.tolist()
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        q, r = (math.sqrt(max((-3 * b + s * root) / (10 * c), 0.0)) for s in (-1, 1))
        q, r = min(max(q, low), high), min(max(r, low), high)
        if abs(new_error - error) < 1e-12:
            break
        error = new_error
    return (a, b, c), abs(new_error)


def quintics(low: float) -> Iterator[Quintic]:
    """Coefficients of one step after another, for values that begin in [low, 1]; without end: the
    last one repeats."""
    high = 1.0
    while high - low > _NEARLY_ONE:
        coefficients, error = quintic(low, high)
        yield coefficients
        low, high = 1 - error, 1 + error
    while True:
        yield POLISH


def rational(low: float) -> tuple[float, float, float, float]:
    """(a, b, c, new low) of x(a + b·x²)/(1 + c·x²), the dynamically weighted Halley step for values
    in [low, 1] (Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 31, 2010).

    >>> a, b, c, new = rational(1e-6)
    >>> round(new, 4)
    0.0252
    """
    d = (4 * (1 - low**2) / low**4) ** (1 / 3)
    root = math.sqrt(1 + d)
    a = root + 0.5 * math.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * root))
    b = (a - 1) ** 2 / 4
    c = a + b - 1
    return a, b, c, min(1.0, low * (a + b * low**2) / (1 + c * low**2))
