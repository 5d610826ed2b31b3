"""Spectral methods on a GPU against the formulas in float64 by SVD on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from magic_fast.reference import spectral
from magic_fast.spectral import FastFactorizations, leading, polar

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
]

SHAPES = [(700, 700), (600, 1500), (1500, 600), (65, 300)]


def decaying(shape: tuple[int, int], seed: int) -> Tensor:
    """float32 with singular values about 1/√i in a random position."""
    draw = torch.Generator().manual_seed(seed)
    n = min(shape)
    left = torch.randn(shape[0], n, generator=draw) * torch.arange(1, n + 1).rsqrt()
    return 1e-3 * left @ torch.randn(n, shape[1], generator=draw) / shape[0] ** 0.5


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m"])
def test_within_the_promise(method: str, shape: tuple[int, int]) -> None:
    formula = {
        "iso_c": spectral.iso_c,
        "iso_cts": lambda taus, by: spectral.iso_cts(taus, 0.8, by),
        "tsv_m": spectral.tsv_m,
    }[method]
    taus = [decaying(shape, seed) for seed in range(4)]
    want = formula([x.double() for x in taus], spectral.EXACT)
    got = formula([x.cuda() for x in taus], FastFactorizations())
    assert got.is_cuda and got.dtype == torch.float32
    assert distance(got, want) <= (1e-4 if method == "iso_c" else 1e-3)


@pytest.mark.parametrize("condition", [10.0, 1e3, 1e6])
def test_polar_over_conditions(condition: float) -> None:
    n = 700
    draw = torch.Generator().manual_seed(1)
    u, v = (
        torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0] for _ in range(2)
    )
    x = (u * torch.logspace(0, -torch.tensor(condition).log10().item(), n)) @ v.T
    got = polar(x.cuda(), dtype=torch.float32)
    assert distance(got, u @ v.T) <= (1e-4 if condition < 1e6 else 1e-3)


@pytest.mark.parametrize("rank", [0, 1, 300])
def test_low_rank_and_zeros(rank: int) -> None:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(640, rank, generator=draw) @ torch.randn(rank, 700, generator=draw)
    want = spectral.ExactFactorizations(spectral.rank_cutoff(torch.float32)).polar(x.double())
    got = polar(x.cuda())
    if rank == 0:
        assert int(torch.count_nonzero(got)) == 0
    else:
        assert distance(got, want) <= 1e-3


@pytest.mark.parametrize("count", [1, 20, 100, 350, 700])
def test_leading_triples(count: int) -> None:
    x = decaying((700, 900), 3)
    u, s, v = leading(x.cuda(), count)
    left, values, right = torch.linalg.svd(x.double(), full_matrices=False)
    want = (left[:, :count] * values[:count]) @ right[:count]
    assert distance((u * s) @ v.T, want) <= 1e-3


def test_what_the_process_chose_for_its_products_stays() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        x = decaying((600, 1500), 4)
        got = polar(x.cuda())
        assert distance(got, spectral.EXACT.polar(x.double())) <= 1e-3
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
