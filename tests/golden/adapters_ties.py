"""The original TIES code; its trims by deviation and by share of the norm are reference only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from golden.adapters import adapter, run_recipe
from golden.golden_case import GoldenCase
from magic_fast.recipe import (
    Contributors,
    CountRule,
    Recipe,
    Reduce,
    TieRule,
    Trim,
    TrimRule,
    Vote,
    ZeroVote,
)

_TRIMS = {
    "topk": TrimRule.MAGNITUDE,
    "std": TrimRule.STD,
    "nf": TrimRule.NORM_FRACTION,
    "": TrimRule.NONE,
}
_VOTES = {
    "mass": Vote.MASS,
    "normfrac": Vote.NORM_FRACTION,
    "normmass": Vote.NORM_MASS,
    "none": Vote.NONE,
}
_REDUCTIONS = {
    "mean": Reduce.MEAN,
    "sum": Reduce.SUM,
    "max": Reduce.MAX,
    "median": Reduce.MEDIAN,
    "magnitude": Reduce.MAX,
}


def ties_recipe(params: dict[str, Any], num_experts: int) -> Recipe:
    """The recipe of ``merge_methods(reset_type, reset_thresh, resolve_method, merge_func)``."""
    trim = Trim()
    if params["reset_type"]:
        threshold = params["reset_thresh"]
        percent = params["reset_type"] == "topk" and threshold > 1
        trim = Trim(
            _TRIMS[params["reset_type"]],
            density=(threshold / 100 if percent else threshold,) * num_experts,
            count_rule=CountRule.FLOOR_PLUS_ONE,
            tie_rule=TieRule.KEEP_ALL,
        )
    vote = _VOTES[params["resolve_method"]]
    disjoint = params["merge_func"].startswith("dis-")
    contributors = Contributors.ALL
    if disjoint:
        contributors = Contributors.NONZERO if vote is Vote.NONE else Contributors.AGREEING
    return Recipe(
        (1.0,) * num_experts,
        trim=trim,
        vote=vote,
        zero_vote=ZeroVote.MAJORITY,
        contributors=contributors,
        reduce=_REDUCTIONS[params["merge_func"].removeprefix("dis-")],
        signed_result=not disjoint and vote is not Vote.NONE,
    )


@adapter("ties.merge_methods")
def merge_methods(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    experts = list(case.inputs["W"])
    return {
        "merged": run_recipe(experts, ties_recipe(dict(case.params), len(experts)), backend, wide)
    }
