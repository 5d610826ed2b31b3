"""Presets: what each system whose results can be reproduced does differently, and which of the
methods it has (docs/methods.md).

A preset changes stages of a method's recipe, never the loop that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from magic_fast.errors import InputError
from magic_fast.methods.elementwise.parts import VOTES
from magic_fast.methods.registry import find_method
from magic_fast.recipe import (
    CountRule,
    Recipe,
    Reduce,
    TieRule,
    Trim,
    TrimRule,
    TrimScope,
    Vote,
    VoteOn,
    ZeroVote,
)

COMPATS = ("mergekit-0.1.4",)
_LEAST_ENERGY = 1e-6  # of mergekit: less is shared equally, and divides as this much

Change = Callable[[Recipe, str, Mapping[str, Any]], Recipe]


def _with(recipe: Recipe, p: Mapping[str, Any], reduce: Reduce, **changes: Any) -> Recipe:
    """``recipe`` with a preset's changes; a reduction that the caller names stays."""
    if p.get("reduce") is None:
        changes["reduce"] = reduce
    return replace(recipe, **changes)


def _mergekit(recipe: Recipe, method: str, p: Mapping[str, Any]) -> Recipe:
    if method in ("della", "della_linear"):
        return replace(recipe, trim=replace(recipe.trim, rank_dim1=True))
    return replace(recipe, least=_LEAST_ENERGY) if method == "sce" else recipe


def _peft(recipe: Recipe, method: str, p: Mapping[str, Any]) -> Recipe:
    recipe = replace(recipe, trim=replace(recipe.trim, min_kept=0))
    if recipe.vote is not Vote.NONE:
        return _with(recipe, p, Reduce.MEAN, vote_on=VoteOn.UNWEIGHTED)
    return recipe


def _original_trim(trim: Trim, scope: TrimScope) -> Trim:
    return replace(
        trim, count_rule=CountRule.FLOOR_PLUS_ONE, tie_rule=TieRule.KEEP_ALL, scope=scope
    )


def _original_ties(scope: TrimScope, reduce: Reduce) -> Change:
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
    vote = VOTES[p["vote"]] if p.get("vote") else Vote.COUNT
    return _with(recipe, p, Reduce.MEAN, trim=trim, vote=vote, zero_vote=ZeroVote.DROP)


@dataclass(frozen=True)
class _System:
    """``change``: how it changes a recipe. ``methods``: those that the system has; None: all."""

    change: Change
    methods: frozenset[str] | None = None


_SYSTEMS: Mapping[str, _System] = {
    "default": _System(lambda recipe, method, p: recipe),
    "mergekit": _System(_mergekit),
    "peft": _System(
        _peft,
        frozenset({"task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties"}),
    ),
    "ties_merging": _System(
        _original_ties(TrimScope.MODEL, Reduce.MEAN),
        frozenset({"average", "task_arithmetic", "ties"}),
    ),
    "fusion_bench": _System(
        _original_ties(TrimScope.MODEL, Reduce.SUM),
        frozenset({"average", "task_arithmetic", "ties", "slerp"}),
    ),
    "magic": _System(
        _magic,
        frozenset(
            {"average", "task_arithmetic", "ties", "slerp", "consensus_ta"}
            | {"iso_c", "iso_cts", "tsv_m"}
        ),
    ),
    "sd_mecha": _System(_sd_mecha, frozenset({"ties"})),
}

#: The presets by name.
PRESETS = tuple(_SYSTEMS)


def check_preset(preset: str, method: str) -> None:
    """Refuses an unknown preset, and a method whose system has none of that name."""
    if preset not in _SYSTEMS:
        names = ", ".join(repr(p) for p in _SYSTEMS)
        raise InputError(f"preset {preset!r}: expected one of {names}, got an unknown name.")
    methods = _SYSTEMS[preset].methods
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
    """The recipe of a method that is one.

    Args:
        method: its name.
        num_experts: K.
        parameters: every parameter of the method by its Python name, defaults filled in, and
            ``seed`` where its trim is random; per-expert ones a number or K numbers.
        preset: the system whose rules hold.
        compat: ``"mergekit-0.1.4"`` matches that release's faults.

    >>> build_recipe("ties", 2, {"density": 0.2}, preset="magic").zero_vote
    <ZeroVote.MAJORITY: 'majority'>
    """
    check_preset(preset, method)
    if compat is not None and compat not in COMPATS:
        raise InputError(f"compat {compat!r}: expected one of {', '.join(COMPATS)}.")
    builder = find_method(method).recipe
    assert builder is not None, f"{method} is no recipe"
    recipe = builder(num_experts, parameters)
    if compat == "mergekit-0.1.4" and recipe.trim.rule is TrimRule.BAND:
        recipe = replace(recipe, trim=replace(recipe.trim, empty_band_zeroes=True))
    return _SYSTEMS[preset].change(recipe, method, parameters)
