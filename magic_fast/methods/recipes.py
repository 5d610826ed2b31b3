"""From a method's name, its parameters and a preset to a :class:`~magic_fast.recipe.Recipe`
(docs/methods.md).

A preset reproduces another system exactly; it changes stages of the recipe, never the loop that
runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from magic_fast.errors import InputError
from magic_fast.recipe import (
    Align,
    Alone,
    Consensus,
    Contributors,
    CountRule,
    Recipe,
    Reduce,
    Rescale,
    TieRule,
    Trim,
    TrimRule,
    TrimScope,
    Vote,
    VoteOn,
    Weigh,
    ZeroVote,
    per_expert,
)

_TRIMS = {
    "ties": TrimRule.MAGNITUDE,
    "consensus_ta": TrimRule.MAGNITUDE,
    "magnitude_prune": TrimRule.MAGNITUDE,
    "dare_linear": TrimRule.RANDOM,
    "dare_ties": TrimRule.RANDOM,
    "della": TrimRule.RANKED,
    "della_linear": TrimRule.RANKED,
    "breadcrumbs": TrimRule.BAND,
    "breadcrumbs_ties": TrimRule.BAND,
    "sce": TrimRule.VARIANCE,
    "ram": TrimRule.THRESHOLD,
    "ramplus_tl": TrimRule.THRESHOLD,
    "pcb": TrimRule.COMPETE,
}
_VOTING = frozenset({"ties", "dare_ties", "della", "breadcrumbs_ties", "emr_unified", "sce"})
_LEAST_ENERGY = 1e-6  # of mergekit: less is shared equally, and divides as this much
_VOTES = {"mass": Vote.MASS, "count": Vote.COUNT, "total": Vote.MASS, "frequency": Vote.COUNT}

#: Methods that are a recipe; the others are functions over whole tensors.
RECIPES = frozenset(_TRIMS) | {
    "average",
    "emr_unified",
    "linear",
    "magmax",
    "nearswap",
    "passthrough",
    "task_arithmetic",
}

COMPATS = ("mergekit-0.1.4",)


def _trim(method: str, k: int, p: Mapping[str, Any], preset: str, compat: str | None) -> Trim:
    rule = _TRIMS.get(method, TrimRule.NONE)
    if rule is TrimRule.NONE:
        return Trim()
    if rule is TrimRule.COMPETE:
        ratio = per_expert(p["ratio"], k, "ratio")
        return Trim(rule, density=ratio, scope=TrimScope(p["scope"]))
    if rule is TrimRule.VARIANCE:
        return Trim(rule, density=per_expert(p["select_topk"], k, "select_topk"))

    def numbers(name: str) -> tuple[float, ...]:
        return per_expert(p[name], k, name) if name in p else ()

    return Trim(
        rule=rule,
        density=numbers("density"),
        gamma=numbers("gamma"),
        epsilon=numbers("epsilon"),
        seed=int(p.get("seed", 0)),
        rank_dim1=preset == "mergekit",
        empty_band_zeroes=compat == "mergekit-0.1.4",
    )


def _plain(method: str, k: int, p: Mapping[str, Any], preset: str, compat: str | None) -> Recipe:
    """The method as docs/methods.md tables it."""
    votes = method in _VOTING or p.get("on") == "ties"
    reduce = Reduce.WEIGHTED_MEAN if p.get("normalize", False) else Reduce.SUM
    if method == "average":
        reduce = Reduce.MEAN
    elif method in ("magmax", "emr_unified"):
        reduce = Reduce.MAX
    if p.get("reduce") is not None:
        reduce = Reduce(p["reduce"])
    if method == "nearswap":
        _check_pair(method, k)
    if method == "pcb":
        trim = _trim(method, k, p, preset, compat)
        return Recipe(
            (1.0,) * k, trim, reduce=Reduce.WEIGHTED_MEAN, weigh=Weigh.SCORE, scale=p["scale"]
        )
    if method in ("ram", "ramplus_tl"):
        return _ram(k, p, _trim(method, k, p, preset, compat))
    weights = p.get("weights", 1.0)
    if method == "passthrough":  # its scale is one number per model, so it is a weight
        p, weights = {}, p.get("scale", 1.0)
    return Recipe(
        weights=per_expert(weights, k, "weights"),
        trim=_trim(method, k, p, preset, compat),
        rescale=Rescale(p.get("rescale", "none")),
        align=Align(p.get("align") or "none"),
        vote=_VOTES[p.get("vote") or "mass"] if votes else Vote.NONE,
        zero_vote=ZeroVote.NEGATIVE if method == "emr_unified" else ZeroVote.POSITIVE,
        contributors=Contributors.AGREEING if votes else Contributors.ALL,
        reduce=reduce,
        consensus=_consensus(k, p) if method == "consensus_ta" else None,
        scale=per_expert(p.get("scale", 1.0), k, "scale")[0],
        limit=p["t"] if method == "nearswap" else None,
    )


def _check_pair(method: str, k: int) -> None:
    if k != 1:
        raise InputError(
            f"experts for method {method!r}: expected one beside the base, got {k}. It goes from "
            "one model to another."
        )


def _ram(k: int, p: Mapping[str, Any], trim: Trim) -> Recipe:
    """RAM, and RAM+ where there is an ``r``."""
    alone = Alone(p["r"], p["alpha"], p["epsilon"]) if p.get("r") else None
    return Recipe(
        (1.0,) * k,
        trim,
        rescale=Rescale(p.get("rescale", "none")),
        align=Align(p.get("align") or "none"),
        contributors=Contributors.NONZERO,
        reduce=Reduce.MEAN,
        alone=alone,
    )


def _sce(recipe: Recipe, preset: str) -> Recipe:
    return replace(
        recipe,
        vote_on=VoteOn.UNWEIGHTED,
        reduce=Reduce.WEIGHTED_MEAN,
        weigh=Weigh.ENERGY,
        least=_LEAST_ENERGY if preset == "mergekit" else 0.0,
    )


def _consensus(k: int, p: Mapping[str, Any]) -> Consensus:
    lambdas = per_expert(p["tall_mask_lambda"], k, "tall_mask_lambda")
    return Consensus(lambdas, min_tasks=int(p["min_tasks"]))


def _with(recipe: Recipe, p: Mapping[str, Any], reduce: Reduce, **changes: Any) -> Recipe:
    """``recipe`` with a preset's changes; a reduction asked for by name stays."""
    if p.get("reduce") is None:
        changes["reduce"] = reduce
    return replace(recipe, **changes)


