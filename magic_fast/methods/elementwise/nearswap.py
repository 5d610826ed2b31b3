"""NearSwap: the expert's entries where they are near the base's."""

from __future__ import annotations

from magic_fast.errors import InputError
from magic_fast.methods.elementwise.parts import Arguments, sum_of
from magic_fast.methods.spec import MethodSpec, Paper, ParameterSpec
from magic_fast.recipe import Recipe


def _nearswap(k: int, p: Arguments) -> Recipe:
    if k != 1:
        raise InputError(
            f"experts for method 'nearswap': expected one beside the base, got {k}. It goes from "
            "one model to another."
        )
    return sum_of(k, p, limit=p["t"])


METHODS = (
    MethodSpec(
        "nearswap",
        (ParameterSpec("t", low=0.0, required=True),),
        max_experts=1,
        recipe=_nearswap,
        summary="the expert's entries where they are near the base's",
        use_when="a light touch of one expert",
        paper=Paper("mergekit"),
    ),
)
