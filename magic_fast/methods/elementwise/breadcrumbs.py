"""Model Breadcrumbs: the smallest entries and the outliers dropped."""

from __future__ import annotations

from magic_fast.methods.elementwise.parts import task_method
from magic_fast.methods.parameters import density
from magic_fast.methods.spec import Paper, ParameterSpec
from magic_fast.recipe import TrimRule

_BREADCRUMBS = Paper("Model Breadcrumbs", "2312.06795")
_GAMMA = ParameterSpec("gamma", "per_model", default=0.01, low=0.0, high=1.0, high_open=True)

METHODS = (
    task_method(
        "breadcrumbs",
        density(0.9),
        _GAMMA,
        trim=TrimRule.BAND,
        summary="the smallest entries and the outliers dropped, summed",
        use_when="a few outliers dominate",
        paper=_BREADCRUMBS,
    ),
    task_method(
        "breadcrumbs_ties",
        density(0.9),
        _GAMMA,
        trim=TrimRule.BAND,
        votes=True,
        summary="the smallest entries and the outliers dropped, sign vote, sum of those that agree",
        use_when="a few outliers dominate and signs disagree",
        paper=_BREADCRUMBS,
    ),
)
