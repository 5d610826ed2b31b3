"""DARE: entries dropped at random."""

from __future__ import annotations

from magic_fast.methods.elementwise.parts import task_method
from magic_fast.methods.parameters import density
from magic_fast.methods.spec import Paper
from magic_fast.recipe import TrimRule

_DARE = Paper("Language Models are Super Mario", "2311.03099")

METHODS = (
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
)
