"""Leading singular triples against the singular value decomposition in float64."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from magic_fast.spectral import leading, leading_triples
from magic_fast.spectral.leading_triples import MAX_ERROR, error_bound
from spectral.spectra import distance, geometric, matrix

SPECTRA: dict[str, Callable[[tuple[int, int]], Tensor]] = {
    "flat": lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(3)),
    "decay3": lambda shape: matrix(shape, geometric(min(shape), 1e3)),
    "decay8": lambda shape: matrix(shape, geometric(min(shape), 1e8)),
    "harmonic": lambda shape: matrix(
        shape, 1 / torch.arange(1, min(shape) + 1, dtype=torch.float64)
    ),
    "lowrank": lambda shape: matrix(shape, geometric(12, 3)),
    "equal": lambda shape: matrix(shape, torch.ones(min(shape))),
    "spikes": lambda shape: matrix(
        shape, torch.cat([torch.full((3,), 500.0), torch.linspace(1, 0.2, min(shape) - 3)])
    ),
}


def product(triples: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    u, s, v = (t.double() for t in triples)
    return (u * s) @ v.T


@pytest.mark.parametrize("count", [1, 24, 150])
@pytest.mark.parametrize("shape", [(200, 320), (320, 200), (256, 256)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_leading_triples(spectrum: str, shape: tuple[int, int], count: int) -> None:
    x = SPECTRA[spectrum](shape)
    u, s, v = leading(x, count)
    u0, s0, vh0 = torch.linalg.svd(x.double(), full_matrices=False)
    assert (u.shape, s.shape, v.shape) == ((shape[0], count), (count,), (shape[1], count))
    assert float((s - s0[:count]).abs().max()) <= 2e-6 * float(s0[0])
    best = (u0[:, :count] * s0[:count]) @ vh0[:count]
    if spectrum == "equal":  # which directions is free: judge what is lost instead
        lost = torch.linalg.vector_norm(x.double() - product((u, s, v)))
        assert float(lost) == pytest.approx((min(shape) - count) ** 0.5, rel=1e-3)
    else:
        assert distance(product((u, s, v)), best) <= MAX_ERROR
    # V = Xᵀu/σ in float32 is off by 2⁻²³·σ₁/σ, up to 2500·2⁻²³ in `spikes`, times √m
    used = (s > 0).double()
    for side in (u, v):
        gram = side.T.double() @ side.double()
        assert float((gram - torch.diag(used)).abs().max()) <= 2e-3


@pytest.mark.parametrize("gap", [1e-3, 3e-4, 1e-5])
@pytest.mark.parametrize(("shape", "count"), [((200, 320), 24), ((320, 200), 8)])
def test_hardly_a_gap(
    shape: tuple[int, int], count: int, gap: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The first σ left out is as large as the last one kept, but for ``gap``: rounding of float32
    stalls the iteration, float64 ends it, or eigenvectors do."""
    caplog.set_level(logging.INFO, "magic_fast")
    rest = torch.linspace(2 * (1 - gap), 0.2, min(shape) - count)
    x = matrix(shape, torch.cat([torch.linspace(3, 2, count), rest]))
    u0, s0, vh0 = torch.linalg.svd(x.double(), full_matrices=False)
    best = (u0[:, :count] * s0[:count]) @ vh0[:count]
    assert distance(product(leading(x, count)), best) <= MAX_ERROR
    assert not caplog.records


