"""Jobs as the native core takes them: positional tuples of addresses, codes and prepared recipes.

``csrc/bindings/jobs.h`` lists the fields. Only addresses go down, so torch is never imported
here for a caller that has none.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

from magic_fast.ops.job import Array, Job, View
from magic_fast.recipe import (
    Contributors,
    Direction,
    EpsMode,
    Granularity,
    Recipe,
    Reduce,
    Rescale,
    RowCalibration,
    TieRule,
    Trim,
    TrimRule,
    Variant,
    Vote,
    VoteOn,
    Weigh,
    ZeroVote,
)

try:
    from magic_fast import _native
except ImportError as error:  # remembered: the backend tells it
    missing: str | None = str(error)
else:
    missing = None

_WORDS = {
    "F32": 0,
    "F16": 1,
    "BF16": 2,
    "torch.float32": 0,
    "torch.float16": 1,
    "torch.bfloat16": 2,
}
_codes: dict[Any, int | None] = {}  # dtype object or word -> code

_NONE, _BAND, _RANDOM, _RANKED, _GIVEN, _ABOVE, _VARIANCE = range(7)
_WITHOUT_COUNTS = {TrimRule.THRESHOLD: _ABOVE, TrimRule.VARIANCE: _VARIANCE}
_TIE_RULES = {TieRule.EXACT: 0, TieRule.KEEP_ALL: 1, TieRule.DROP_ALL: 2}
_RESCALES = {
    Rescale.NONE: 0,
    Rescale.KEEP_PROBABILITY: 0,
    Rescale.L1: 1,
    Rescale.L2: 2,
    Rescale.LINF: 3,
}
_VOTES = {Vote.NONE: 0, Vote.MASS: 1, Vote.COUNT: 2}
_VOTES_ON = {VoteOn.WEIGHTED: 0, VoteOn.UNWEIGHTED: 1}
_ZERO_VOTES = {
    ZeroVote.POSITIVE: 0,
    ZeroVote.NEGATIVE: 1,
    ZeroVote.MAJORITY: 2,
    ZeroVote.DROP: 3,
}
_CONTRIBUTORS = {Contributors.AGREEING: 0, Contributors.NONZERO: 1, Contributors.ALL: 2}
_REDUCES = {Reduce.SUM: 0, Reduce.MEAN: 1, Reduce.WEIGHTED_MEAN: 2, Reduce.MAX: 3}
_VARIANTS = {
    Variant.MANIFOLD: 0,
    Variant.MANIFOLD_EXACT: 1,
    Variant.SPHERE: 2,
    Variant.SPECTRAL: 2,  # per row: the singular value of a row is its norm
}
_EPS_MODES = {EpsMode.ABSOLUTE: 0, EpsMode.RELATIVE: 1, EpsMode.NONE: 2}
_DIRECTIONS = {Direction.FREE: 0, Direction.GROW: 1, Direction.SHRINK: 2}


# ---- arrays ----
def code_of(array: Array) -> int | None:
    """Dtype code of the C surface, or None."""
    dtype = array.dtype
    try:
        return _codes[dtype]
    except KeyError:
        _codes[dtype] = code = _WORDS.get(str(dtype))
        return code


def address_of(array: Array | None) -> int:
    """Address of the first element; 0 for None."""
    if array is None:
        return 0
    address: int = array.ptr if isinstance(array, View) else array.data_ptr()
    return address


def numel_of(array: Array) -> int:
    n: int = array.numel if isinstance(array, View) else array.numel()
    return n


def _pointers(arrays: Sequence[Array]) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """Addresses and dtype codes: what a batch of small tensors spends its time on in Python."""
    if any([type(a) is View for a in arrays]):
        return tuple([address_of(a) for a in arrays]), tuple([code_of(a) for a in arrays])
    try:
        codes = tuple([_codes[a.dtype] for a in arrays])
    except KeyError:
        codes = tuple([code_of(a) for a in arrays])
    return tuple([a.data_ptr() for a in arrays]), codes


def is_contiguous(array: Array) -> bool:
    return isinstance(array, View) or array.is_contiguous()


def doubles(like: Array, *shape: int) -> tuple[Any, int]:
    """A float64 array of ``shape`` and its address: a torch tensor for torch callers, else a
    memoryview."""
    if not isinstance(like, View):
        import torch

        tensor = torch.empty(shape, dtype=torch.float64)
        return tensor, tensor.data_ptr()
    values = array("d", bytes(8 * math.prod(shape)))
    view = memoryview(values).cast("B")
    return view.cast("d", shape) if math.prod(shape) else view, values.buffer_info()[0]


# ---- recipes as plain numbers ----
def _trim_counts(trim: Trim, k: int, n: int | None) -> tuple[int, int, int]:
    """(kind, count, top_count) of expert ``k`` among ``n`` elements. ``n`` None: a selection is
    given, the counts do not matter."""
    if not trim.active(k) or trim.rule is TrimRule.GIVEN:
        return _NONE, 0, -1
    if trim.rule is TrimRule.RANDOM:
        return _RANDOM, 0, -1
    if trim.rule is TrimRule.RANKED:
        return _RANKED, 0, -1
    if trim.rule is TrimRule.COMPETE:  # its bounds are looked for as those of a band
        return (_BAND, *trim.tail_ranks(n)) if n else (_NONE, 0, -1)
    if trim.rule in (TrimRule.THRESHOLD, TrimRule.VARIANCE):
        return _NONE if n == 0 else _WITHOUT_COUNTS[trim.rule], 0, -1
    if n is None:
        return _BAND, 0, 0 if trim.rule is TrimRule.BAND else -1
    if n == 0:
        return _NONE, 0, -1
    if trim.rule is TrimRule.BAND:
        top, kept = trim.band_counts(k, n)
        return (_BAND, top + kept, top) if kept else (_BAND, 0, 0)
    if trim.tie_rule is TieRule.DROP_ALL:
        dropped = math.trunc(float(n) * (1.0 - trim.density[k]))
        return (_BAND, n - dropped + 1, -1) if dropped else (_NONE, 0, -1)
    return _BAND, trim.kept_count(k, n), -1


def plan_of(recipe: Recipe, total: int | None, *, count: int | None = None) -> Any:
    """The recipe for tensors of ``total`` elements (None: thresholds are given), as the C surface
    takes it. ``count``: keep so many of the largest, whatever the recipe's trim."""
    trim, consensus = recipe.trim, recipe.consensus
    experts = []
    for k, weight in enumerate(recipe.weights):
        kind, kept, top = _BAND, count, -1
        if count is None:
            kind, kept, top = _trim_counts(trim, k, total)
        density = float(trim.density[k]) if trim.density else 1.0
        drops = (
            trim.rule not in (TrimRule.GIVEN, TrimRule.COMPETE) and trim.active(k) and total != 0
        )
        restored = 1.0 / density if recipe.rescale is Rescale.KEEP_PROBABILITY else 1.0
        experts.append(
            {
                "weight": weight,
                "trim": kind,
                "count": kept,
                "top_count": top,
                "density": density,
                "epsilon": float(trim.epsilon[k]) if trim.epsilon else 0.0,
                "threshold": float(trim.epsilon[k]) if kind == _ABOVE else 0.0,
                "random_bound": math.floor(density * 2.0**32) if kind == _RANDOM else 0,
                "lambda": consensus.lambdas[k] if consensus and not consensus.given else 0.0,
                "factor": restored if drops else 1.0,
                "given_factor": restored,
            }
        )
    fields = {
        "tie_rule": _TIE_RULES[trim.tie_rule],
        "rescale": _RESCALES[recipe.rescale],
        "vote": _VOTES[recipe.vote],
        "vote_on": _VOTES_ON[recipe.vote_on],
        "zero_vote": _ZERO_VOTES[recipe.zero_vote],
        "contributors": _CONTRIBUTORS[recipe.contributors],
        "reduce": _REDUCES[recipe.reduce],
        "consensus": 0 if consensus is None else 2 if consensus.given else 1,
        "min_tasks": 0 if consensus is None else consensus.min_tasks,
        "least": recipe.least,
        "alone": int(recipe.alone is not None),
        "limited": int(recipe.limit is not None),
        "competes": int(recipe.weigh is Weigh.SCORE),
        "limit": recipe.limit or 0.0,
        "scale": recipe.scale,
        "seed": trim.seed,
    }
    return _native.Plan(fields, experts)


