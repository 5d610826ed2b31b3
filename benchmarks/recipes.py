"""The recipes that the benchmarks of every device time."""

from __future__ import annotations

from magic_fast.recipe import Contributors, Recipe, Reduce, Rescale, Trim, TrimRule, Vote


def recipes(k: int) -> dict[str, Recipe]:
    """The methods of the table, for ``k`` experts."""
    ones = (1.0,) * k
    voted = {"vote": Vote.MASS, "contributors": Contributors.AGREEING}
    return {
        "task_arithmetic": Recipe((0.3,) * k),
        "ties": Recipe(
            ones,
            Trim(TrimRule.MAGNITUDE, density=(0.2,) * k),
            reduce=Reduce.WEIGHTED_MEAN,
            **voted,
        ),
        "dare_ties": Recipe(
            ones,
            Trim(TrimRule.RANDOM, density=(0.5,) * k, seed=42),
            rescale=Rescale.KEEP_PROBABILITY,
            **voted,
        ),
        "della": Recipe(
            ones,
            Trim(TrimRule.RANKED, density=(0.5,) * k, epsilon=(0.15,) * k, seed=42),
            reduce=Reduce.WEIGHTED_MEAN,
            **voted,
        ),
    }
