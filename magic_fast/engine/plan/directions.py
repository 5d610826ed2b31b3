"""Means of directions in a plan: which vectors of a tensor a step means, and the inner products of
a tensor that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from magic_fast.engine.plan.step import Step
from magic_fast.methods.geometric import GEOMETRIC, Question
from magic_fast.ops.directions import Directions, RowWeights
from magic_fast.ops.job import Array
from magic_fast.ops.native.directions import Gram, weights_of


def directions_of(step: Step) -> Directions | None:
    """What a step asks of its vectors; None where it is of another kind.

    Raises:
        InputError: the method does not take so many models.
    """
    method = GEOMETRIC.get(step.method)
    if method is None or step.copy or step.merged is not None:
        return None
    has_base = step.base is not None
    return method(Question(len(step.experts), has_base, step.arguments, step.preset, step.name))


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


class GramSearch:
    """The weights of a tensor that is one vector a model, fed piece by piece; what wants the data
    is as :class:`~magic_fast.ops.native.search.StreamingSelect` has it."""

    def __init__(self, step: Step) -> None:
        directions = directions_of(step)
        assert directions is not None
        self._step, self._directions = step, directions
        member = directions.member and step.base is not None
        self._split = member and step.calibration is not None
        self._gram = Gram(len(step.experts) + member, 1)
        self._left = step.numel

    def sample(self, base: Array | None, experts: Sequence[Array]) -> None:
        """Nothing is to be learnt from a part."""

    def wants(self) -> list[tuple[int, int]]:
        return [(0, self._step.numel)] if self._left else []

    def feed(self, base: Array | None, experts: Sequence[Array], *, offset: int) -> None:
        """The next piece; all but the last in whole blocks of 65536 elements."""
        base, vectors = self._directions.vectors(base, experts)
        count: int = vectors[0].numel
        self._gram.feed(base, vectors, count, offset=offset)
        self._left -= count
        if self._left == 0 and self._gram.again():
            self._left = self._step.numel

    def weights(self) -> RowWeights:
        """Once nothing more is wanted."""
        cols = self._step.numel
        return weights_of(self._directions, self._gram.values, cols, split=self._split)
