"""SCE of FuseChat: weights by the energy of the changes, then a vote."""

from __future__ import annotations

from magic_fast.methods.elementwise.parts import Arguments, sum_of
from magic_fast.methods.parameters import number
from magic_fast.methods.spec import MethodSpec, Paper
from magic_fast.recipe import Recipe, Reduce, Trim, TrimRule, VoteOn, Weigh, per_expert


def _sce(k: int, p: Arguments) -> Recipe:
    trim = Trim(TrimRule.VARIANCE, density=per_expert(p["select_topk"], k, "select_topk"))
    return sum_of(
        k, p, trim, votes=True, vote_on=VoteOn.UNWEIGHTED, reduce=Reduce.WEIGHTED_MEAN,
        weigh=Weigh.ENERGY,
    )  # fmt: skip


METHODS = (
    MethodSpec(
        "sce",
        (number("select_topk", 1.0, 0.0, 1.0, low_open=True),),
        recipe=_sce,
        summary="experts weighted by the energy of their changes, tensor by tensor, then a vote",
        use_when="experts of unequal strength",
        paper=Paper("FuseChat", "2408.07990"),
    ),
)
