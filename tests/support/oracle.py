"""The judge of every backend: float64 truth with decisions taken in float32, and its allowance.

Allowed: the largest error over the tensor of the same computation in plain torch float32, plus one
unit in the last place of the output dtype. No number is chosen by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from magic_fast.ops.job import Job
from magic_fast.recipe import RowCalibration, Variant
from magic_fast.reference import calibration as wsc
from magic_fast.reference import merge as reference


@dataclass
class Truth:
    """One job, computed exactly.

    Attributes:
        result: float64, before the rounding to the output dtype.
        budget: largest error of plain float32 over the tensor.
        decisions: masks, votes and winners (docs/methods.md defines them in float32).
        coefficient: raw ξ per row, float64, or None.
        coefficient_budget: largest relative error of plain float32 over the rows.
    """

    result: Tensor
    budget: float
    decisions: reference.Decisions
    coefficient: Tensor | None = None
    coefficient_budget: float = 0.0


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of ``dtype`` at |x|; x float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.ones_like(x), exponent) * info.eps


def _plain_rows(
    taus: list[Tensor], delta: Tensor, calibration: RowCalibration, usable: Tensor
) -> tuple[Tensor, Tensor]:
    """(raw ξ, factor) with every sum over a row in the tensors' own dtype."""
    t = torch.stack([wsc.row_view(x, calibration.axes) for x in taus], 1)
    d = wsc.row_view(delta, calibration.axes)
    p = calibration.p
    stats = wsc.RowStats(
        (t @ t.transpose(1, 2)).double(),
        (t @ d.unsqueeze(-1)).squeeze(-1).double(),
        d.square().sum(-1).double(),
        None if p == 2 else wsc.power_sums(t, p).double(),
        None if p == 2 else wsc.power_sums(d, p).double(),
    )
    raw = wsc.coefficient(stats, calibration)
    return raw, wsc.act(raw, calibration, usable=usable)[0]


def _calibrated(
    job: Job, delta: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(d after WSC, raw ξ, rows that the guards leave alone) with sums in float64."""
    if job.calibration is None:
        return delta, None, None
    taus = reference.task_vectors(job.base, job.experts, dtype)
    rows = wsc.calibrate_rows(taus, delta, job.calibration)
    return wsc.apply_rows(delta, rows.factor, job.calibration.axes), rows.raw, rows.repaired


def _plain(job: Job, decisions: reference.Decisions, repaired: Tensor | None) -> tuple[Tensor, ...]:
    """(base + d, raw ξ or empty) in plain float32."""
    dtype = reference.decision_dtype(job.base, job.experts)
    delta = reference.combine(job.base, job.experts, job.recipe, decisions, dtype=dtype)
    raw = torch.empty(0)
    if job.calibration is not None and repaired is not None:
        taus = reference.task_vectors(job.base, job.experts, dtype)
        usable = ~repaired[:1] if job.calibration.granularity == "tensor" else ~repaired
        if job.calibration.variant is Variant.SPECTRAL and job.calibration.granularity == "tensor":
            rows = wsc.calibrate_rows(taus, delta, job.calibration)
            raw, factor = rows.raw, rows.factor
        else:
            raw, factor = _plain_rows(taus, delta, job.calibration, usable)
            raw, factor = raw.expand(job.calibration.rows), factor.expand(job.calibration.rows)
        delta = wsc.apply_rows(delta, factor, job.calibration.axes)
    return (delta if job.base is None else job.base.to(dtype) + delta), raw


def truth(job: Job) -> Truth:
    """What the job gives, exactly, and how far plain float32 is from it."""
    decisions = reference.decide(
        job.base,
        job.experts,
        job.recipe,
        stream=job.stream,
        offset=job.offset,
        masks=job.masks,
        task_masks=job.task_masks,
        selection=job.selection,
    )
    double = torch.float64
    delta = reference.combine(job.base, job.experts, job.recipe, decisions, dtype=double)
    calibrated, raw, repaired = _calibrated(job, delta, double)
    exact = calibrated if job.base is None else job.base.double() + calibrated
    plain, plain_raw = _plain(job, decisions, repaired)
    error = (plain.double() - exact).abs()
    found = Truth(exact, float(error.max()) if error.numel() else 0.0, decisions, raw)
    if raw is not None and repaired is not None and bool((~repaired).any()):
        relative = ((plain_raw - raw) / raw).abs()[~repaired]
        found.coefficient_budget = float(relative.max())
    return found


def assert_within_budget(got: Tensor, found: Truth) -> None:
    """``got`` is the truth rounded to its dtype, within the budget."""
    assert tuple(got.shape) == tuple(found.result.shape)
    allowed = found.budget + ulp(found.result, got.dtype)
    error = (got.double() - found.result).abs()
    wrong = ~(error <= allowed)  # a NaN is wrong
    if bool(wrong.any()):
        worst = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements beyond the budget {found.budget:.3g}; "
            f"first at {worst}: got {got[worst].item()!r}, truth {found.result[worst].item()!r}"
        )
