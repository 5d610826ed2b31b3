"""Experts, or their entries, weighted by what they hold: SCE by the energy of a change, RAM and
RAM+ by who changed an entry alone, PCB by an entry's size and the experts' agreement."""

from __future__ import annotations

from magic_fast.methods.elementwise.parts import Arguments, changes_of, sum_of, trim_of
from magic_fast.methods.parameters import ALIGN, RESCALE, number, scale
from magic_fast.methods.spec import MethodSpec, Paper, ParameterSpec
from magic_fast.recipe import (
    Alone,
    Contributors,
    Recipe,
    Reduce,
    Trim,
    TrimRule,
    TrimScope,
    VoteOn,
    Weigh,
    per_expert,
)

_RAM = Paper("RAM", "2601.13572")
_EPSILON = number("epsilon", 1e-5, 0.0)
_SCOPE = ParameterSpec("scope", kind="choice", default="model", choices=("model", "tensor"))


def _sce(k: int, p: Arguments) -> Recipe:
    trim = Trim(TrimRule.VARIANCE, density=per_expert(p["select_topk"], k, "select_topk"))
    return sum_of(
        k, p, trim, votes=True, vote_on=VoteOn.UNWEIGHTED, reduce=Reduce.WEIGHTED_MEAN,
        weigh=Weigh.ENERGY,
    )  # fmt: skip


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


def _pcb(k: int, p: Arguments) -> Recipe:
    ratio = per_expert(p["ratio"], k, "ratio")
    trim = Trim(TrimRule.COMPETE, density=ratio, scope=TrimScope(p["scope"]))
    return Recipe(
        (1.0,) * k, trim, reduce=Reduce.WEIGHTED_MEAN, weigh=Weigh.SCORE, scale=p["scale"]
    )


METHODS = (
    MethodSpec(
        "sce",
        (number("select_topk", 1.0, 0.0, 1.0, low_open=True),),
        recipe=_sce,
        summary="experts weighted by the energy of their changes, tensor by tensor, then a vote",
        use_when="experts of unequal strength",
        paper=Paper("FuseChat", "2408.07990"),
    ),
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
    MethodSpec(
        "pcb",
        (number("ratio", 0.1, 0.0, 1.0, low_open=True), _SCOPE, scale(1.2)),
        recipe=_pcb,
        summary="entries weighted by their size and by the experts' agreement",
        use_when="strong interference",
        paper=Paper("Parameter Competition Balancing", "2410.02396"),
    ),
)
