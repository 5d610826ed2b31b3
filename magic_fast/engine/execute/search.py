"""Thresholds of tensors that do not fit into memory, and coefficients of means of directions: fed
piece by piece, in one pass as a rule."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

from magic_fast import ops
from magic_fast.engine.plan.directions import directions_of
from magic_fast.engine.plan.step import Step
from magic_fast.engine.plan.units import SUM_BLOCK, Piece, Unit, group, piece_bytes, search_grain
from magic_fast.ops.backend import Capable
from magic_fast.ops.directions import RowWeights, weights_of
from magic_fast.ops.job import Array, View
from magic_fast.ops.search import cut_for

_SAMPLES = 16
_SAMPLE_ELEMENTS = 1 << 14  # of each: 16 of them pin a threshold to a few thousandths of the ranks


class Wanting(Protocol):
    """What is found from all the data, fed piece by piece."""

    def sample(self, base: Array | None, experts: Sequence[Array]) -> None:
        """Data from anywhere, before the first pass."""

    def wants(self) -> list[tuple[int, int]]:
        """Ranges to feed now; none: finished."""

    def feed(self, base: Array | None, experts: Sequence[Array], *, offset: int) -> None:
        """One piece."""

    def result(self) -> Any:
        """Once nothing more is wanted."""


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


class StreamedSearch:
    """The selections of one tensor, or of all tensors at once (scope ``model``), for one recipe or
    several; or the weights of one tensor whose coefficients follow from all of it.

    The tensors lie one behind the other, in the order given; ``units`` yields what to read and
    waits, between passes, for what the pieces have shown. What one recipe reads, all are fed.

    Args:
        ways: for each recipe its steps, the same tensors in each; or one step of a mean of
            directions.
        slot_bytes: size of a unit.
        wait: blocks until an event is set (and leaves when the run has failed).
        backend: name of the one that finds it.
    """

    def __init__(
        self,
        ways: Sequence[Sequence[Step]],
        slot_bytes: int,
        wait: Callable[[threading.Event], None],
        backend: str,
    ) -> None:
        self._steps = steps = max(ways, key=lambda steps: search_grain(steps[0]))
        self._slot_bytes = slot_bytes
        self._wait = wait
        ends = [0, *accumulate(step.numel for step in steps)]
        self._starts = dict(zip((step.name for step in steps), ends, strict=False))
        self._total = ends[-1]
        recipe, found = steps[0].recipe, ops.implementation(backend)
        self._searches: list[Wanting]
        if recipe is None:
            self._searches = [GramSearch(steps[0], found)]
        else:  # a tensor alone has random masks by its name
            name = steps[0].name if len(steps) == 1 else ""
            recipes = [w[0].recipe or recipe for w in ways]
            self._searches = [found.search(r, self._total, name=name) for r in recipes]
        self._active = self._searches
        self._sampled = False
        self._by_magnitude = recipe is not None and recipe.trim.by_magnitude
        self._outstanding = 0
        self._fed = threading.Event()
        self._lock = threading.Lock()

    def units(self) -> Iterator[Unit]:
        """Units to load and feed, until nothing more is wanted."""
        yield from self._sample()
        while ranges := self._wants():
            batches = list(group(self._pieces(ranges), self._slot_bytes))
            with self._lock:
                self._outstanding = len(batches)
            self._fed.clear()
            for pieces in batches:
                yield self._unit(pieces)
            self._wait(self._fed)

    def _wants(self) -> list[tuple[int, int]]:
        """What to feed now, to the searches that want the same."""
        wanted = [search.wants() for search in self._searches]
        ranges = next((w for w in wanted if w), [])
        pairs = zip(self._searches, wanted, strict=True)
        self._active = [search for search, w in pairs if w == ranges]
        return ranges

    def _unit(self, pieces: tuple[Piece, ...]) -> Unit:
        """In a slot, or in memory of its own where the smallest piece needs more than a slot."""
        fits = sum(p.nbytes for p in pieces) <= self._slot_bytes
        return Unit(pieces, streamed=fits, search=self)

    def _sample(self) -> Iterator[Unit]:
        """Where magnitudes decide, blocks spread over the tensors: with them one pass over
        everything is enough as a rule."""
        if not self._by_magnitude:
            self._sampled = True
            return
        apart = max(-(-self._total // _SAMPLES), SUM_BLOCK)
        per_element = max(_bytes_per_element(step) for step in self._steps)
        count = min(_SAMPLE_ELEMENTS, int(self._slot_bytes * 0.9 / per_element) // _SAMPLES)
        ranges = [(s, min(s + count, self._total)) for s in range(0, self._total, apart)]
        self._outstanding = 1
        yield self._unit(tuple(self._pieces(ranges)))
        self._wait(self._fed)

    def _pieces(self, ranges: Sequence[tuple[int, int]]) -> list[Piece]:
        """Ranges of the concatenation as pieces of the tensors, none larger than a slot."""
        found = []
        for step in self._steps:
            offset = self._starts[step.name]
            count = self._most(step)
            for start, stop in ranges:
                first, last = max(start - offset, 0), min(stop - offset, step.numel)
                found += [Piece(step, s, min(s + count, last)) for s in range(first, last, count)]
        return found

    def _most(self, step: Step) -> int:
        """Elements of a step that fit into a slot, and may be looked at together."""
        unit = search_grain(step)
        return max(int(self._slot_bytes * 0.98 / _bytes_per_element(step)) // unit, 1) * unit

    def feed(self, arrays: Sequence[Sequence[View]], pieces: Sequence[Piece]) -> None:
        """The data of one unit."""
        for views, piece in zip(arrays, pieces, strict=True):
            base, experts = (views[0], views[1:]) if piece.step.base is not None else (None, views)
            start = self._starts[piece.step.name] + piece.start
            for search in self._active:
                if self._sampled:
                    search.feed(base, experts, offset=start)
                else:
                    search.sample(base, experts)
        self._sampled = True
        with self._lock:
            self._outstanding -= 1
            if self._outstanding == 0:
                self._fed.set()

    def results(self) -> list[dict[str, Any]]:
        """Of each recipe: a selection per tensor, tie cuts counted inside it; or the weights of the
        one tensor."""
        found = []
        for search in self._searches:
            whole = search.result()
            found.append({
                s.name: whole if s.recipe is None else cut_for(whole, self._starts[s.name], s.numel)
                for s in self._steps
            })  # fmt: skip
        return found


def _bytes_per_element(step: Step) -> float:
    return piece_bytes(step, SUM_BLOCK) / SUM_BLOCK