def _calibration_of(c: RowCalibration) -> Any:
    return _native.Calibration(
        c.rows,
        c.cols,
        _VARIANTS[c.variant],
        c.granularity is Granularity.TENSOR,
        2.0 if c.variant is Variant.SPECTRAL else float(c.p),
        _EPS_MODES[c.eps_mode],
        c.guards,
        c.clamp,
        c.strength,
        c.scale,
        _DIRECTIONS[c.direction],
        c.included,
    )


def _rank_cols(job: Job, numel: int) -> int:
    """Elements that DELLA ranks together."""
    shape = job.experts[0].shape
    if len(shape) < 2:
        return numel
    return numel // int(shape[0]) if shape[0] else 0


class RowResults:
    """What calibration says of the rows of one tensor, filled in by the native core.

    Attributes:
        coefficient: raw ξ, float32 [rows].
        repaired: 1 where the guards left the row alone, [rows].
        norms2: float64 [K + 2], see ``Stats.extra``.
    """

    def __init__(self, rows: int, num_experts: int) -> None:
        self.coefficient = array("f", bytes(4 * rows))
        self.repaired = array("B", bytes(rows))
        self.norms2 = array("d", bytes(8 * (num_experts + 2)))

    @property
    def addresses(self) -> tuple[int, int, int]:
        return (
            self.coefficient.buffer_info()[0],
            self.repaired.buffer_info()[0],
            self.norms2.buffer_info()[0],
        )

    def extra(self) -> dict[str, Any]:
        """``Stats.extra``."""
        *own, before, after = self.norms2
        mean = sum(math.sqrt(x) for x in own) / len(own)
        known = mean > 0
        return {
            "repaired": self.repaired,
            "norms2": self.norms2,
            "magnitude_before": math.sqrt(before) / mean if known else None,
            "magnitude_after": math.sqrt(after) / mean if known else None,
        }


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
            found = self._calibrations[id(c)] = _calibration_of(c)
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
            *_pointers(experts),
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
