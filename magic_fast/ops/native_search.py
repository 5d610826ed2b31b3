"""Selection over data that arrives piece by piece: tensors larger than memory, or a whole model."""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from magic_fast.errors import InternalError
from magic_fast.ops.backend import Array, Job, View
from magic_fast.ops.native_jobs import Call, numel_of
from magic_fast.recipe import Recipe, Rescale, Selection, TrimRule

try:
    from magic_fast import _native
except ImportError:  # the backend tells it
    pass

_BLOCK = 65536  # elements; sums over a tensor are float64 partials of so many, added in order
_TINY_NORM = 1e-7  # below it a norm is not restored


class StreamingSelect:
    """Thresholds, factors and majority sign of a recipe, the same as with all data in memory.

    The data is one tensor, or several one behind the other (``TrimScope.MODEL``: names sorted);
    flat indices run through. A magnitude trim takes one pass as a rule, more where the sample (or
    the first piece) misled; norm factors and the majority sign take one more each. Ranked trims
    with norm factors need pieces of whole ranked rows, so 1-D tensors whole.

    Example::

        search = StreamingSelect(recipe, total)
        while ranges := search.wants():
            for start, stop in ranges:
                search.feed(base[start:stop], [e[start:stop] for e in experts], offset=start)
        selection = search.result()

    Args:
        recipe: of all the data.
        total: elements of all the data.
        name: of the tensor; keys its random masks.
        threads, isa: as of :class:`~magic_fast.ops.native.NativeBackend`.
    """

    def __init__(
        self, recipe: Recipe, total: int, *, name: str = "", threads: int = 0, isa: int = -1
    ) -> None:
        self._recipe, self._total, self._name = recipe, total, name
        self._threads, self._isa = threads, isa
        empty = [View(0, "F32", (0,))] * recipe.num_experts
        self._search = _native.Search(Call().job(Job(None, empty, recipe, total=total)))
        self._selection: Selection | None = None
        self._phases = [
            phase
            for phase, needed in (
                ("factors", recipe.needs_factors),
                ("majority", recipe.needs_majority),
            )
            if needed and total > 0
        ]
        self._fed = 0
        self._norms: list[tuple[int, Any, Any]] = []
        self._votes = 0
        self._lock = threading.Lock()
        self._advance()

    def sample(self, base: Array | None, experts: Sequence[Array]) -> None:
        """Optional, before the first ``feed``: data from anywhere. A fair sample of the whole makes
        one pass enough as a rule."""
        self._search.sample(Call().job(Job(base, experts, self._recipe)))

    def wants(self) -> list[tuple[int, int]]:
        """Flat ranges [start, stop) to feed now, each element once, in any order and cut; for norm
        factors in whole blocks of 65536 elements, but for the last of a tensor. Empty: finished."""
        ranges: list[tuple[int, int]] = self._search.wants()
        if ranges:
            return ranges
        return [(0, self._total)] if self._phases else []

    def feed(self, base: Array | None, experts: Sequence[Array], *, offset: int) -> None:
        """One piece: contiguous arrays of equal length, whose first element has flat index
        ``offset``. Callers may come from several threads; one works at a time."""
        job = Job(base, experts, self._recipe, name=self._name, offset=offset)
        with self._lock:
            if self._search.wants():
                self._search.feed(Call().job(job, total=self._total), self._threads, self._isa)
                self._advance()
            elif self._phases:
                self._feed_phase(job)

    def _feed_phase(self, job: Job) -> None:
        job.selection = self._selection
        piece = Call().job(job, total=self._total)
        numel = numel_of(job.experts[0])
        if self._phases[0] == "factors":
            self._norms.append((job.offset, *self._norm_sums(piece, numel)))
        else:
            self._votes += _native.vote_sum(piece, self._threads, self._isa)
        self._fed += numel
        if self._fed >= self._total:
            self._end_phase()

    def result(self) -> Selection:
        """What was found; cuts are flat indices of all the data."""
        if self.wants() or self._selection is None:
            raise InternalError("selection: expected all the data, got a part of it.")
        return self._selection

    def _advance(self) -> None:
        if not self._search.wants():
            self._selection = Selection(*self._search.result())

    def _norm_sums(self, piece: tuple[Any, ...], numel: int) -> tuple[Any, Any]:
        size = 8 * self._recipe.num_experts * -(-numel // _BLOCK)
        before, after = array("d", bytes(size)), array("d", bytes(size))
        _native.norm_sums(
            piece, before.buffer_info()[0], after.buffer_info()[0], self._threads, self._isa
        )
        return before, after

    def _end_phase(self) -> None:
        phase = self._phases.pop(0)
        self._fed = 0
        assert self._selection is not None
        if phase == "factors":
            self._selection = replace(self._selection, factor=self._factors())
        else:
            sign = (self._votes > 0) - (self._votes < 0)
            self._selection = replace(self._selection, majority=sign)

    def _factors(self) -> tuple[float, ...]:
        recipe, k = self._recipe, self._recipe.num_experts
        self._norms.sort(key=lambda entry: entry[0])
        factors = []
        for expert in range(k):
            before = after = 0.0
            for _, b, a in self._norms:
                for x, y in zip(b[expert::k], a[expert::k], strict=True):
                    if recipe.rescale is Rescale.LINF:
                        before, after = max(before, x), max(after, y)
                    else:
                        before, after = before + x, after + y
            if recipe.rescale is Rescale.L2:
                before, after = math.sqrt(before), math.sqrt(after)
            trimmed = recipe.trim.active(expert) or recipe.trim.rule is TrimRule.GIVEN
            usable = trimmed and before >= _TINY_NORM and after >= _TINY_NORM
            factors.append(array("f", [before / after])[0] if usable else 1.0)
        return tuple(factors)


def cut_for(selection: Selection, start: int, numel: int) -> Selection:
    """The part of a selection over many tensors that concerns the one at [start, start + numel)."""

    def local(cuts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(max(c - start, 0), numel) for c in cuts)

    return replace(
        selection,
        tie_cut=local(selection.tie_cut),
        top_tie_cut=local(selection.top_tie_cut),
    )
