"""The CUDA kernels against the torch backend: what the parity grid is too small for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from magic_fast import ops
from magic_fast.methods.presets import build_recipe
from magic_fast.ops.cuda import scans as cuda_scans
from magic_fast.ops.gpu import jobs as gpu_jobs
from magic_fast.ops.job import Job
from magic_fast.recipe import Granularity, Recipe, RowCalibration, Trim, TrimRule, Variant, Vote
from support.oracle import assert_within_budget, truth

pytestmark = pytest.mark.usefixtures("needs_cuda")


def job(
    shape: tuple[int, ...],
    k: int,
    recipe: Recipe,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Job:
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw)
    experts = [(base + 0.01 * torch.randn(shape, generator=draw)).to(dtype) for _ in range(k)]
    out = torch.empty(shape, dtype=dtype)
    return Job(base.to(dtype), experts, recipe, out, "w")


def ties(k: int, density: float = 0.2, **more: Any) -> Recipe:
    trim = Trim(TrimRule.MAGNITUDE, (density,) * k)
    return Recipe((1.0,) * k, trim=trim, vote=Vote.MASS, **more)


def kept_masks(job: Job, selection: Any) -> list[Tensor]:
    """What a selection keeps of each expert: two cuts behind the last equal entry are the same."""
    found = []
    for k, e in enumerate(job.experts):
        tau = e.float() if job.base is None else e.float() - job.base.float()
        flat, index = tau.flatten().abs(), torch.arange(tau.numel())
        threshold = selection.threshold[k]
        equal = (flat == threshold) & (index < selection.tie_cut[k])
        found.append((flat > threshold) | equal)
    return found


def assert_same_selection(job: Job) -> None:
    mine, theirs = (ops.select(job, backend=b) for b in ("cuda", "torch"))
    assert mine.threshold == theirs.threshold
    for a, b in zip(kept_masks(job, mine), kept_masks(job, theirs), strict=True):
        assert torch.equal(a, b)


def both(job: Job) -> tuple[Any, Any, Tensor, Tensor]:
    """Stats and results of the kernels and of the reference."""
    other = replace(job, out=torch.empty_like(job.out))
    (mine,) = ops.merge([job], backend="cuda")
    (theirs,) = ops.merge([other], backend="torch")
    return mine, theirs, job.out, other.out


@pytest.mark.parametrize("k", [1, 3, 8, 9, 17])
def test_thresholds_and_cuts_of_large_tensors(k: int) -> None:
    """More than a sample: brackets, heavy values, segments."""
    assert_same_selection(job((300, 1003), k, ties(k)))


@pytest.mark.parametrize(
    "values",
    ["equal", "two", "powers", "sorted", "denormal"],
)
@pytest.mark.parametrize("density", [1e-5, 0.2, 0.999])
def test_selections_that_mislead_a_sample(values: str, density: float) -> None:
    n = 200_003
    draw = torch.Generator().manual_seed(1)
    x = {
        "equal": torch.full((n,), 0.25),
        "two": torch.where(torch.arange(n) % 7 == 0, 1.0, -1.0),
        "powers": 2.0 ** torch.randint(-30, 30, (n,), generator=draw).float(),
        "sorted": torch.arange(n).float() + 1,
        "denormal": torch.randint(0, 900, (n,), generator=draw).float() * 1e-44,
    }[values]
    recipe = Recipe((1.0,), trim=Trim(TrimRule.MAGNITUDE, (density,)))
    one = Job(None, [x], recipe, torch.empty(n), "w")
    assert_same_selection(one)


def test_one_scan_is_enough_as_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bins of a large tensor hold every bit pattern of its bracket: the second read goes."""
    one = job((1 << 9, 1 << 12), 1, ties(1), torch.float32)
    monkeypatch.setattr(cuda_scans, "scans_for", lambda *_: 1)
    assert_same_selection(one)


