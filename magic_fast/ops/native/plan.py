"""Recipes and calibrations as the native core takes them: plain numbers, prepared once."""

from __future__ import annotations

import math
from typing import Any

from magic_fast.recipe import (
    Granularity,
    Recipe,
    Rescale,
    RowCalibration,
    TieRule,
    Trim,
    TrimRule,
    Variant,
    Weigh,
    codes,
)
from magic_fast.recipe.codes import CpuTrim

try:
    from magic_fast import _native
except ImportError as error:  # remembered: the backend tells it
    missing: str | None = str(error)
else:
    missing = None

_WITHOUT_COUNTS = {TrimRule.THRESHOLD: CpuTrim.ABOVE, TrimRule.VARIANCE: CpuTrim.VARIANCE}


def _trim_counts(trim: Trim, k: int, n: int | None) -> tuple[int, int, int]:
    """(kind, count, top_count) of expert ``k`` among ``n`` elements. ``n`` None: a selection is
    given, the counts do not matter."""
    if not trim.active(k) or trim.rule is TrimRule.GIVEN:
        return CpuTrim.NONE, 0, -1
    if trim.rule is TrimRule.RANDOM:
        return CpuTrim.RANDOM, 0, -1
    if trim.rule is TrimRule.RANKED:
        return CpuTrim.RANKED, 0, -1
    if trim.rule is TrimRule.COMPETE:  # its bounds are looked for as those of a band
        return (CpuTrim.BAND, *trim.tail_ranks(n)) if n else (CpuTrim.NONE, 0, -1)
    if trim.rule in (TrimRule.THRESHOLD, TrimRule.VARIANCE):
        return CpuTrim.NONE if n == 0 else _WITHOUT_COUNTS[trim.rule], 0, -1
    if n is None:
        return CpuTrim.BAND, 0, 0 if trim.rule is TrimRule.BAND else -1
    if n == 0:
        return CpuTrim.NONE, 0, -1
    if trim.rule is TrimRule.BAND:
        top, kept = trim.band_counts(k, n)
        return (CpuTrim.BAND, top + kept, top) if kept else (CpuTrim.BAND, 0, 0)
    if trim.tie_rule is TieRule.DROP_ALL:
        dropped = trim.drop_count(k, n)
        return (CpuTrim.BAND, n - dropped + 1, -1) if dropped else (CpuTrim.NONE, 0, -1)
    return CpuTrim.BAND, trim.kept_count(k, n), -1


def plan_of(recipe: Recipe, total: int | None, *, count: int | None = None) -> Any:
    """The recipe for tensors of ``total`` elements (None: thresholds are given), as the C surface
    takes it. ``count``: keep so many of the largest, whatever the recipe's trim."""
    trim, consensus = recipe.trim, recipe.consensus
    experts = []
    for k, weight in enumerate(recipe.weights):
        kind, kept, top = CpuTrim.BAND, count, -1
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
                "threshold": float(trim.epsilon[k]) if kind == CpuTrim.ABOVE else 0.0,
                "random_bound": math.floor(density * 2.0**32) if kind == CpuTrim.RANDOM else 0,
                "lambda": consensus.lambdas[k] if consensus and not consensus.given else 0.0,
                "factor": restored if drops else 1.0,
                "given_factor": restored,
            }
        )
    fields = {
        "tie_rule": codes.TIE_RULES[trim.tie_rule],
        "rescale": codes.RESCALES[recipe.rescale],
        "vote": codes.VOTES[recipe.vote],
        "vote_on": codes.VOTES_ON[recipe.vote_on],
        "zero_vote": codes.ZERO_VOTES[recipe.zero_vote],
        "contributors": codes.CONTRIBUTORS[recipe.contributors],
        "reduce": codes.REDUCES[recipe.reduce],
        "consensus": codes.consensus_code(recipe),
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


def calibration_of(c: RowCalibration) -> Any:
    return _native.Calibration(
        rows=c.rows,
        cols=c.cols,
        variant=codes.VARIANTS[Variant(c.variant)],
        per_tensor=c.granularity is Granularity.TENSOR,
        p=2.0 if c.variant is Variant.SPECTRAL else float(c.p),
        eps_mode=codes.EPS_MODES[c.eps_mode],
        guards=c.guards,
        clamp=c.clamp,
        strength=c.strength,
        scale=c.scale,
        direction=codes.DIRECTIONS[c.direction],
        included=c.included,
    )
