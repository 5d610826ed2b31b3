"""``mf.sweep`` gives the bits of as many calls of ``mf.merge``."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import magic_fast as mf
from support.backends import available_backends

SHAPE = (128, 521)  # just large enough to be shared, of a length that no block divides


def models(dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> tuple[Any, list[Any]]:
    """Small multiples of a power of two: magnitudes are equal often."""
    draw = torch.Generator().manual_seed(3)
    base = torch.randint(-512, 512, shape, generator=draw).float() / 256
    steps = [torch.randint(-24, 25, shape, generator=draw).float() / 512 for _ in range(3)]
    return base.to(dtype), [(base + s).to(dtype) for s in steps]


def named(*tensors: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    small = [t.flatten()[:7].clone() for t in tensors]
    ids = torch.arange(4)
    return [{"w": t, "norm": s, "ids": ids} for t, s in zip(tensors, small, strict=True)]


def grid(method: str, **values: list[Any]) -> list[dict[str, Any]]:
    rows = product(*values.values())
    return [{"method": method, **dict(zip(values, row, strict=True))} for row in rows]


RECIPES = {
    "ties": grid("ties", density=[0.1, 0.2, 1.0], scale=[0.3, 0.5, 1.0, 1.7]),
    "model scope": grid("ties", preset=["ties_merging"], density=[0.1, 0.4], scale=[0.5, 1, 2]),
    "majority": grid("ties", preset=["magic"], density=[0.1, 0.4], scale=[0.5, 1, 2]),
    "random": grid("dare_ties", density=[0.3], scale=[0.5, 1, 2], seed=[0, 7]),
    "weights": grid("task_arithmetic", weights=[[0.2, 0.5, 1], 0.4], scale=[0.5, 1, -2]),
    "several methods": [
        *grid("ties", scale=[0.5, 1, 2]),
        *grid("della", scale=[1, 2]),
        *grid("iso_c", scale=[1.0]),
        *grid("average", calibrate=["wsc", None]),
    ],
}


@pytest.mark.parametrize("backend", [None, *available_backends()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", RECIPES)
def test_same_bits(case: str, dtype: torch.dtype, backend: str | None) -> None:
    kernels = backend in ("native", "cuda", "triton")
    if kernels and (dtype is torch.float64 or case == "several methods"):
        pytest.skip(f"the {backend} backend has neither")
    base, *experts = named(*(lambda b, e: [b, *e])(*models(dtype)))
    results = mf.sweep(base, experts, RECIPES[case], backend=backend)
    assert len(results) == len(RECIPES[case])
    for recipe, result in zip(RECIPES[case], results, strict=True):
        apart = mf.merge(base, experts, **recipe, backend=backend)
        assert result.keys() == apart.keys()
        assert all(torch.equal(result[n], apart[n]) for n in apart), recipe


def test_bare_tensors_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared way is taken, and a bare tensor goes through it."""
    if "native" not in available_backends():
        pytest.skip("only the native backend shares")
    from magic_fast.api.tensors import sweep as sweeping

    seen: list[int] = []
    own = sweeping.merge_scales

    def counted(jobs: Any, *more: Any) -> Any:
        seen.append(len(jobs))
        return own(jobs, *more)

    monkeypatch.setattr(sweeping, "merge_scales", counted)
    base, experts = models(torch.bfloat16)
    results = mf.sweep(base, torch.stack(experts), RECIPES["ties"])
    assert seen == [12]
    for recipe, result in zip(RECIPES["ties"], results, strict=True):
        assert torch.equal(result, mf.merge(base, experts, **recipe))


@pytest.mark.parametrize("where", ["base", "expert"])
def test_nonfinite_is_told_as_by_merge(where: str) -> None:
    base, experts = models(torch.float32)
    (base if where == "base" else experts[1])[100, 5] = float("inf")
    with pytest.raises(mf.NonFiniteError) as apart:
        mf.merge(base, experts, **RECIPES["ties"][0])
    with pytest.raises(mf.NonFiniteError) as together:
        mf.sweep(base, experts, RECIPES["ties"])
    assert str(together.value) == str(apart.value)


def test_overflow_is_told() -> None:
    base, experts = models(torch.float16)
    recipes = grid("task_arithmetic", scale=[0.5, 1.0, 1e6])
    with pytest.raises(mf.NonFiniteError, match="overflow"):
        mf.sweep(base, experts, recipes)


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ([], "expected 1 to 256, got 0"),
        ([{}] * 257, "expected 1 to 256, got 257"),
        ([{"density": 0.1}, {"density": 2}], "density"),
        ([{"densty": 0.1}], "Did you mean 'density'"),
        ([{"method": "tie"}], "Did you mean 'ties'"),
        ([{"out": None}], "'out'"),
        ([{"method": "linear"}], r"base for method 'linear' of recipes\[0\]"),
    ],
)
def test_refused(recipes: list[dict[str, Any]], message: str) -> None:
    base, experts = models(torch.float32, (4, 4))
    with pytest.raises(mf.InputError, match=message):
        mf.sweep(base, experts, recipes)
