"""What can be said of a merge before it is computed: how large its inputs are, so its result."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from magic_fast import ops
from magic_fast.ops.job import Job, Stats
from magic_fast.ops.slabs import first_nonfinite
from magic_fast.recipe import Reduce, Rescale, Selection


def largest_input(job: Job) -> float:
    """The largest magnitude among the inputs of a job.

    Raises:
        NonFiniteError: one of them is NaN or infinite.
    """
    inputs = [*job.experts, *([] if job.base is None else [job.base])]
    found = [_magnitude(x) for x in inputs]
    if not all(math.isfinite(x) for x in found):
        places = [first_nonfinite(x) for x in inputs]
        k = len(job.experts)
        keep = Selection.keep_everything(k, job.experts[0].numel())
        bad = -1 if job.base is None else places[k]
        ops.raise_nonfinite(job, Stats(keep, None, (), tuple(places[:k]), bad))
    return max(found)


def _magnitude(x: Tensor) -> float:
    if not x.numel():
        return 0.0
    low, high = torch.aminmax(x)  # one read, nothing made; a NaN comes through
    return max(abs(float(low)), abs(float(high)))


def bound(job: Job, largest: float, *, is_recipe: bool) -> float:
    """No entry of the result exceeds this; infinity where nothing is known."""
    n, factor = job.experts[0].numel(), 1.0
    if job.calibration is not None:
        if job.calibration.clamp is None:
            return math.inf
        factor = max(1.0, abs(job.calibration.scale) * job.calibration.clamp[1])
    if not is_recipe:
        # No divisor of theirs is below 1e-12; as much again for parameters and calibration.
        return float(1e24 * n * factor * largest)
    recipe = job.recipe
    weights = [abs(w) for w in recipe.weights]
    if recipe.reduce is Reduce.WEIGHTED_MEAN:
        if min(recipe.weights) < 0:
            return math.inf  # the sum it divides by may nearly cancel
        weights = [1.0]  # a mean of the others, or (Σ w next to nothing) less
    if recipe.rescale is Rescale.KEEP_PROBABILITY:
        reach = recipe.trim.epsilon or (0.0,) * len(recipe.trim.density)
        pairs = zip(recipe.trim.density, reach, strict=True)
        factor /= min((q - e if q < 1 else 1.0 for q, e in pairs), default=1.0)
    elif recipe.rescale is not Rescale.NONE:
        factor *= max(1.0, n * largest / 1e-7)  # restored norms of less than 1e-7 are left alone
    if recipe.alone is not None:
        factor *= 1 + abs(recipe.alone.r) * recipe.alone.alpha
    return float(largest * (1 + 2 * sum(weights) * factor * abs(recipe.scale)))