def test_a_bracket_that_missed_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above and below: the scans that are launched for the worst case find it all the same."""
    one = job((256, 517), 2, ties(2), torch.float32)
    for low, middle, high in ((0, 1, 2), (-1, 0, 1), (32760, 32761, 32762)):
        monkeypatch.setattr(
            gpu_jobs,
            "places_of",
            lambda t, *_: [low, middle, high] * len(t),  # noqa: B023
        )
        assert_same_selection(one)


@pytest.mark.parametrize("k", [1, 4, 8, 9, 19])
@pytest.mark.parametrize("variant", [Variant.MANIFOLD, Variant.SPHERE, Variant.MANIFOLD_EXACT])
def test_rows_of_many_experts(k: int, variant: Variant) -> None:
    one = replace(
        job((7, 333), k, ties(k), seed=k), calibration=RowCalibration(7, 333, variant=variant)
    )
    mine, theirs, got, _ = both(one)
    assert mine.kept == theirs.kept
    torch.testing.assert_close(mine.coefficient, theirs.coefficient, rtol=2e-6, atol=0)
    assert_within_budget(got, truth(one))


def scored(k: int) -> Recipe:
    return build_recipe("pcb", k, {"ratio": 0.3, "scope": "tensor", "scale": 1.2})


@pytest.mark.parametrize("cols", [1, 7, 8, 1024, 45_001])
@pytest.mark.parametrize(
    ("k", "recipe"), [(2, ties(2, 0.5)), (9, ties(9, 0.5)), (2, scored(2))], ids=["2", "9", "pcb"]
)
def test_rows_of_any_length(cols: int, k: int, recipe: Recipe) -> None:
    """45 001 elements are more than shared memory holds: d is formed again instead."""
    one = replace(
        job((3, cols), k, recipe),
        calibration=RowCalibration(3, cols, included=(True,) * (k - 1) + (False,)),
    )
    mine, theirs, got, _ = both(one)
    assert mine.kept == theirs.kept
    torch.testing.assert_close(mine.extra["norms2"], theirs.extra["norms2"], rtol=1e-5, atol=1e-12)
    assert_within_budget(got, truth(one))


def test_one_number_for_a_tensor_in_segments() -> None:
    """40 003 elements: two whole segments and the rest."""
    one = replace(
        job((40_003,), 3, ties(3)),
        calibration=RowCalibration(40_003, 1, granularity=Granularity.TENSOR),
    )
    mine, theirs, got, _ = both(one)
    assert mine.kept == theirs.kept
    torch.testing.assert_close(mine.coefficient, theirs.coefficient, rtol=2e-6, atol=0)
    assert_within_budget(got, truth(one))


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_memory_that_is_not_aligned(shift: int) -> None:
    """Views from any element on, and a slab of a larger tensor: the same bits."""
    n = 5003
    recipe = Recipe((0.5, 0.7), trim=Trim(TrimRule.RANDOM, (0.3, 0.6), seed=5), vote=Vote.MASS)
    whole = job((n,), 2, recipe, torch.float16)
    (want,) = ops.merge([replace(whole, out=(aligned := torch.empty(n).half()))], backend="torch")

    def moved(x: Tensor) -> Tensor:
        room = torch.zeros(n + shift, dtype=x.dtype)
        room[shift:] = x
        return room[shift:]

    out = moved(torch.zeros(n).half())
    one = replace(whole, base=moved(whole.base), experts=[moved(e) for e in whole.experts], out=out)
    (stats,) = ops.merge([one], backend="cuda")
    assert torch.equal(out, aligned) and stats.kept == want.kept
    part = slice(shift * 7, 4001)
    slab = replace(
        whole,
        base=whole.base[part],
        experts=[e[part] for e in whole.experts],
        out=torch.empty(part.stop - part.start).half(),
        offset=part.start,
        total=n,
    )
    ops.merge([slab], backend="cuda")
    assert torch.equal(slab.out, aligned[part])


def test_small_tensors_share_a_launch() -> None:
    sizes = [1, 8, 1000, 1024, 1025, 4096, 3]
    recipe = Recipe((0.3, 0.4, 0.2))
    jobs = [job((n,), 3, recipe, seed=n) for n in sizes]
    found = ops.merge(jobs, backend="cuda")
    for one, stats in zip(jobs, found, strict=True):
        assert_within_budget(one.out, truth(one))
        assert stats.kept == (one.out.numel(),) * 3 and stats.overflow == -1
    bad = job((1030,), 3, recipe)
    bad.experts[1][1029] = float("nan")
    jobs[2] = bad
    found = ops.merge(jobs, backend="cuda", nonfinite="propagate")
    assert [s.first_nonfinite for s in found].count((-1, -1, -1)) == len(sizes) - 1
    assert found[2].first_nonfinite == (-1, 1029, -1)


def test_the_first_bad_element_of_each_input_is_named() -> None:
    one = job((50, 97), 3, ties(3), torch.float32)
    one.experts[2].view(-1)[[4000, 17]] = float("inf")
    one.base.view(-1)[33] = float("nan")
    (stats,) = ops.merge([one], backend="cuda", nonfinite="propagate")
    assert stats.first_nonfinite == (-1, -1, 17) and stats.base_nonfinite == 33
    big = job((40,), 1, Recipe((4.0,)), torch.float16)
    big.experts[0][:] = 40000.0
    (stats,) = ops.merge([big], backend="cuda", nonfinite="propagate")
    assert stats.overflow == 0


@pytest.mark.parametrize("calibrated", [False, True])
def test_workspace_is_what_is_said(calibrated: bool) -> None:
    """The tensors that a merge takes beside inputs and output, against what was announced."""
    from magic_fast.ops.cuda.backend import CudaBackend

    one = job((128, 600), 8, ties(8))
    if calibrated:
        one = replace(one, calibration=RowCalibration(128, 600))
    announced = CudaBackend().workspace_bytes(one)
    taken = 0
    real = torch.zeros, torch.empty

    def counted(make: Any) -> Any:
        def call(*shape: Any, **how: Any) -> Tensor:
            nonlocal taken
            found: Tensor = make(*shape, **how)
            taken += found.numel() * found.element_size()
            return found

        return call

    torch.zeros, torch.empty = (counted(make) for make in real)
    try:
        ops.merge([one], backend="cuda")
    finally:
        torch.zeros, torch.empty = real
    assert taken <= announced <= 64 << 20
