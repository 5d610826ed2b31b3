"""Parameters that all tensors of a merge must share, because the tensors compete with one another:
those of a trim, or of quantiles, over the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from magic_fast.engine import Step
from magic_fast.engine.native import over_model
from magic_fast.errors import InputError


def refuse_uneven(steps: Sequence[Step]) -> None:
    """Raises:
    InputError: a gradient or a filter gives such a parameter different values.
    """
    shared = [(step, _shared(step)) for step in steps]
    together = [one for one in shared if one[1]]
    if not together:
        return
    first, wanted = together[0]
    for step, own in shared if first.recipe is None else together:
        for name, value in wanted.items():
            got = step.arguments.get(name) if step.recipe is None else own[name]
            if not step.copy and got != value:
                raise InputError(
                    f"{name} of method {step.method!r} for '{step.name}': expected {_word(value)} "
                    f"as for '{first.name}', got {_word(got)}. All tensors are looked at together "
                    f"under {_scope(step)}: give one value, or {_instead(step)}."
                )


def _shared(step: Step) -> Mapping[str, Any]:
    """What the choice over the whole model depends on, by the names of the YAML; empty where each
    tensor is looked at alone."""
    recipe = step.recipe
    if recipe is None:
        names = ("scope", "ratio") if step.arguments.get("scope") == "model" else ()
        return {name: step.arguments[name] for name in names}
    if not over_model(step):
        return {}
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


def _scope(step: Step) -> str:
    return "scope 'model'" if step.recipe is None else f"preset {step.preset!r}"


def _instead(step: Step) -> str:
    return "scope 'tensor'" if step.recipe is None else "preset 'default'"
