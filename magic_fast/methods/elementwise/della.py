"""DELLA: entries dropped at random, large ones less often."""

from __future__ import annotations

from magic_fast.methods.elementwise.parts import task_method
from magic_fast.methods.parameters import density
from magic_fast.methods.spec import Paper, ParameterSpec
from magic_fast.recipe import TrimRule

_DELLA = Paper("DELLA-Merging", "2406.11617")
_EPSILON = ParameterSpec("epsilon", "per_model", default=0.15, low=0.0)

METHODS = (
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
)
