"""Means of directions in a plan: which vectors of a tensor a step means."""

from __future__ import annotations

from magic_fast.engine.plan.step import Step
from magic_fast.methods.registry import find_step
from magic_fast.methods.spec import Question
from magic_fast.ops.directions import Directions


def directions_of(step: Step) -> Directions | None:
    """What a step asks of its vectors; None where it is of another kind.

    Raises:
        InputError: the method does not take so many models.
    """
    if step.recipe is not None or step.copy or step.merged is not None:
        return None
    directions = find_step(step.method).directions
    if directions is None:
        return None
    has_base = step.base is not None
    return directions(Question(len(step.experts), has_base, step.arguments, step.preset, step.name))


def vector_length(step: Step) -> int | None:
    """Elements of each vector, where there is one in each row; None where the tensor is one
    vector, or the step is of another kind."""
    directions = directions_of(step)
    if directions is None or directions.axis is None or len(step.shape) < 2:
        return None
    return directions.length(step.shape)


def needs_whole(step: Step) -> bool:
    """Whether the coefficients of a step follow from all of its tensor."""
    return directions_of(step) is not None and vector_length(step) is None
