"""Consensus Task Arithmetic: the entries that enough tasks need."""

from __future__ import annotations

from magic_fast.methods.elementwise.parts import Arguments, sum_of, trim_of
from magic_fast.methods.parameters import ALIGN, PERCENT, RESCALE, scale
from magic_fast.methods.spec import MethodSpec, Paper, ParameterSpec
from magic_fast.recipe import Consensus, Recipe, TrimRule, per_expert

_ON = ParameterSpec("on", kind="choice", default="sum", choices=("sum", "ties"))
_DENSITY = ParameterSpec(
    "density", "per_model", default=1.0, preset_defaults={"magic": 0.2}, low=0.0, high=1.0,
    low_open=True, note=PERCENT,
)  # fmt: skip


def _consensus_ta(k: int, p: Arguments) -> Recipe:
    lambdas = per_expert(p["tall_mask_lambda"], k, "tall_mask_lambda")
    consensus = Consensus(lambdas, min_tasks=int(p["min_tasks"]))
    trim = trim_of(TrimRule.MAGNITUDE, k, p)
    return sum_of(k, p, trim, votes=p.get("on") == "ties", consensus=consensus)


METHODS = (
    MethodSpec(
        "consensus_ta",
        (
            ParameterSpec("tall_mask_lambda", "per_model", default=0.4, low=0.0),
            _ON,
            _DENSITY,
            scale(),
            ParameterSpec("min_tasks", kind="int", default=2, low=1),
            ALIGN,
            RESCALE,
        ),
        recipe=_consensus_ta,
        summary="task arithmetic on the entries that enough tasks need",
        use_when="many experts",
        paper=Paper("Localizing Task Information (TALL masks)", "2405.07813"),
    ),
)
