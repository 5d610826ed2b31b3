"""What recipes of several families share: the trim, and the weighted sum or vote of task
vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from magic_fast.methods.parameters import ALIGN, REDUCE, VOTE, WEIGHT, flag, scale
from magic_fast.methods.spec import MethodSpec, Paper, ParameterSpec
from magic_fast.recipe import (
    Align,
    Contributors,
    Recipe,
    Reduce,
    Rescale,
    Trim,
    TrimRule,
    Vote,
    per_expert,
)

Arguments = Mapping[str, Any]

#: The words of the parameter ``vote``.
VOTES = {"mass": Vote.MASS, "count": Vote.COUNT, "total": Vote.MASS, "frequency": Vote.COUNT}


def trim_of(rule: TrimRule, k: int, p: Arguments) -> Trim:
    """The trim with those of ``density``, ``gamma``, ``epsilon`` and ``seed`` that are there."""

    def numbers(name: str) -> tuple[float, ...]:
        return per_expert(p[name], k, name) if name in p else ()

    return Trim(
        rule,
        density=numbers("density"),
        gamma=numbers("gamma"),
        epsilon=numbers("epsilon"),
        seed=int(p.get("seed", 0)),
    )


def changes_of(p: Arguments) -> dict[str, Any]:
    """What happens to each task vector after its trim, as fields of a recipe."""
    return {
        "rescale": Rescale(p.get("rescale", "none")),
        "align": Align(p.get("align") or "none"),
    }


def sum_of(
    k: int, p: Arguments, trim: Trim | None = None, *, votes: bool = False, **fields: Any
) -> Recipe:
    """``scale`` times the weighted sum or mean of the task vectors, over those that agree with the
    elected sign where it ``votes``; ``fields`` are those of the recipe that are otherwise."""
    reduce = Reduce.WEIGHTED_MEAN if p.get("normalize", False) else Reduce.SUM
    common = {
        "weights": per_expert(p.get("weights", 1.0), k, "weights"),
        "trim": trim or Trim(),
        **changes_of(p),
        "vote": VOTES[p.get("vote") or "mass"] if votes else Vote.NONE,
        "contributors": Contributors.AGREEING if votes else Contributors.ALL,
        "reduce": Reduce(p["reduce"]) if p.get("reduce") is not None else reduce,
        "scale": per_expert(p.get("scale", 1.0), k, "scale")[0],
    }
    return Recipe(**common | fields)


def task_method(
    name: str,
    *own: ParameterSpec,
    trim: TrimRule = TrimRule.NONE,
    votes: bool = False,
    normalize: bool = False,
    factor: ParameterSpec | None = None,
    summary: str,
    use_when: str,
    paper: Paper,
) -> MethodSpec:
    """A method on task vectors with the common parameters: weight, lambda, normalize and align;
    where it trims also rescale, where it votes also vote and reduce.

    Args:
        own: the parameters of its trim.
        trim: the rule of its trim.
        normalize: the default of that parameter.
        factor: the parameter lambda, where its defaults are not the usual ones.
        summary, use_when, paper: of the method.
    """
    parameters = [WEIGHT, *own, factor or scale(), flag("normalize", normalize), ALIGN]
    if votes:
        parameters += [VOTE, REDUCE]
    if trim is not TrimRule.NONE:
        random = trim in (TrimRule.RANDOM, TrimRule.RANKED)
        parameters.append(
            ParameterSpec("rescale", kind="rescale", default=random, random_trim=random)
        )

    def recipe(k: int, p: Arguments) -> Recipe:
        return sum_of(k, p, None if trim is TrimRule.NONE else trim_of(trim, k, p), votes=votes)

    return MethodSpec(
        name, tuple(parameters), recipe=recipe, summary=summary, use_when=use_when, paper=paper
    )
