"""Sums and means of models or of their changes, without a trim or a vote."""

from __future__ import annotations

from functools import partial

from magic_fast.methods.elementwise.parts import Arguments, sum_of, task_method
from magic_fast.methods.parameters import ALIGN, WEIGHT, flag, scale
from magic_fast.methods.spec import MethodSpec, Paper, ParameterSpec
from magic_fast.recipe import Recipe, Reduce

_SOUPS = Paper("Model Soups", "2203.05482")


def _passthrough(k: int, p: Arguments) -> Recipe:
    """Its scale is one number a model, so it is a weight."""
    return sum_of(k, {"weights": p.get("scale", 1.0)})


METHODS = (
    MethodSpec(
        "linear",
        (WEIGHT, flag("normalize", True)),
        base="none",
        recipe=sum_of,
        summary="weighted mean of whole models, without a base",
        use_when="the models share no base",
        paper=_SOUPS,
    ),
    MethodSpec(
        "average",
        (scale(), ALIGN),
        base="optional",
        recipe=partial(sum_of, reduce=Reduce.MEAN),
        summary="mean of the experts",
        use_when="a baseline is wanted",
        paper=_SOUPS,
    ),
    task_method(
        "task_arithmetic",
        factor=scale(1.0, fusion_bench=0.3, magic=0.3),
        summary="base plus the weighted sum of the changes",
        use_when="the experts barely interfere",
        paper=Paper("Editing Models with Task Arithmetic", "2212.04089"),
    ),
    MethodSpec(
        "passthrough",
        (ParameterSpec("scale", "per_model", default=1.0),),
        base="none",
        max_experts=1,
        recipe=_passthrough,
        summary="one model's layers as they are, or scaled",
        use_when="layers are stacked by slices",
        paper=Paper("mergekit"),
    ),
)
