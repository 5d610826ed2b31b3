"""The coefficients of a mean of directions, from a tensor that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from magic_fast.engine.plan.directions import directions_of
from magic_fast.engine.plan.step import Step
from magic_fast.ops.backend import Capable
from magic_fast.ops.directions import RowWeights, weights_of
from magic_fast.ops.job import Array


class GramSearch:
    """The weights of a tensor that is one vector a model, fed piece by piece in order.

    Args:
        step: a mean of directions.
        backend: one that offers ``gram``.
    """

    def __init__(self, step: Step, backend: Capable) -> None:
        directions = directions_of(step)
        assert directions is not None
        self._step, self._directions = step, directions
        member = directions.member and step.base is not None
        self._split = member and step.calibration is not None
        self._gram = backend.gram(len(step.experts) + member, 1)
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

    def result(self) -> RowWeights:
        """Once nothing more is wanted."""
        cols = self._step.numel
        return weights_of(self._directions, self._gram.values, cols, split=self._split)
