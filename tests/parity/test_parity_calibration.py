"""WSC on every backend against float64 truth, in the merge and on a tensor merged elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from magic_fast import ops
from magic_fast.errors import BackendError
from magic_fast.ops.job import Job
from magic_fast.reference import calibration as wsc
from magic_fast.reference import merge as reference
from support.backends import backend_params
from support.calibrations import CalibrationCase, calibration_cases
from support.oracle import assert_within_budget, truth

_CASES = [pytest.param(case, id=case.word) for case in dict.fromkeys(calibration_cases())]


def _coefficient(stats: ops.Stats) -> torch.Tensor:
    return torch.as_tensor(stats.coefficient).double().flatten()


def _assert_coefficient(got: torch.Tensor, raw: torch.Tensor, relative: float) -> None:
    """Raw ξ within plain float32's largest relative error and one ulp; NaN meets NaN."""
    assert got.shape == raw.shape
    special = ~torch.isfinite(raw)
    assert torch.equal(torch.isnan(got), torch.isnan(raw))
    assert torch.equal(got[special & ~torch.isnan(raw)], raw[special & ~torch.isnan(raw)])
    error = ((got - raw).abs() / raw.abs())[~special]
    assert bool((error <= relative + 2.0**-23).all()), float(error.max())


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("backend", backend_params())
def test_calibrated_merge(backend: str, case: CalibrationCase) -> None:
    job = case.job()
    try:
        (stats,) = ops.merge([job], backend=backend)
    except BackendError as refusal:
        if backend == "torch":
            raise
        pytest.skip(str(refusal))
    found = truth(job)
    assert found.coefficient is not None
    assert_within_budget(job.out, found)
    _assert_coefficient(_coefficient(stats), found.coefficient, found.coefficient_budget)


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("backend", backend_params())
def test_calibration_of_a_tensor_merged_elsewhere(backend: str, case: CalibrationCase) -> None:
    if case.mix == "f64":
        pytest.skip("float64 truth is no judge of float64 sums in another order")
    job = case.job()
    plain = replace(job, calibration=None, out=torch.empty_like(job.experts[0]))
    ops.merge([plain], backend="torch")
    merged = plain.out
    try:
        stats = ops.calibrate(job, merged, backend=backend)
    except BackendError as refusal:
        if backend == "torch":
            raise
        pytest.skip(str(refusal))
    # the same job with Δ given: one expert more, of weight 1, that the statistics leave out
    as_merge = _merging_only(job, merged)
    found = truth(as_merge)
    assert found.coefficient is not None
    assert_within_budget(job.out, found)
    _assert_coefficient(_coefficient(stats), found.coefficient, found.coefficient_budget)


def _merging_only(job: Job, merged: torch.Tensor) -> Job:
    """A job whose Δ is ``merged − base`` and whose ξ comes from the experts of ``job``."""
    assert job.calibration is not None
    k = len(job.experts)
    recipe = type(job.recipe)(weights=(0.0,) * k + (1.0,))
    included = (*(job.calibration.included or (True,) * k), False)
    return replace(
        job,
        experts=[*job.experts, merged],
        recipe=recipe,
        calibration=replace(job.calibration, included=included),
    )


@pytest.mark.parametrize("layout", ["matrix", "wide", "column", "conv"])
@pytest.mark.parametrize("mix", ["f32", "bf16", "mixed"])
@pytest.mark.parametrize("backend", backend_params())
def test_row_stats(backend: str, mix: str, layout: str) -> None:
    job = CalibrationCase(mix=mix, layout=layout).job()
    assert job.calibration is not None and job.base is not None
    merged = sum(e.float() for e in job.experts).div(len(job.experts)).to(job.base.dtype)
    try:
        got = ops.row_stats(job, merged, backend=backend)
    except BackendError as refusal:
        if backend == "torch":
            raise
        pytest.skip(str(refusal))
    double, axes = torch.float64, job.calibration.axes
    views = [
        wsc.row_view(t, axes)
        for t in reference.task_vectors(job.base, [*job.experts, merged], double)
    ]
    exact = wsc.row_stats(views[:-1], views[-1])
    narrow = [v.float() for v in views]
    stacked = torch.stack(narrow[:-1], 1)
    plain = (
        stacked @ stacked.transpose(1, 2),
        (stacked @ narrow[-1].unsqueeze(-1)).squeeze(-1),
        narrow[-1].square().sum(-1),
    )
    for found, want, float32 in zip(got, (exact.gram, exact.dots, exact.norm2), plain, strict=True):
        budget = (float32.double() - want).abs().max()
        # float32 differences already differ from float64 ones by half a unit in the last place
        allowed = budget + want.abs() * 2.0**-23
        assert bool(((torch.as_tensor(found).double() - want).abs() <= allowed).all())
