"""Jobs as the native core takes them: addresses, codes and prepared recipes, by name.

``csrc/bindings/jobs.h`` lists the names, and refuses others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from magic_fast.ops.job import Array, Job
from magic_fast.ops.native.arrays import address_of, code_of, numel_of, pointers_of
from magic_fast.ops.native.plan import calibration_of, plan_of
from magic_fast.ops.native.results import RowResults
from magic_fast.recipe import Recipe, RowCalibration, TrimRule

if TYPE_CHECKING:
    from magic_fast._native import JobFields

_DRAWN = (TrimRule.RANDOM, TrimRule.RANKED)  # a look-up in an enum each time is slow


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

    def calibration(self, c: RowCalibration) -> Any:
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
    ) -> JobFields:
        """The fields of ``job`` that act. ``total`` overrides the job's, for counts that run over
        several tensors."""
        recipe, base, out, selection = job.recipe, job.base, job.out, job.selection
        numel = numel_of(job.experts[0])
        if total is None:
            total = numel if job.total is None else job.total
        addresses, codes = pointers_of(job.experts)
        fields: JobFields = {
            "plan": self.plan(recipe, total if selection is None else None),
            "numel": numel,
            "offset": job.offset,
            "total": total,
            "experts": addresses,
            "expert_dtypes": codes,
        }
        rule = recipe.trim.rule
        if rule in _DRAWN:
            fields["stream"] = job.stream
            if rule is TrimRule.RANKED:
                fields["rank_cols"] = _rank_cols(job, numel)
        if base is not None:
            fields["base"] = address_of(base)
            fields["base_dtype"] = code_of(base)
        if merged is not None:
            fields["merged"] = address_of(merged)
            fields["merged_dtype"] = code_of(merged)
        if out is not None:
            fields["out"] = address_of(out)
            fields["out_dtype"] = code_of(out)
        if job.masks:  # an empty tensor has no address, but is a mask
            fields["masks"] = tuple([m is not None and (address_of(m) or 1) for m in job.masks])
        if job.task_masks:
            fields["task_masks"] = tuple([address_of(m) for m in job.task_masks])
        if job.calibration is not None:
            fields["calibration"] = self.calibration(job.calibration)
        if rows is not None:
            fields["coefficient"], fields["repaired"], fields["norms2"] = rows.addresses
        if selection is not None:
            fields["selection"] = selection
        if job.weights is not None:
            fields["weights"] = job.weights.values.data_ptr()
            fields["weight_cols"] = job.weights.cols
        return fields
