"""Merges that take another way through the loops than their neighbours: the same bits, and nothing
that is not finite goes unseen on any of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from magic_fast import _native
from magic_fast.ops.job import Job
from magic_fast.ops.native.backend import NativeBackend
from magic_fast.ops.torch.backend import TorchBackend
from magic_fast.recipe import (
    Consensus,
    Contributors,
    Recipe,
    Reduce,
    Rescale,
    RowCalibration,
    Trim,
    TrimRule,
    Vote,
    VoteOn,
)

ISAS = list(_native.build_config()["supported_isas"])
SHAPE = (3, 5003)  # tails of a block, a tile and a stretch
LARGE = Trim(TrimRule.MAGNITUDE, density=(0.3,) * 3)
RANDOM = Trim(TrimRule.RANDOM, density=(0.5,) * 3, seed=7)
AGREE = {"vote": Vote.MASS, "contributors": Contributors.AGREEING}
WEIGHTS = (0.5, 1.0, -0.75)
RECIPES = {
    "sum": Recipe(WEIGHTS),
    "mean": Recipe(WEIGHTS, reduce=Reduce.MEAN, scale=0.5),
    "sum of the large": Recipe(WEIGHTS, LARGE),
    "sum of a band": Recipe(WEIGHTS, Trim(TrimRule.BAND, density=(0.3,) * 3, gamma=(0.01,) * 3)),
    "random sum": Recipe(WEIGHTS, RANDOM, rescale=Rescale.KEEP_PROBABILITY),
    "ties": Recipe((1.0,) * 3, LARGE, reduce=Reduce.WEIGHTED_MEAN, **AGREE),
    "ties, weighted": Recipe(WEIGHTS, LARGE, reduce=Reduce.WEIGHTED_MEAN, **AGREE),
    "ties, sum": Recipe(WEIGHTS, LARGE, **AGREE),
    "ties, unweighted votes": Recipe(WEIGHTS, LARGE, vote_on=VoteOn.UNWEIGHTED, **AGREE),
    "elected largest": Recipe(WEIGHTS, reduce=Reduce.MAX, **AGREE),
    "dare": Recipe(WEIGHTS, RANDOM, rescale=Rescale.KEEP_PROBABILITY, **AGREE),
    "count": Recipe(WEIGHTS, vote=Vote.COUNT, contributors=Contributors.AGREEING),
    "largest": Recipe(WEIGHTS, reduce=Reduce.MAX),
    "consensus": Recipe(WEIGHTS, consensus=Consensus((0.4,) * 3)),
}


def models(dtype: torch.dtype, count: int = 3) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=generator).to(dtype)
    steps = [0.1 * torch.randn(SHAPE, generator=generator) for _ in range(count)]
    return base, [(base.float() + step).to(dtype) for step in steps]


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_plain_sums_have_the_bits_of_any_sum(
    isa: str, dtype: torch.dtype, count: int, scale: float
) -> None:
    """One dtype throughout goes from the inputs to the output; a mix of dtypes does not."""
    values, other = (dtype, torch.float32) if dtype != torch.float32 else (torch.bfloat16,) * 2
    base, experts = models(values, count)
    base, experts = base.to(dtype), [e.to(dtype) for e in experts]
    reduce = Reduce.SUM if scale == 1 else Reduce.MEAN
    recipe = Recipe((0.3,) * count, reduce=reduce, scale=scale)
    same, mixed = torch.zeros_like(base), torch.zeros_like(base)
    backend = NativeBackend(isa=isa)
    backend.merge(Job(base, experts, recipe, same))
    backend.merge(Job(base.to(other), experts, recipe, mixed))  # the same values
    assert torch.equal(bits(same), bits(mixed))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["ties", "ties, weighted", "ties, sum"])
@pytest.mark.parametrize("count", range(1, 9))
def test_votes_in_registers_have_the_bits_of_any_vote(isa: str, name: str, count: int) -> None:
    """Experts without weight neither vote nor contribute, but they are too many for registers."""
    base, experts = models(torch.bfloat16, count)
    weights = (RECIPES[name].weights * 3)[:count]
    outs = []
    for others in (0, 9 - count):
        k = count + others
        trim = Trim(TrimRule.MAGNITUDE, density=(0.3,) * k)
        recipe = replace(RECIPES[name], weights=weights + (0.0,) * others, trim=trim)
        outs.append(torch.zeros_like(base))
        NativeBackend(isa=isa).merge(Job(base, [*experts, *experts[:1] * others], recipe, outs[-1]))
    assert torch.equal(bits(outs[0]), bits(outs[1]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["expert", "base"])
@pytest.mark.parametrize("wsc", [False, True], ids=["bare", "wsc"])
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_not_finite_is_found(name: str, wsc: bool, place: str, bad: float) -> None:
    base, experts = models(torch.bfloat16)
    for row, column in ((0, 17), (1, 5002), (2, 4096)):
        (experts[1] if place == "expert" else base)[row, column] = bad
    calibration = RowCalibration(*SHAPE) if wsc else None
    found, expected = (
        backend.merge(
            Job(base, experts, RECIPES[name], torch.zeros_like(base), calibration=calibration)
        )
        for backend in (NativeBackend(), TorchBackend())
    )
    assert found.first_nonfinite == expected.first_nonfinite
    assert found.base_nonfinite == expected.base_nonfinite
    first = (-1, 17, -1) if place == "expert" else (-1, -1, -1)
    assert found.first_nonfinite == first and found.base_nonfinite == (
        17 if place == "base" else -1
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", range(3), ids=["merged", "expert", "base"])
def test_what_is_not_finite_is_found_beside_a_merged_tensor(where: int, bad: float) -> None:
    base, experts = models(torch.bfloat16)
    merged = experts.pop()
    (merged, experts[0], base)[where][1, 4097] = bad
    job = Job(base, experts, RECIPES["sum"], torch.zeros_like(base))
    job = replace(job, recipe=Recipe((1.0,) * 2), calibration=RowCalibration(*SHAPE))
    stats = NativeBackend().calibrate(job, merged)  # the merged tensor counts after the experts
    at = SHAPE[1] + 4097
    found = (stats.first_nonfinite, stats.base_nonfinite)
    assert found == [((-1, -1, at), -1), ((at, -1, -1), -1), ((-1, -1, -1), at)][where]


@pytest.mark.parametrize("name", RECIPES)
def test_values_that_are_not_finite_go_through(name: str) -> None:
    base, experts = models(torch.bfloat16)
    experts[0][0, 30], experts[1][0, 31], experts[2][2, 5002] = math.nan, math.inf, -math.inf
    out, want = torch.zeros(SHAPE), torch.zeros(SHAPE)
    NativeBackend().merge(Job(base, experts, RECIPES[name], out))
    TorchBackend().merge(Job(base, experts, RECIPES[name], want))
    assert torch.allclose(out, want, rtol=1e-5, atol=1e-6, equal_nan=True)
