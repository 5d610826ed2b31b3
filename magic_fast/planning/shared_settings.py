"""Parameters that all tensors of a merge must share, because the tensors compete with one another:
those of a trim, or of quantiles, over the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from magic_fast.engine import Step
from magic_fast.engine.plan.step import over_model
from magic_fast.errors import InputError
from magic_fast.recipe import TrimRule


def refuse_uneven(steps: Sequence[Step]) -> None:
    """Raises:
    InputError: a gradient or a filter gives such a parameter different values.
    """
    first = next((step for step in steps if over_model(step)), None)
    if first is None:
        return
    wanted = _shared(first)
    for step in steps:
        own = {} if step.copy else _shared(step)
        for name, value in own.items():
            if value != wanted[name]:
                raise InputError(
                    f"{name} of method {step.method!r} for '{step.name}': expected "
                    f"{_word(wanted[name])} as for '{first.name}', got {_word(value)}. All tensors "
                    f"are looked at together under {_scope(first)}: give one value, or "
                    f"{_instead(first)}."
                )


def _shared(step: Step) -> Mapping[str, Any]:
    """What the choice over the whole model depends on, by the names of the YAML."""
    recipe = step.recipe
    if recipe is None:
        return {}
    if recipe.trim.rule is TrimRule.COMPETE:
        return {"scope": recipe.trim.scope, "ratio": recipe.trim.density}
    found: dict[str, Any] = {
        "density": recipe.trim.density,
        "rescale": recipe.rescale,
        "align": recipe.align,
    }
    if recipe.needs_majority:  # one sign of all votes
        found |= {"vote": recipe.vote, "weight": recipe.weights}
    return found


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return _word(value[0]) if len(set(value)) == 1 else f"[{', '.join(map(_word, value))}]"
    return f"{value:g}" if isinstance(value, float) else repr(str(value))


def _competes(step: Step) -> bool:
    return step.recipe is not None and step.recipe.trim.rule is TrimRule.COMPETE


def _scope(step: Step) -> str:
    return "scope 'model'" if _competes(step) else f"preset {step.preset!r}"


def _instead(step: Step) -> str:
    return "scope 'tensor'" if _competes(step) else "preset 'default'"