def _peft(recipe: Recipe, method: str, p: Mapping[str, Any]) -> Recipe:
    recipe = replace(recipe, trim=replace(recipe.trim, min_kept=0))
    if method in _VOTING:
        return _with(recipe, p, Reduce.MEAN, vote_on=VoteOn.UNWEIGHTED)
    return recipe


def _original_trim(trim: Trim, scope: TrimScope) -> Trim:
    return replace(
        trim, count_rule=CountRule.FLOOR_PLUS_ONE, tie_rule=TieRule.KEEP_ALL, scope=scope
    )


def _original_ties(
    scope: TrimScope, reduce: Reduce
) -> Callable[[Recipe, str, Mapping[str, Any]], Recipe]:
    """ties-merging's rules; FusionBench's and MAGIC's differ in scope and reduction."""

    def change(recipe: Recipe, method: str, p: Mapping[str, Any]) -> Recipe:
        if method != "ties":
            return recipe
        trim = _original_trim(recipe.trim, scope)
        return _with(recipe, p, reduce, trim=trim, zero_vote=ZeroVote.MAJORITY)

    return change


_magic_ties = _original_ties(TrimScope.TENSOR, Reduce.MEAN)


def _magic(recipe: Recipe, method: str, p: Mapping[str, Any]) -> Recipe:
    """Their consensus trims every task vector over the whole model before the sum."""
    if method == "consensus_ta":
        return replace(recipe, trim=_original_trim(recipe.trim, TrimScope.MODEL))
    return _magic_ties(recipe, method, p)


