"""A job cut into blocks of rows, and what was found of them joined again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magic_fast.ops.job import Job, Stats
from magic_fast.recipe import Selection
from magic_fast.reference import calibration as wsc


def first_nonfinite(x: Tensor) -> int:
    """Flat index of the first NaN or infinity, −1 if there is none."""
    finite = torch.isfinite(x)
    if bool(finite.all()):
        return -1
    return int((~finite).flatten().nonzero()[0])


def slabs_of(job: Job, slabs: Sequence[slice], selection: Selection) -> list[Job]:
    """The job cut along its first axis, the thresholds of the whole tensor given."""
    total = job.experts[0].numel() if job.total is None else job.total
    inner = job.experts[0].numel() // job.experts[0].shape[0]

    def cut(arrays: Sequence[Any] | None, rows: slice) -> list[Any] | None:
        return None if arrays is None else [None if a is None else a[rows] for a in arrays]

    jobs = []
    for rows in slabs:
        calibration = job.calibration
        if calibration is not None:
            share = calibration.rows // job.experts[0].shape[0]
            calibration = replace(calibration, rows=(rows.stop - rows.start) * share)
        jobs.append(
            replace(
                job,
                base=None if job.base is None else job.base[rows],
                experts=cut(job.experts, rows) or (),
                out=None if job.out is None else job.out[rows],
                masks=cut(job.masks, rows),
                task_masks=cut(job.task_masks, rows),
                calibration=calibration,
                selection=selection,
                offset=job.offset + rows.start * inner,
                total=total,
            )
        )
    return jobs


def join_slabs(parts: Sequence[tuple[Job, Stats]]) -> Stats:
    """Statistics of a whole tensor from those of its slabs, in order."""
    start = parts[0][0].offset

    def first(indices: Sequence[int]) -> int:
        for (slab, _), index in zip(parts, indices, strict=True):
            if index >= 0:
                return slab.offset - start + index
        return -1

    stats = [s for _, s in parts]
    experts = range(len(parts[0][0].experts))
    joined = Stats(
        selection=stats[0].selection,
        kept=tuple(sum(s.kept[k] for s in stats) for k in experts),
        first_nonfinite=tuple(first([s.first_nonfinite[k] for s in stats]) for k in experts),
        base_nonfinite=first([s.base_nonfinite for s in stats]),
        overflow=first([s.overflow for s in stats]),
    )
    if parts[0][0].calibration is not None:
        joined.coefficient = torch.cat([s.coefficient for s in stats])
        joined.extra["repaired"] = torch.cat([s.extra["repaired"] for s in stats])
        norms = sum(s.extra["norms2"] for s in stats)
        joined.extra |= wsc.magnitude_of(norms)
    return joined
