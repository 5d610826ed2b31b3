"""Iso-C through the public call against singular value decompositions in float64: over condition
numbers, shapes, ranks and dtypes, with the exact fallback beyond."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import magic_fast as mf
from magic_fast.reference import spectral
from magic_fast.reference.spectral import rank_cutoff
from spectral.spectra import distance, geometric, matrix

SHAPES = [(1, 1), (1, 9), (9, 1), (64, 64), (60, 150), (150, 60), (120, 400), (400, 120),
          (256, 256)]  # fmt: skip
# rows above 512: factors and products by blocks, and norms by random vectors
LARGE = [(520, 520), (520, 800), (800, 520)]


def experts_of(total: Tensor, count: int = 4) -> list[Tensor]:
    """Float32 task vectors that disagree as much as they agree, and add up to ``total``."""
    g = torch.Generator().manual_seed(len(total))
    size = total.square().mean().sqrt()
    own = [
        (total / count + size * torch.randn(total.shape, generator=g, dtype=torch.float64)).float()
        for _ in range(count - 1)
    ]
    rest: Tensor = total - torch.stack(own).double().sum(0)
    return [*own, rest.float()]


@pytest.mark.parametrize("shape", [(), (7,), (600, 700), (3, 2**18), (700, 600)], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
def test_the_sum_piece_by_piece(shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    g = torch.Generator().manual_seed(1)
    taus = [torch.randn(shape, generator=g) for _ in range(3)]
    if shape == (700, 600):
        taus[1] = taus[1].T.contiguous().T
    a, b, c = (tau.to(dtype or torch.float32) for tau in taus)
    assert torch.equal(spectral.total(taus, dtype), a + b + c)


def exact(taus: Sequence[Tensor]) -> Tensor:
    """All in float64; what float32 cannot tell from zero is zero."""
    u, s, vh = torch.linalg.svd(torch.stack(list(taus)).double().sum(0), full_matrices=False)
    return (u * (s > rank_cutoff(torch.float32) * s[0])) @ vh * s.mean()


def fell_back(caplog: pytest.LogCaptureFixture) -> bool:
    return any("by singular value decomposition" in r.getMessage() for r in caplog.records)


def check(shape: tuple[int, int], condition: float, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "magic_fast")
    sigma = geometric(min(shape), condition)
    taus = experts_of(matrix(shape, sigma, dtype=torch.float64))
    merged = mf.merge_task_vectors(taus, "iso_c")
    assert merged.dtype == torch.float32
    # 1e-4 well-conditioned, 1e-3 at condition 1e6; beyond, the decomposition's own rounding
    condition = condition if min(shape) > 1 else 1.0
    bound = 1e-4 if condition < 1e6 else 1e-3 if condition == 1e6 else 1e-6
    assert distance(merged, exact(taus)) <= bound
    assert fell_back(caplog) == (condition > 1e6)


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_over_conditions(
    shape: tuple[int, int], condition: float, caplog: pytest.LogCaptureFixture
) -> None:
    check(shape, condition, caplog)


@pytest.mark.parametrize("condition", [10.0, 1e4, 1e6])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_over_conditions_above_a_block(
    shape: tuple[int, int], condition: float, caplog: pytest.LogCaptureFixture
) -> None:
    check(shape, condition, caplog)


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e6])
@pytest.mark.parametrize("few", [1, 5])
def test_a_few_weak_directions(
    few: int, condition: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Nearly all directions alike: the weak ones are put right by themselves."""
    caplog.set_level(logging.INFO, "magic_fast")
    sigma = torch.ones(200, dtype=torch.float64)
    sigma[-few:] = geometric(few + 1, condition)[1:]
    taus = experts_of(matrix((200, 230), sigma, dtype=torch.float64))
    want = exact(taus)
    assert distance(mf.merge_task_vectors(taus, "iso_c"), want) <= 1e-5
    assert not fell_back(caplog)


@pytest.mark.parametrize("rank", [1, 7, 30])
@pytest.mark.parametrize("shape", [(64, 64), (60, 150), (150, 60)], ids=str)
def test_of_low_rank(shape: tuple[int, int], rank: int, caplog: pytest.LogCaptureFixture) -> None:
    """Experts that are LoRAs of one adapter size: a partial isometry, σ̄ over min(m, n)."""
    caplog.set_level(logging.INFO, "magic_fast")
    g = torch.Generator().manual_seed(rank)
    down = torch.randn(rank, shape[1], generator=g)
    taus = [torch.randn(shape[0], rank, generator=g) @ down for _ in range(3)]
    merged = mf.merge_task_vectors(taus, "iso_c")
    assert distance(merged, exact(taus)) <= 1e-4
    sigma = torch.linalg.svdvals(torch.stack(taus).double().sum(0))
    found = torch.linalg.svdvals(merged.double())
    torch.testing.assert_close(found[:rank], (sigma.mean()).expand(rank), rtol=1e-4, atol=0)
    assert float(found[rank:].sum()) <= 1e-4 * float(found.sum())
    assert not fell_back(caplog)


def test_of_nothing() -> None:
    base = torch.ones(30, 40)
    assert torch.equal(mf.merge(base, [base, base], "iso_c"), base)
    a = matrix((30, 40), geometric(30, 10))
    assert not mf.merge_task_vectors([a, -a], "iso_c").any()  # they cancel, exactly
    zero_rows = a.clone()
    zero_rows[3:9] = 0
    merged = mf.merge_task_vectors([zero_rows, zero_rows], "iso_c")
    assert distance(merged, exact([zero_rows] * 2)) <= 1e-4
    assert float(merged[3:9].abs().max()) <= 1e-6 * float(merged.abs().max())


@pytest.mark.parametrize("condition", [10.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, condition: float) -> None:
    """Checkpoints of that dtype: what is between them is exact in float32, and Δ is rounded
    once."""
    base = torch.randn(70, 90, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = matrix((70, 90), geometric(70, condition), dtype=torch.float64)
    experts = [(base.double() + tau.double()).to(dtype) for tau in experts_of(total)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    taus = [expert.to(wide) - base.to(wide) for expert in experts]
    want = exact(taus)
    merged = mf.merge(base, experts, "iso_c", out=torch.empty(70, 90, dtype=wide))
    limit = 1e-9 if dtype == torch.float64 else 1e-4
    # beside Δ's error that of base + Δ in float32
    rounding = torch.finfo(wide).eps * float(base.double().norm() / want.norm())
    assert distance(merged.double() - base.double(), want) <= limit + rounding


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=str)
def test_of_any_size(scale: float) -> None:
    taus = experts_of(matrix((64, 80), geometric(64, 100), dtype=torch.float64))
    scaled = [(tau.double() * scale).float() for tau in taus]
    merged = mf.merge_task_vectors(scaled, "iso_c").double() / scale
    assert distance(merged, exact(taus)) <= 1e-4