def _sd_mecha(recipe: Recipe, method: str, p: Mapping[str, Any]) -> Recipe:
    trim = replace(recipe.trim, count_rule=CountRule.COMPLEMENT_PLUS_ONE, tie_rule=TieRule.KEEP_ALL)
    vote = _VOTES[p["vote"]] if p.get("vote") else Vote.COUNT
    return _with(recipe, p, Reduce.MEAN, trim=trim, vote=vote, zero_vote=ZeroVote.DROP)


def _unchanged(recipe: Recipe, method: str, p: Mapping[str, Any]) -> Recipe:
    return recipe


_Change = Callable[[Recipe, str, Mapping[str, Any]], Recipe]

# preset → (how it changes a recipe, the methods its system has; None: all)
_PRESETS: dict[str, tuple[_Change, frozenset[str] | None]] = {
    "default": (_unchanged, None),
    "mergekit": (_unchanged, None),
    "peft": (
        _peft,
        frozenset({"task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties"}),
    ),
    "ties_merging": (
        _original_ties(TrimScope.MODEL, Reduce.MEAN),
        frozenset({"average", "task_arithmetic", "ties"}),
    ),
    "fusion_bench": (
        _original_ties(TrimScope.MODEL, Reduce.SUM),
        frozenset({"average", "task_arithmetic", "ties", "slerp"}),
    ),
    "magic": (
        _magic,
        frozenset(
            {"average", "task_arithmetic", "ties", "slerp", "consensus_ta"}
            | {"iso_c", "iso_cts", "tsv_m"}
        ),
    ),
    "sd_mecha": (_sd_mecha, frozenset({"ties"})),
}


def check_preset(preset: str, method: str) -> None:
    """Refuses an unknown preset, and a method whose system has none of that name."""
    if preset not in _PRESETS:
        names = ", ".join(repr(p) for p in _PRESETS)
        raise InputError(f"preset {preset!r}: expected one of {names}, got an unknown name.")
    methods = _PRESETS[preset][1]
    if methods is not None and method not in methods:
        raise InputError(
            f"method {method!r} under preset {preset!r}: expected one of "
            f"{', '.join(sorted(methods))}, which that system has. Choose one of them, or "
            "another preset."
        )


def build_recipe(
    method: str,
    num_experts: int,
    parameters: Mapping[str, Any],
    *,
    preset: str = "default",
    compat: str | None = None,
) -> Recipe:
    """The recipe of an element-wise method.

    Args:
        method: an element-wise method of docs/methods.md.
        num_experts: K.
        parameters: every parameter of the method by its Python name, defaults filled in
            (``weights``, ``density``, ``gamma``, ``epsilon``, ``scale``, ``normalize``,
            ``rescale``, ``align``, ``vote``, ``reduce``, ``seed``; of ``consensus_ta``
            ``tall_mask_lambda``, ``min_tasks``, ``on``); per-expert ones a number or K numbers.
        preset: the system whose rules hold.
        compat: ``"mergekit-0.1.4"`` matches that release's faults.

    >>> build_recipe("ties", 2, {"density": 0.2}, preset="magic").zero_vote
    <ZeroVote.MAJORITY: 'majority'>
    """
    check_preset(preset, method)
    if compat is not None and compat not in COMPATS:
        raise InputError(f"compat {compat!r}: expected one of {', '.join(COMPATS)}.")
    recipe = _plain(method, num_experts, parameters, preset, compat)
    if method == "sce":
        recipe = _sce(recipe, preset)
    return _PRESETS[preset][0](recipe, method, parameters)
