"""What the fused backends leave to PyTorch, and the rows they take by default."""

from __future__ import annotations

import math

from magic_fast.ops.job import Array, Job, View
from magic_fast.recipe import Granularity, RowCalibration, TrimRule
from magic_fast.recipe.codes import DTYPES


def default_rows(x: Array) -> RowCalibration:
    """Rows along the first axis; a 1-D tensor is [n, 1]."""
    rows = int(x.shape[0]) if len(x.shape) else 1
    return RowCalibration(rows, math.prod(x.shape) // rows if rows else 0)


def unfit_arrays(job: Job) -> str | None:
    """The reason no fused kernel takes the arrays of a job, or gives what is asked for; or None."""
    for array in (job.base, job.out, *job.experts):
        if array is None:
            continue
        if DTYPES[array.dtype] is None:
            return f"it takes float32, float16 and bfloat16, not {array.dtype}"
        if not is_contiguous(array):
            return "it takes contiguous tensors only"
    for masks in (job.masks, job.task_masks):
        if masks is not None and not all(m is None or is_contiguous(m) for m in masks):
            return "it takes contiguous masks only"
    return "it does not keep masks and votes" if job.details else None


def is_contiguous(array: Array) -> bool:
    return isinstance(array, View) or array.is_contiguous()


def unsupported(job: Job) -> str | None:
    """Why no fused kernel runs the job, in words; None where they do."""
    return job.recipe.reference_only or _rows_unsupported(job) or slab_unsupported(job)


def _rows_unsupported(job: Job) -> str | None:
    shape, c = job.experts[0].shape, job.calibration
    if job.recipe.trim.rank_dim1 and job.recipe.trim.rule is TrimRule.RANKED and len(shape) > 2:
        if math.prod(shape[2:]) != 1:
            return "ranks along dimension 1 alone of three or more are in the reference only"
    if job.recipe.needs_variance and job.recipe.needs_factors:
        return "norms before and after a trim by variance are found in the reference only"
    if c is None:
        return None
    if c.needs_tensors:
        return "the spectral calibration of a tensor needs its singular values"
    if c.axes != tuple(range(len(c.axes))):
        return "it calibrates rows along leading axes only"
    return None


def slab_unsupported(job: Job) -> str | None:
    """The reason a part of a tensor cannot be merged by itself, or None."""
    shape = job.experts[0].shape
    if job.total is None or job.total == math.prod(shape):
        return None
    if job.selection is None and job.recipe.needs_select:
        return "a part of a tensor needs a selection found over the whole"
    if job.recipe.trim.rule is TrimRule.RANKED and len(shape) < 2:
        return "ranks need whole rows"
    if job.calibration is not None and job.calibration.granularity is Granularity.TENSOR:
        return "the calibration of a whole tensor needs all of it at once"
    return None
