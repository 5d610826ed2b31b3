"""TIES-Merging, and its trim alone."""

from __future__ import annotations

from magic_fast.methods.elementwise.parts import task_method
from magic_fast.methods.parameters import density, scale
from magic_fast.methods.spec import Paper
from magic_fast.recipe import TrimRule

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
)
