"""Calibrations that are plain functions of row sums, around any backend that merges.

The backend forms τ_k and Δ in float32, some rows at a time, in the steps of its fused loops; it
gives the sums of rows if it can, else PyTorch does; the function makes ξ of them; the backend adds
the base to factor·Δ, rounded once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from magic_fast.ops.backend import Backend, Capable, merge_many
from magic_fast.ops.job import Array, Job, Stats, View
from magic_fast.ops.slabs import first_nonfinite, join_slabs, slabs_of
from magic_fast.recipe import Granularity, Recipe, RowCalibration, Selection, TrimRule
from magic_fast.reference import calibration as wsc
from magic_fast.reference.combine import decision_dtype
from magic_fast.reference.row_sums import whole_tensor

_BLOCK_ELEMENTS = 1 << 19  # of a tensor that are worked on at a time, in whole rows
_MINUS, _PLUS, _ONE = Recipe((1.0, -1.0)), Recipe((1.0, 1.0)), Recipe((1.0,))
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass
class _Block:
    """Some rows of a job, and what is known of them.

    Attributes:
        job: the rows; the model merged elsewhere, if any, is its last expert.
        change: Δ of these rows, float32 (float64 of float64 inputs), contiguous.
        sums: of the raw task vectors and Δ.
        found: NaN, infinity, and the entries kept.
    """

    job: Job
    change: Tensor
    sums: wsc.RowStats
    found: Stats


class ByRowSums:
    """A backend, with calibrations that are functions of row sums."""

    def __init__(self, backend: Backend) -> None:
        self._backend = cast(Capable, backend)  # what is optional is called where it is offered
        self.name = backend.name

    def why_not(self) -> str | None:
        return self._backend.why_not()

    def supports(self, job: Job) -> str | None:
        return self._backend.supports(replace(job, calibration=None))

    def select(self, job: Job) -> Selection:
        return self._backend.select(replace(job, calibration=None))

    def merge_many(self, jobs: Sequence[Job]) -> list[Stats]:
        return [self.merge(job) for job in jobs]

    def merge(self, job: Job) -> Stats:
        job = _on_tensors(job)
        if job.selection is None and job.recipe.needs_select:
            job = replace(job, selection=self.select(job))
        return self._run(job, given=False)

    def calibrate(self, job: Job, merged: Array) -> Stats:
        """WSC of a tensor merged elsewhere: base + factor[row]·(merged − base); rows whose factor
        is 1 keep the merged values."""
        job = _on_tensors(replace(job, experts=[*job.experts, merged]))
        stats = self._run(job, given=True)
        stats.kept = ()
        return stats

    def _run(self, job: Job, *, given: bool) -> Stats:
        """``given``: the last expert is the model merged elsewhere."""
        c = job.calibration
        assert c is not None
        blocks = slabs_of(job, _row_ranges(job), job.selection or _everything(job))
        tensor = None
        if c.granularity is Granularity.TENSOR and len(blocks) > 1:
            parts = [whole_tensor(self._block(b, given).sums, 2) for b in blocks]
            total = wsc.RowStats(
                torch.cat([p.gram for p in parts]).sum(0, keepdim=True),
                torch.cat([p.dots for p in parts]).sum(0, keepdim=True),
                torch.cat([p.norm2 for p in parts]).sum(0, keepdim=True),
            )
            tensor = wsc.calibrate_stats(total, c)
        done = [(b, self._finished(self._block(b, given), tensor, given)) for b in blocks]
        stats = join_slabs(done)
        stats.selection = job.selection or stats.selection
        stats.extra["norms2"] = sum(s.extra["norms2"] for _, s in done)
        return _moved(stats, job.offset)

    def _block(self, job: Job, given: bool) -> _Block:
        """Forms the task vectors and Δ of some rows, and their sums."""
        dtype = decision_dtype(job.base, job.experts)
        found = Stats(_everything(job))
        if job.base is None:
            taus = [x.to(dtype).contiguous() for x in job.experts]
            found.first_nonfinite = tuple(map(first_nonfinite, job.experts))
        else:
            taus = [torch.empty(x.shape, dtype=dtype, device=x.device) for x in job.experts]
            pairs = [
                Job(None, [x, job.base], _MINUS, tau, job.name)
                for x, tau in zip(job.experts, taus, strict=True)
            ]
            parts = merge_many(self._backend, pairs)
            found.first_nonfinite = tuple(part.first_nonfinite[0] for part in parts)
            found.base_nonfinite = max(part.first_nonfinite[1] for part in parts)
        if given:
            change = taus.pop()
            found.kept = (0,) * len(job.experts)
        else:
            change = torch.empty_like(taus[0])
            plain = replace(job, base=None, experts=taus, out=change, calibration=None)
            found.kept = self._backend.merge(plain).kept
        return _Block(job, change, self._sums(job, taus, change), found)

    def _sums(self, job: Job, taus: Sequence[Tensor], change: Tensor) -> wsc.RowStats:
        c = job.calibration
        assert c is not None
        by_backend = getattr(self._backend, "row_stats", None)
        if by_backend is None:
            shape = (c.rows, c.cols)
            return wsc.row_stats([t.view(shape) for t in taus], change.view(shape))
        view = RowCalibration(c.rows, c.cols, c.axes)
        one = Job(None, taus, Recipe((1.0,) * len(taus)), name=job.name, calibration=view)
        return wsc.RowStats(*(torch.as_tensor(x) for x in by_backend(one, change)))

    def _finished(self, block: _Block, tensor: wsc.CalibratedRows | None, given: bool) -> Stats:
        """Writes the rows of a block. ``tensor``: ξ of the whole tensor, or None: of the rows."""
        job, stats = block.job, block.found
        c, out = job.calibration, job.out
        assert c is not None and out is not None
        rows = tensor or wsc.calibrate_stats(block.sums, c)
        rows = wsc.CalibratedRows(
            rows.raw[:1].expand(c.rows) if tensor else rows.raw,
            rows.factor[:1].expand(c.rows) if tensor else rows.factor,
            rows.repaired[:1].expand(c.rows) if tensor else rows.repaired,
            block.sums,
        )
        keeps = rows.factor == 1
        if not bool(keeps.all()):
            block.change.view(c.rows, c.cols).mul_(rows.factor.to(block.change.dtype)[:, None])
        last = [block.change] if job.base is None else [job.base, block.change]
        stats.overflow = self._backend.merge(
            Job(None, last, _ONE if job.base is None else _PLUS, out, job.name)
        ).overflow
        if given and bool(keeps.any()):
            out.view(c.rows, c.cols)[keeps] = (
                job.experts[-1].reshape(c.rows, c.cols)[keeps].to(out.dtype)
            )
        stats.coefficient = rows.raw.float()
        stats.extra = {"repaired": rows.repaired, "norms2": wsc.norms2(rows)}
        return stats


def _row_ranges(job: Job) -> list[slice]:
    """The first axis in blocks of whole rows; one block if ranks need all of a 1-D tensor."""
    first, n = job.experts[0].shape[0], job.experts[0].numel()
    ranked = job.recipe.trim.rule is TrimRule.RANKED and job.experts[0].dim() == 1
    step = first if ranked else max(1, _BLOCK_ELEMENTS * first // n)
    return [slice(r, min(r + step, first)) for r in range(0, first, step)]


def _everything(job: Job) -> Selection:
    return Selection.keep_everything(len(job.experts), job.experts[0].numel())


def _moved(stats: Stats, offset: int) -> Stats:
    """The same with its indices in the whole tensor, of which the job is a part from ``offset``."""

    def moved(index: int) -> int:
        return index + offset if index >= 0 else index

    stats.first_nonfinite = tuple(map(moved, stats.first_nonfinite))
    stats.base_nonfinite, stats.overflow = moved(stats.base_nonfinite), moved(stats.overflow)
    return stats


def _on_tensors(job: Job) -> Job:
    """The job with tensors over its borrowed memory."""

    def every(arrays: Sequence[Any] | None) -> list[Any] | None:
        return None if arrays is None else [_tensor(a) for a in arrays]

    return replace(
        job,
        base=_tensor(job.base),
        experts=every(job.experts) or (),
        out=_tensor(job.out),
        masks=every(job.masks),
        task_masks=every(job.task_masks),
    )


def _tensor(array: Array | None) -> Any:
    """A tensor over borrowed memory, which its owner keeps alive; tensors as they are."""
    if not isinstance(array, View):
        return array
    dtype = _DTYPES[array.dtype]
    memory = (ctypes.c_char * (array.numel * dtype.itemsize)).from_address(array.ptr)
    return torch.frombuffer(memory, dtype=dtype).view(array.shape)
