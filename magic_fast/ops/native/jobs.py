"""Jobs as the native core takes them: positional tuples of addresses, codes and prepared recipes.

``csrc/bindings/jobs.h`` lists the fields.
"""

from __future__ import annotations

from typing import Any

from magic_fast.ops.job import Array, Job
from magic_fast.ops.native.arrays import address_of, code_of, numel_of, pointers_of
from magic_fast.ops.native.plan import calibration_of, plan_of
from magic_fast.ops.native.results import RowResults
from magic_fast.recipe import Recipe, RowCalibration, TrimRule


def _rank_cols(job: Job, numel: int) -> int:
    """Elements that DELLA ranks together."""
    shape = job.experts[0].shape
    if len(shape) < 2:
        return numel
    return numel // int(shape[0]) if shape[0] else 0


class Call:
    """Recipes and calibrations prepared for one call: many jobs share them."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, int | None], Any] = {}
        self._calibrations: dict[int, Any] = {}
        self._alive: list[Any] = []  # keys are ids: what they name must not die before the call

    def plan(self, recipe: Recipe, total: int | None, *, count: int | None = None) -> Any:
        key = (id(recipe), total)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = plan_of(recipe, total, count=count)
            self._alive.append(recipe)
        return plan

    def calibration(self, c: RowCalibration | None) -> Any:
        if c is None:
            return None
        found = self._calibrations.get(id(c))
        if found is None:
            found = self._calibrations[id(c)] = calibration_of(c)
            self._alive.append(c)
        return found

    def job(
        self,
        job: Job,
        *,
        merged: Array | None = None,
        rows: RowResults | None = None,
        total: int | None = None,
    ) -> tuple[Any, ...]:
        """The positional tuple of ``job``. ``total`` overrides the job's, for counts that run over
        several tensors."""
        recipe, experts, base, out = job.recipe, job.experts, job.base, job.out
        numel = numel_of(experts[0])
        if total is None:
            total = numel if job.total is None else job.total
        selection, masks, task_masks = job.selection, job.masks, job.task_masks
        rule = recipe.trim.rule
        drawn = rule is TrimRule.RANDOM or rule is TrimRule.RANKED
        coefficient, repaired, norms2 = (0, 0, 0) if rows is None else rows.addresses
        return (
            self.plan(recipe, total if selection is None else None),
            numel,
            job.offset,
            total,
            _rank_cols(job, numel) if rule is TrimRule.RANKED else 0,
            job.stream if drawn else 0,
            address_of(base),
            0 if base is None else code_of(base),
            address_of(merged),
            0 if merged is None else code_of(merged),
            address_of(out),
            0 if out is None else code_of(out),
            *pointers_of(experts),
            # an empty tensor has no address, but is a mask
            None if not masks else tuple([m is not None and (address_of(m) or 1) for m in masks]),
            None if not task_masks else tuple([address_of(m) for m in task_masks]),
            self.calibration(job.calibration),
            coefficient,
            0,
            repaired,
            norms2,
            None
            if selection is None
            else (
                selection.threshold,
                selection.tie_cut,
                selection.top_threshold,
                selection.top_tie_cut,
                selection.factor,
                selection.majority,
                selection.weights,
                selection.alone,
                selection.score_cut,
                selection.score_top,
            ),
            0 if job.weights is None else job.weights.values.data_ptr(),
            0 if job.weights is None else job.weights.cols,
        )
