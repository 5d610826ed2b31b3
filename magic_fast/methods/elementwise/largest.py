"""The largest change of each entry: MagMax, and EMR's unified model."""

from __future__ import annotations

from functools import partial

from magic_fast.methods.elementwise.parts import sum_of
from magic_fast.methods.parameters import ALIGN, scale
from magic_fast.methods.spec import MethodSpec, Paper
from magic_fast.recipe import Reduce, ZeroVote

METHODS = (
    MethodSpec(
        "magmax",
        (scale(0.5), ALIGN),
        recipe=partial(sum_of, reduce=Reduce.MAX),
        summary="the largest change of each entry",
        use_when="experts learnt one after the other",
        paper=Paper("MagMax", "2407.06322"),
    ),
    MethodSpec(
        "emr_unified",
        (scale(), ALIGN),
        recipe=partial(sum_of, votes=True, zero_vote=ZeroVote.NEGATIVE, reduce=Reduce.MAX),
        summary="sign vote, then the largest change that agrees",
        use_when="one model for all tasks, untuned",
        paper=Paper("EMR-Merging", "2405.17461"),
    ),
)
