"""Merges that differ in their trim and scale alone: task vectors formed once, Δ once for each trim,
and out = base + scale·Δ in one cheap pass for each scale.

On a backend that ``splits``, every step is one that the merge itself takes, in its order and
precision (τ, Δ and scale·Δ are float32 values there too), so the results are those of separate
merges, bit for bit but for the sign of a zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from magic_fast import ops
from magic_fast.engine.plan.memory import Slot, aligned
from magic_fast.ops.job import Job, Stats, View
from magic_fast.recipe import Recipe, Selection, TrimRule

LEAST = 1 << 16  # elements below which separate merges are as quick
_SLAB = 1 << 19  # elements that are worked on at a time
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


def unscaled(recipe: Recipe) -> Recipe:
    """The recipe without its scale: what decides thresholds, masks, votes and Δ."""
    return replace(recipe, scale=1.0)


def shares(job: Job) -> bool:
    """Whether this merge can be one of several that share their task vectors."""
    return (
        job.base is not None
        and job.calibration is None
        and job.directions is None
        and job.masks is None
        and job.task_masks is None
        and job.recipe.trim.rule is not TrimRule.RANKED  # ranks need rows, not slabs
        and job.recipe.reference_only is None
    )


def splits(backend: str) -> bool:
    """Whether the merges of a backend keep their bits in the steps above."""
    return ops.offers(ops.implementation(backend), "splits")


def worth_sharing(jobs: Sequence[Job]) -> bool:
    """Whether sharing costs less than it saves: a pass for τ, one for each trim and one for each
    output, against a merge for each output."""
    return len(jobs) >= 2 + len({unscaled(job.recipe) for job in jobs})


def merge_scales(
    jobs: Sequence[Job], selections: dict[Recipe, Selection], backend: str
) -> list[Stats] | None:
    """Runs jobs over the same base and experts.

    Args:
        jobs: each of which :func:`shares`; their arrays are views; recipes differ as they like.
        selections: by :func:`unscaled` recipe; those that are needed and missing are found and
            added.
        backend: name of one that ``splits``.

    Returns:
        What each job found; None where an input or a result is not finite: then nothing is
        promised of the outputs, and separate merges tell what is wrong.
    """
    first = jobs[0]
    base: View | None = first.base
    assert base is not None
    recipes = list(dict.fromkeys(unscaled(job.recipe) for job in jobs))
    for recipe in recipes:
        select_once(replace(first, recipe=recipe), selections, backend)
    count = base.numel
    slab = min(_SLAB, count)
    rows = len(first.experts) + len(recipes)
    slot = Slot(rows * aligned(4 * slab))
    for start in range(0, count, slab):
        n = min(slab, count - start)
        slot.reset()
        if not _slab(jobs, recipes, selections, slot, start, n, backend):
            return None
    return [
        Stats(
            selections.get(unscaled(job.recipe))
            or Selection.keep_everything(len(job.experts), count),
            backend=backend,
        )
        for job in jobs
    ]


def select_once(job: Job, selections: dict[Recipe, Selection], backend: str) -> Selection | None:
    """The selection of a job (None where it needs none), found once for each recipe."""
    recipe = unscaled(job.recipe)
    if not recipe.needs_select:
        return None
    if recipe not in selections:
        whole = replace(job, recipe=recipe, out=None, calibration=None)
        selections[recipe] = ops.select(whole, backend=backend)
    return selections[recipe]


def _slab(
    jobs: Sequence[Job],
    recipes: Sequence[Recipe],
    selections: Mapping[Recipe, Selection],
    slot: Slot,
    start: int,
    n: int,
    backend: str,
) -> bool:
    """Elements [start, start + n) of all jobs; whether everything in them was finite."""
    first = jobs[0]
    base = _part(first.base, start, n)
    total = first.total if first.total is not None else _numel(first)
    differences = [_scratch(slot, n) for _ in first.experts]
    deltas = {recipe: _scratch(slot, n) for recipe in recipes}
    minus = Recipe((1.0, -1.0))
    stages = [
        [
            Job(None, [_part(e, start, n), base], minus, tau)
            for e, tau in zip(first.experts, differences, strict=True)
        ],
        [
            Job(
                None,
                differences,
                recipe,
                delta,
                first.name,
                selection=selections.get(recipe),
                offset=first.offset + start,
                total=total,
            )
            for recipe, delta in deltas.items()
        ],
        [
            Job(
                None,
                [base, deltas[unscaled(job.recipe)]],
                Recipe((1.0, job.recipe.scale)),
                _part(job.out, start, n),
            )
            for job in jobs
        ],
    ]
    for stage in stages:
        for stats in ops.merge(stage, backend=backend, nonfinite="propagate"):
            if stats.overflow >= 0 or any(i >= 0 for i in stats.first_nonfinite):
                return False
    return True


def _numel(job: Job) -> int:
    first: View = job.experts[0]
    return first.numel


def _scratch(slot: Slot, n: int) -> View:
    address, data = slot.take(4 * n)
    return View(address, "F32", (n,), data)


def _part(array: View | None, start: int, n: int) -> View:
    assert array is not None
    return View(array.ptr + start * _SIZES[array.dtype], array.dtype, (n,), array.owner)
