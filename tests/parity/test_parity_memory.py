"""Slabs, strides, and what is not finite: the same on every backend, or refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import magic_fast as mf
from magic_fast import ops
from magic_fast.errors import BackendError
from magic_fast.ops.job import Job
from magic_fast.recipe import RowCalibration
from support.backends import backend_params
from support.cases import RECIPES, MergeCase

_WHOLE = ("ranked", "della", "consensus_given", "given_masks")


def _slab(job: Job, rows: slice, selection: ops.Selection | None) -> Job:
    """Some rows of a job, as a caller that streams would hand them over."""
    inner = math.prod(job.experts[0].shape[1:])
    assert job.out is not None
    cut = replace(
        job,
        base=None if job.base is None else job.base[rows],
        experts=[e[rows] for e in job.experts],
        out=job.out[rows],
        selection=selection,
        offset=rows.start * inner,
        total=job.experts[0].numel(),
    )
    if job.calibration is not None:
        cut.calibration = replace(job.calibration, rows=rows.stop - rows.start)
    return cut


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not any(w in r for w in _WHOLE)])
@pytest.mark.parametrize("backend", backend_params())
def test_slabs_give_the_same_bits(backend: str, recipe: str) -> None:
    """Thresholds from the whole tensor, then slabs that end inside Philox calls and tie groups."""
    job = MergeCase(recipe, "bf16", "matrix", 3, "ties").job()
    if job.recipe.trim.rule == "ranked":
        pytest.skip("ranks are of whole rows")
    rows = job.experts[0].shape[0]
    job.calibration = RowCalibration(rows, job.experts[0].shape[1])
    ops.merge([job], backend=backend)
    selection = ops.select(job, backend=backend) if job.recipe.needs_select else None
    assert job.out is not None
    in_slabs = replace(job, out=torch.empty_like(job.out))
    edges = [0, 1, 4, 5, rows]
    slabs = [_slab(in_slabs, slice(a, b), selection) for a, b in pairwise(edges)]
    ops.merge(slabs, backend=backend)
    assert torch.equal(in_slabs.out, job.out)


def _transposed() -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(7, 5, generator=g)
    return base, [base + torch.randint(-3, 4, (7, 5), generator=g) / 8 for _ in range(3)]


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs", "average"])
def test_strided_inputs_give_what_contiguous_ones_give(method: str) -> None:
    """Flat order is logical, row-major, whatever the strides: cuts and masks depend on it."""
    base, experts = _transposed()
    wanted = mf.merge(base, experts, method)

    def strided(x: torch.Tensor) -> torch.Tensor:
        return x.t().contiguous().t()

    strange = [strided(e) for e in experts]
    assert not strange[0].is_contiguous()
    assert torch.equal(mf.merge(strided(base), strange, method), wanted)
    assert torch.equal(mf.merge(base, strange, method), wanted)
    out = torch.empty(5, 7).t()
    mf.merge(base, experts, method, out=out)
    assert torch.equal(out, wanted)


def test_native_refuses_strides_by_name_and_the_choice_falls_back() -> None:
    base, experts = _transposed()
    status = {b.name: b for b in mf.backends()}
    if not status["native"].available:
        pytest.skip(f"backend native: {status['native'].reason}")
    strange = [e.t().contiguous().t() for e in experts]
    with pytest.raises(BackendError, match=r"native.*contiguous"):
        mf.merge(base, strange, backend="native")
    recipe = RECIPES["average_default"](3)
    stats = ops.merge([Job(base, strange, recipe, torch.empty(7, 5))])
    assert stats[0].backend == "torch"
    assert ops.merge([Job(base, experts, recipe, torch.empty(7, 5))])[0].backend == "native"


def _job(base: torch.Tensor | None, experts: list[torch.Tensor], dtype: torch.dtype) -> Job:
    recipe = RECIPES["average_default"](len(experts))
    return Job(base, experts, recipe, torch.empty(experts[0].shape, dtype=dtype), "w")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", backend_params())
def test_first_nonfinite_of_each_expert(backend: str, dtype: torch.dtype, bad: float) -> None:
    base = torch.zeros(3, 70_001, dtype=dtype)
    experts = [torch.zeros(3, 70_001, dtype=dtype) for _ in range(3)]
    experts[1].view(-1)[[5, 9]] = bad
    experts[2].view(-1)[200_000] = bad
    base.view(-1)[77_777] = bad
    (stats,) = ops.merge([_job(base, experts, dtype)], backend=backend, nonfinite="propagate")
    assert stats.first_nonfinite == (-1, 5, 200_000)
    assert stats.base_nonfinite == 77_777


@pytest.mark.parametrize("backend", backend_params())
def test_nonfinite_goes_through_on_request(backend: str) -> None:
    x = torch.tensor([1.0, math.nan, math.inf, -math.inf, 2.0])
    job = _job(None, [x, torch.ones(5)], torch.float32)
    ops.merge([job], backend=backend, nonfinite="propagate")
    assert job.out is not None
    assert torch.isnan(job.out[1])
    assert job.out[[0, 2, 3, 4]].tolist() == [1.0, math.inf, -math.inf, 1.5]


@pytest.mark.parametrize("backend", backend_params())
def test_overflow_of_the_output_dtype(backend: str) -> None:
    base = torch.zeros(4)
    experts = [torch.tensor([1.0, 2.0, 70_000.0, 80_000.0])]
    (stats,) = ops.merge(
        [_job(base, experts, torch.float16)], backend=backend, nonfinite="propagate"
    )
    assert stats.overflow == 2
    fits = [torch.tensor([65_519.0])]  # the last that rounds down to 65 504
    (stats,) = ops.merge([_job(None, fits, torch.float16)], backend=backend, nonfinite="propagate")
    assert stats.overflow == -1


@pytest.mark.parametrize("backend", backend_params())
def test_denormals_survive_and_a_negative_zero_is_a_zero(backend: str) -> None:
    x = torch.tensor([-0.0, 2.0**-149, -(2.0**-130), 0.0])
    job = _job(None, [x], torch.float32)
    ops.merge([job], backend=backend)
    assert job.out is not None
    assert job.out.tolist() == x.tolist()
    bf16 = torch.tensor([2.0**-133, -(2.0**-130)], dtype=torch.bfloat16)
    job = _job(None, [bf16], torch.bfloat16)
    ops.merge([job], backend=backend)
    assert job.out is not None
    assert job.out.tolist() == bf16.tolist()
