"""Sums of low-rank matrices by their factors, against the float64 decomposition of the product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from magic_fast.errors import InputError, NonFiniteError
from magic_fast.spectral import combine_low_rank, low_rank_svd, stack_factors


def _factors(
    m: int, n: int, ranks: list[int], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(m * 31 + n)
    ups = [torch.randn(m, r, generator=generator).to(dtype) for r in ranks]
    downs = [torch.randn(r, n, generator=generator).to(dtype) for r in ranks]
    return ups, downs


def _sum(ups: list[Tensor], downs: list[Tensor], weights: list[float]) -> Tensor:
    return sum(w * b.double() @ a.double() for b, a, w in zip(ups, downs, weights, strict=True))  # type: ignore[return-value]


_SHAPES = [(40, 30, [4, 2, 3]), (5, 30, [4, 4]), (30, 5, [4, 4]), (7, 6, [1]), (1, 1, [2])]


@pytest.mark.parametrize(("m", "n", "ranks"), _SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_stacked_is_the_sum(m: int, n: int, ranks: list[int], dtype: torch.dtype) -> None:
    ups, downs = _factors(m, n, ranks, dtype)
    weights = [0.7, -0.4, 1.5][: len(ranks)]
    up, down = stack_factors(ups, downs, weights)
    assert up.dtype == torch.promote_types(dtype, torch.float32)
    assert up.shape == (m, sum(ranks)) and down.shape == (sum(ranks), n)
    want = _sum(ups, downs, weights)
    torch.testing.assert_close(up.double() @ down.double(), want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("m", "n", "ranks"), _SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_nearest_of_a_rank(m: int, n: int, ranks: list[int], rank: int) -> None:
    """The error is that of the truncated decomposition of the product, and no larger."""
    ups, downs = _factors(m, n, ranks)
    weights = [0.7, -0.4, 1.5][: len(ranks)]
    up, down = combine_low_rank(ups, downs, weights, rank)
    assert up.shape == (m, rank) and down.shape == (rank, n)
    want = _sum(ups, downs, weights)
    sigma = torch.linalg.svdvals(want)
    least = sigma[rank:].square().sum().sqrt()
    error = (up.double() @ down.double() - want).norm()
    assert error <= least + 2e-6 * want.norm()
    kept = min(rank, m, n, sum(ranks))
    rows = down[:kept].double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(kept).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(up.double().norm(dim=0)[:kept], sigma[:kept], rtol=1e-6, atol=1e-5)
    assert not up[:, kept:].any()  # of a rank that the sum does not have


def test_opposite_adapters_cancel() -> None:
    ups, downs = _factors(9, 8, [3])
    _, s, _ = low_rank_svd(*stack_factors(ups * 2, downs * 2, [1.0, -1.0]))
    assert s.max() < 1e-6 * torch.linalg.matrix_norm(ups[0] @ downs[0], ord=2)


def test_misfits_are_refused() -> None:
    ups, downs = _factors(4, 3, [2])
    with pytest.raises(
        InputError, match=r"factors 1: expected \[4, r\] and \[r, 3\], got \[5, 2\]"
    ):
        stack_factors([*ups, torch.ones(5, 2)], downs * 2, [1.0, 1.0])
    with pytest.raises(InputError, match="got 1, 1 and 2"):
        stack_factors(ups, downs, [1.0, 1.0])
    ups[0][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"factor 'up' of layer\.0: expected finite values"):
        low_rank_svd(ups[0], downs[0], label="layer.0")
