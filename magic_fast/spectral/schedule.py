"""The steps that drive singular values to one: the best odd polynomial of degree five, or the best
rational function of degree (3, 2), for the interval that they lie in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial import chebyshev

#: p(x) = a·x + b·x³ + c·x⁵
Coefficients = tuple[float, float, float]

#: third-order convergence at 1, for values within a few per cent of it: 1 + e → 1 + 2.5·e³
POLISH: Coefficients = (15 / 8, -10 / 8, 3 / 8)
_NEARLY_ONE = 0.03


def quintic(low: float, high: float) -> tuple[Coefficients, float]:
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


@dataclass(frozen=True)
class Quintic:
    """One step, and how far from one it leaves the values at most."""

    coefficients: Coefficients
    error: float


def quintics(low: float) -> Iterator[Quintic]:
    """One step after another, for values that begin in [low, 1]; without end."""
    high = 1.0
    while high - low > _NEARLY_ONE:
        coefficients, error = quintic(low, high)
        yield Quintic(coefficients, error)
        low, high = 1 - error, 1 + error
    error = max(1 - low, high - 1)
    while True:
        error = 2.5 * error**3
        yield Quintic(POLISH, error)


@dataclass(frozen=True)
class Rational:
    """x(a + b·x²)/(1 + c·x²), which maps the interval that it was made for into [low, 1]."""

    a: float
    b: float
    c: float
    low: float

    def __call__(self, x: float) -> float:
        return x * (self.a + self.b * x**2) / (1 + self.c * x**2)


def rational(low: float) -> Rational:
    """The dynamically weighted Halley step for values in [low, 1] (Nakatsukasa, Bai and Gygi, SIAM
    J. Matrix Anal. Appl. 31, 2010).

    >>> round(rational(1e-6).low, 4)
    0.0252
    """
    d = (4 * (1 - low**2) / low**4) ** (1 / 3)
    root = math.sqrt(1 + d)
    a = root + 0.5 * math.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * root))
    b = (a - 1) ** 2 / 4
    c = a + b - 1
    return Rational(a, b, c, min(1.0, low * (a + b * low**2) / (1 + c * low**2)))


@dataclass(frozen=True)
class Finish:
    """x·q(s), s = (x² − middle)/half: 1 for values in an interval, but for ``error``.

    Attributes:
        coefficients: of q, from s⁰ to s⁶.
    """

    middle: float
    half: float
    coefficients: tuple[float, ...]
    error: float


def finish(low: float) -> Finish:
    """The step for values in [low, 1]: q of degree six meets 1/x at the Chebyshev points of x².

    >>> finish(0.7).error < 3e-6
    True
    """
    middle, half = (1 + low**2) / 2, (1 - low**2) / 2
    points = chebyshev.chebpts1(7)
    series = chebyshev.chebfit(points, 1 / np.sqrt(middle + half * points), 6)
    x = np.linspace(low, 1, 4001)
    values = x * chebyshev.chebval((x**2 - middle) / half, series)
    coefficients = tuple(chebyshev.cheb2poly(series).tolist())
    return Finish(middle, half, coefficients, float(np.abs(values - 1).max()))
