"""Running means and variances: no weights, so no sum of changes."""

from __future__ import annotations

from magic_fast.methods.arguments import resolve_arguments
from magic_fast.methods.presets import build_recipe
from magic_fast.methods.registry import find_method
from magic_fast.recipe import Recipe


def recipe_of_statistics(method: str, num_experts: int) -> Recipe | None:
    """The recipe for running means and variances in a method that adds changes to a base: the
    experts' mean. A sum of changes could make a variance negative. None: the method's own, which
    is a mean."""
    spec = find_method(method)
    if spec.base == "none" or spec.directions is not None or method == "average":
        return None
    arguments = resolve_arguments("average", {}, num_experts, "default")
    return build_recipe("average", num_experts, arguments | {"seed": 0})
