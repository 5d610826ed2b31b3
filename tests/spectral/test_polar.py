"""The polar factor by products against the singular value decomposition in float64."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from magic_fast.reference.spectral import ExactFactorizations, iso_c, rank_cutoff
from magic_fast.spectral import FastFactorizations, polar
from magic_fast.spectral.polar_factor import _converge, residual, tolerance
from magic_fast.spectral.products import inverse_factor
from magic_fast.spectral.schedule import quintic, rational
from spectral.spectra import distance, geometric, matrix

SHAPES = [(1, 1), (1, 9), (9, 1), (6, 6), (48, 64), (64, 48), (120, 400), (400, 120), (256, 256),
          (600, 601)]  # fmt: skip


def exact(x: Tensor) -> Tensor:
    return ExactFactorizations(rank_cutoff(x.dtype)).polar(x.double())


def fallbacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "singular value decomposition" in r.msg]


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_polar_within_bounds(
    shape: tuple[int, int], condition: float, caplog: pytest.LogCaptureFixture
) -> None:
    """1e-4 up to condition 1e5, 1e-3 at 1e6, by products all the way."""
    caplog.set_level(logging.INFO, "magic_fast")
    x = matrix(shape, geometric(min(shape), condition))
    factor = polar(x)
    assert factor.shape == x.shape and factor.dtype == x.dtype
    assert distance(factor, exact(x)) <= (1e-3 if condition > 1e5 else 1e-4)
    assert residual(factor.double()) <= tolerance(x.dtype)
    assert not fallbacks(caplog)


@pytest.mark.parametrize("condition", [1e7, 1e9])
def test_polar_beyond_is_exact_and_says_so(
    condition: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "magic_fast")
    x = matrix((90, 130), geometric(90, condition))
    factor = polar(x, label="'h.weight'")
    assert distance(factor, exact(x)) <= 1e-6
    (line,) = fallbacks(caplog)
    assert line.startswith("polar factor of 'h.weight' by singular value decomposition: ")


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_polar_float64(condition: float) -> None:
    x = matrix((80, 110), geometric(80, condition), dtype=torch.float64)
    assert distance(polar(x), exact(x)) <= 1e-7
    assert residual(polar(x)) <= tolerance(x.dtype)


@pytest.mark.parametrize("rank", [1, 5, 40])
@pytest.mark.parametrize("shape", [(40, 40), (60, 150), (150, 60)], ids=str)
def test_polar_of_low_rank_is_the_partial_isometry(
    shape: tuple[int, int], rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "magic_fast")
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(shape[0], rank, generator=g) @ torch.randn(rank, shape[1], generator=g)
    factor = polar(x)
    assert distance(factor, exact(x)) <= 1e-5
    # ‖partial isometry‖_F² = rank
    assert float(factor.double().square().sum()) == pytest.approx(rank, rel=1e-5)
    assert residual(factor.double()) <= tolerance(x.dtype)
    if rank < min(shape):
        assert not fallbacks(caplog)


def test_polar_of_zero_and_empty() -> None:
    assert not polar(torch.zeros(7, 5)).any()
    assert polar(torch.zeros(0, 5)).shape == (0, 5)
    x = matrix((30, 20), geometric(20, 10))
    x[:, 3] = 0
    x[7] = 0
    assert distance(polar(x), exact(x)) <= 1e-5
    assert float(polar(x)[:, 3].abs().max()) < 1e-12 and float(polar(x)[7].abs().max()) < 1e-12


@pytest.mark.parametrize("scale", [2.0**-149, 1e-30, 1.0, 1e30], ids=str)
def test_polar_does_not_depend_on_scale(scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-50, 51, (24, 40), generator=g).double()
    scaled = (x * scale).float()  # exact, denormals too, but for 1e±30
    assert distance(polar(scaled), exact(x)) <= 1e-5


def test_polar_of_strided_input() -> None:
    x = matrix((50, 60), geometric(50, 30))
    wide = torch.zeros(60, 100)
    wide[:, ::2] = x.T
    assert distance(polar(wide[:, ::2].T), exact(x)) <= 1e-5


def test_polar_leaves_its_input(caplog: pytest.LogCaptureFixture) -> None:
    x = matrix((70, 70), geometric(70, 1e4))
    before = x.clone()
    polar(x)
    assert torch.equal(x, before)


def test_unfinished_steps_are_refused() -> None:
    """A start below the promised interval does not pass the certificate silently."""
    x = torch.eye(40)
    x[0, 0] = 1e-12
    assert _converge(x, 0.9) is None


@pytest.mark.parametrize("where", [10, 590])
def test_no_factor_of_an_indefinite_matrix(where: int) -> None:
    """By halves, above 512 rows: the first has none, or what is left of the second."""
    b = torch.eye(600, dtype=torch.float64)
    t = inverse_factor(b)
    assert t is not None and torch.equal(t, b)
    b[where, where] = -1.0
    assert inverse_factor(b) is None


@pytest.mark.parametrize("shape", [(30, 30), (600, 610)], ids=str)
def test_inverse_factor(shape: tuple[int, int]) -> None:
    x = matrix(shape, geometric(min(shape), 20), dtype=torch.float64)
    b = x @ x.T
    t = inverse_factor(b)
    assert t is not None and not t.triu(1).any()
    assert distance(t @ b @ t.T, torch.eye(len(b))) <= 1e-12


def test_float32_from_float64() -> None:
    """At condition 1e6 rounding the matrix to float32 alone costs 9e-4."""
    x = matrix((60, 150), geometric(60, 1e6), dtype=torch.float64)
    factor = polar(x, dtype=torch.float32)
    assert factor.dtype == torch.float32
    assert distance(factor, exact(x)) <= 2e-5 < distance(polar(x.float()), exact(x))


def test_iso_c_spread_of_singular_values() -> None:
    """All singular values of the result are the mean of those of the sum."""
    g = torch.Generator().manual_seed(1)
    taus = [torch.randn(60, 90, generator=g) for _ in range(4)]
    merged = iso_c(taus, FastFactorizations())
    sigma = torch.linalg.svdvals(sum(taus).double())
    assert torch.allclose(torch.linalg.svdvals(merged.double()), sigma.mean().expand(60), rtol=1e-4)


@pytest.mark.parametrize("low", [1e-6, 1e-3, 0.1, 0.5, 0.9])
def test_quintic_stays_within_its_error(low: float) -> None:
    (a, b, c), error = quintic(low, 1.0)
    x = torch.linspace(low, 1, 20001, dtype=torch.float64)
    p = a * x + b * x**3 + c * x**5
    assert 0 < error < 1
    assert float((p - 1).abs().max()) <= error * (1 + 1e-6)
    assert float((p - 1).abs().max()) >= error * (1 - 1e-6)  # attained: no better bound exists


@pytest.mark.parametrize("low", [1e-6, 1e-3, 0.1])
def test_rational_step_keeps_its_interval(low: float) -> None:
    step = rational(low)
    x = torch.logspace(0, 0, 1, dtype=torch.float64) * torch.linspace(
        low, 1, 200001, dtype=torch.float64
    )
    y = x * (step.a + step.b * x**2) / (1 + step.c * x**2)
    assert float(y.min()) >= step.low * (1 - 1e-9) and float(y.max()) <= 1 + 1e-9
    assert step.low > low
    assert step(low) == pytest.approx(float(y[0]))
