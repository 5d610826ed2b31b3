"""RAM and RAM+: entries that one expert changed stay whole, shared ones are averaged."""

from __future__ import annotations

from magic_fast.methods.elementwise.parts import Arguments, changes_of, trim_of
from magic_fast.methods.parameters import ALIGN, RESCALE, number
from magic_fast.methods.spec import MethodSpec, Paper
from magic_fast.recipe import Alone, Contributors, Recipe, Reduce, TrimRule

_RAM = Paper("RAM", "2601.13572")
_EPSILON = number("epsilon", 1e-5, 0.0)


def _ram(k: int, p: Arguments) -> Recipe:
    """RAM, and RAM+ where there is an ``r``."""
    return Recipe(
        (1.0,) * k,
        trim_of(TrimRule.THRESHOLD, k, p),
        **changes_of(p),
        contributors=Contributors.NONZERO,
        reduce=Reduce.MEAN,
        alone=Alone(p["r"], p["alpha"], p["epsilon"]) if p.get("r") else None,
    )


METHODS = (
    MethodSpec(
        "ram",
        (_EPSILON, ALIGN, RESCALE),
        recipe=_ram,
        summary="entries that one expert changed stay whole, shared ones are averaged",
        use_when="sparse changes, as after reinforcement learning",
        paper=_RAM,
    ),
    MethodSpec(
        "ramplus_tl",
        (number("r", 0.1), number("alpha", 0.2, 0.0), _EPSILON, ALIGN, RESCALE),
        recipe=_ram,
        summary="as ram, what one expert changed alone amplified",
        use_when="as ram, and experts overlap",
        paper=_RAM,
    ),
)