def test_filters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail below strong directions, which rounding of the Gram matrix would hide (λ₁/λ₈₀ is
    5000), and no gap: the iteration ends by itself, and in float64 where float32 stalls."""
    monkeypatch.setattr(leading_triples, "_eigenvectors", lambda *_: pytest.fail("not by itself"))
    dtypes = []
    ritz = leading_triples._rayleigh_ritz
    monkeypatch.setattr(
        leading_triples, "_rayleigh_ritz", lambda x, q: dtypes.append(x.dtype) or ritz(x, q)
    )
    count, shape = 80, (500, 700)
    for gap, expected in ((5e-4, {torch.float32}), (1e-5, {torch.float32, torch.float64})):
        dtypes.clear()
        kept = torch.arange(1, count + 1, dtype=torch.float64).pow(-0.97)
        rest = kept[-1] * (1 - gap) * torch.linspace(1, 0.1, shape[0] - count).pow(2)
        x = matrix(shape, torch.cat([kept, rest.double()]))
        u0, s0, vh0 = torch.linalg.svd(x.double(), full_matrices=False)
        best = (u0[:, :count] * s0[:count]) @ vh0[:count]
        assert distance(product(leading(x, count)), best) <= MAX_ERROR
        assert set(dtypes) == expected


def test_slow_convergence_is_left_to_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal singular values: no filter tells them apart, and none is tried for long."""
    rounds = []
    ritz = leading_triples._rayleigh_ritz
    monkeypatch.setattr(
        leading_triples, "_rayleigh_ritz", lambda x, q: rounds.append(1) or ritz(x, q)
    )
    leading(SPECTRA["equal"]((200, 320)), 24)
    assert len(rounds) == 1


def test_no_direction_is_made_up() -> None:
    """Zero singular values come with zero columns."""
    x = matrix((300, 260), geometric(7, 2))
    u, s, v = leading(x, 20)
    assert int((s > 0).sum()) == 7
    assert not u[:, 7:].any() and not v[:, 7:].any()
    u, s, v = leading(torch.zeros(80, 90), 5)
    assert not u.any() and not s.any() and not v.any()


def test_nothing_asked() -> None:
    u, s, v = leading(torch.ones(80, 90), 0)
    assert (u.shape, s.shape, v.shape) == ((80, 0), (0,), (90, 0))


def test_the_same_every_time() -> None:
    x = SPECTRA["flat"]((200, 200))
    first, second = leading(x, 10), leading(x, 10)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_exact_where_the_bound_is_not_met(caplog: pytest.LogCaptureFixture) -> None:
    """150 directions reach down to 1e-6 of the largest: more than a Gram matrix resolves."""
    caplog.set_level(logging.INFO, "magic_fast")
    leading(SPECTRA["decay8"]((200, 200)), 150, label="'h.weight'")
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("singular triples of 'h.weight' by singular value decomposition")


def test_error_bound_by_hand() -> None:
    sigma = torch.tensor([2.0, 1.0], dtype=torch.float64)
    residuals = torch.tensor([0.0, 0.05], dtype=torch.float64)
    # only the second is off, by 0.05 / (1 − 0.5) = 0.1 of its σ; the norm is √5
    assert error_bound(sigma, residuals, 2, 0.5) == pytest.approx(0.1 / 5**0.5)
    # no gap: clipped at a full turn, √2
    assert error_bound(sigma, residuals, 2, 1.0) == pytest.approx((2 / 5) ** 0.5)


def test_error_bound_covers_the_error() -> None:
    """A bound that says less than the truth would let a bad truncation through: perturbed triples
    of a known matrix."""
    x = SPECTRA["harmonic"]((120, 120)).double()
    u, s, vh = torch.linalg.svd(x)
    g = torch.Generator().manual_seed(5)
    for noise in (1e-6, 1e-5, 1e-4):
        q = torch.linalg.qr(
            u[:, :10] + noise * torch.randn(120, 10, generator=g, dtype=torch.float64)
        )[0]
        a, sigma, bh = torch.linalg.svd(q.T @ x, full_matrices=False)
        residuals = torch.linalg.vector_norm(x @ bh.T - (q @ a) * sigma, dim=0)
        error = distance((q @ a * sigma) @ bh, (u[:, :10] * s[:10]) @ vh[:10])
        assert error <= error_bound(sigma, residuals, 10, float(s[10]))
