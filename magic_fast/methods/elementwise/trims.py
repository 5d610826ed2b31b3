"""Task arithmetic on trimmed changes, with and without TIES-Merging's vote: by magnitude (TIES,
Breadcrumbs) or at random (DARE, DELLA, which drops large entries less often)."""

from __future__ import annotations

from magic_fast.methods.elementwise.parts import task_method
from magic_fast.methods.parameters import density, scale
from magic_fast.methods.spec import Paper, ParameterSpec
from magic_fast.recipe import TrimRule

_DARE = Paper("Language Models are Super Mario", "2311.03099")
_DELLA = Paper("DELLA-Merging", "2406.11617")
_BREADCRUMBS = Paper("Model Breadcrumbs", "2312.06795")
_EPSILON = ParameterSpec("epsilon", "per_model", default=0.15, low=0.0)
_GAMMA = ParameterSpec("gamma", "per_model", default=0.01, low=0.0, high=1.0, high_open=True)

METHODS = (
    task_method(
        "ties",
        density(0.2),
        trim=TrimRule.MAGNITUDE,
        votes=True,
        normalize=True,
        factor=scale(1.0, fusion_bench=0.3),
        summary="largest entries of each change, sign vote, mean of those that agree",
        use_when="experts disagree on signs",
        paper=Paper("TIES-Merging", "2306.01708"),
    ),
    task_method(
        "magnitude_prune",
        density(0.5),
        trim=TrimRule.MAGNITUDE,
        summary="the largest entries of each change, summed",
        use_when="the experts agree",
        paper=Paper("the trim of TIES-Merging alone", "2306.01708"),
    ),
    task_method(
        "dare_linear",
        density(0.5),
        trim=TrimRule.RANDOM,
        summary="random entries dropped, the rest rescaled, summed",
        use_when="changes are small and redundant",
        paper=_DARE,
    ),
    task_method(
        "dare_ties",
        density(0.5),
        trim=TrimRule.RANDOM,
        votes=True,
        summary="random entries dropped, the rest rescaled, sign vote, sum of those that agree",
        use_when="as dare_linear, and signs disagree",
        paper=_DARE,
    ),
    task_method(
        "della",
        density(0.5),
        _EPSILON,
        trim=TrimRule.RANKED,
        votes=True,
        normalize=True,
        summary="entries dropped at random, large ones less often; sign vote, mean of those that "
        "agree",
        use_when="as dare_ties, with uneven changes",
        paper=_DELLA,
    ),
    task_method(
        "della_linear",
        density(0.5),
        _EPSILON,
        trim=TrimRule.RANKED,
        summary="entries dropped at random, large ones less often; summed",
        use_when="as dare_linear, with uneven changes",
        paper=_DELLA,
    ),
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
