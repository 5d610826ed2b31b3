"""Numbers of a recipe, refused where they do not fit."""

from __future__ import annotations

from collections.abc import Sequence

from magic_fast.errors import InputError


def check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def per_expert(value: float | Sequence[float], num_experts: int, what: str) -> tuple[float, ...]:
    """K numbers from one number or K numbers; an error says which parameter had another count."""
    if isinstance(value, int | float):
        return (float(value),) * num_experts
    values = tuple(float(v) for v in value)
    if len(values) != num_experts:
        raise InputError(
            f"{what}: expected one number or one per expert ({num_experts}), got {len(values)}."
        )
    return values
