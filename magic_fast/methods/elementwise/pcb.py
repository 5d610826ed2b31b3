"""Parameter Competition Balancing: entries weighted by their size and by the experts' agreement."""

from __future__ import annotations

from magic_fast.methods.elementwise.parts import Arguments
from magic_fast.methods.parameters import number, scale
from magic_fast.methods.spec import MethodSpec, Paper, ParameterSpec
from magic_fast.recipe import Recipe, Reduce, Trim, TrimRule, TrimScope, Weigh, per_expert

_SCOPE = ParameterSpec("scope", kind="choice", default="model", choices=("model", "tensor"))


def _pcb(k: int, p: Arguments) -> Recipe:
    ratio = per_expert(p["ratio"], k, "ratio")
    trim = Trim(TrimRule.COMPETE, density=ratio, scope=TrimScope(p["scope"]))
    return Recipe(
        (1.0,) * k, trim, reduce=Reduce.WEIGHTED_MEAN, weigh=Weigh.SCORE, scale=p["scale"]
    )


METHODS = (
    MethodSpec(
        "pcb",
        (number("ratio", 0.1, 0.0, 1.0, low_open=True), _SCOPE, scale(1.2)),
        recipe=_pcb,
        summary="entries weighted by their size and by the experts' agreement",
        use_when="strong interference",
        paper=Paper("Parameter Competition Balancing", "2410.02396"),
    ),
)
