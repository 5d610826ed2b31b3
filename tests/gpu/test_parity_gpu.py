"""The parity grid on a GPU: the tensors of each case moved there, judged by the same oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from magic_fast import ops
from magic_fast.errors import BackendError
from magic_fast.ops.job import Job
from support.calibrations import CalibrationCase, calibration_cases
from support.cases import MergeCase, is_quick, merge_cases
from support.oracle import assert_within_budget, truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
]

_CASES = [c for c in dict.fromkeys(merge_cases()) if is_quick(c) and c.mix != "f64"]
_CALIBRATED = [c for c in dict.fromkeys(calibration_cases()) if c.mix != "f64"]


def moved(job: Job, device: str) -> Job:
    """The job with every tensor on ``device``."""

    def to(x: Any) -> Any:
        return None if x is None else x.to(device)

    return replace(
        job,
        base=to(job.base),
        experts=[to(e) for e in job.experts],
        out=to(job.out),
        masks=None if job.masks is None else [to(m) for m in job.masks],
        task_masks=None if job.task_masks is None else [to(m) for m in job.task_masks],
    )


def check(case: MergeCase | CalibrationCase, backend: str, device: str) -> None:
    """One case on ``device``: values within the budget, counts exact, the same bits twice."""
    job = case.job()
    there = moved(job, device)
    try:
        (stats,) = ops.merge([there], backend=backend)
    except BackendError as refusal:
        pytest.skip(str(refusal))
    assert there.out is not None
    found = truth(job)
    assert_within_budget(there.out.cpu(), found)
    assert stats.kept == tuple(
        e.numel() if m is None else int(m.sum())
        for e, m in zip(job.experts, found.decisions.keep, strict=True)
    )
    again = replace(there, out=torch.empty_like(there.out))
    ops.merge([again], backend=backend)
    assert torch.equal(there.out, again.out)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", _CASES, ids=lambda c: c.word)
def test_merge_on_a_gpu(case: MergeCase, backend: str) -> None:
    check(case, backend, "cuda")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", _CALIBRATED, ids=lambda c: c.word)
def test_calibrated_merge_on_a_gpu(case: CalibrationCase, backend: str) -> None:
    check(case, backend, "cuda")
