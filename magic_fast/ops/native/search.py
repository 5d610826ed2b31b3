"""Selection over data that arrives piece by piece, on the native backend."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from magic_fast.errors import InternalError
from magic_fast.ops.job import Array, Job, View
from magic_fast.ops.native.jobs import Call
from magic_fast.ops.native.phases import Phases
from magic_fast.recipe import Recipe, Selection

try:
    from magic_fast import _native
except ImportError:  # the backend tells it
    pass


class StreamingSelect:
    """The selection of a recipe, the same as with all data in memory: a
    :class:`~magic_fast.ops.search.Search`.

    The data is one tensor, or several one behind the other (``TrimScope.MODEL``: names sorted);
    flat indices run through. A magnitude trim takes one pass as a rule, more where the sample (or
    the first piece) misled; what ``Recipe.phases`` lists takes one more each. Ranked trims with
    norm factors need pieces of whole ranked rows, so 1-D tensors whole; a trim by variance needs
    the whole tensor in one piece.

    Args:
        recipe: of all the data.
        total: elements of all the data.
        name: of the tensor; keys its random masks.
        threads, isa: as of :class:`~magic_fast.ops.native.backend.NativeBackend`.
    """

    def __init__(
        self, recipe: Recipe, total: int, *, name: str = "", threads: int = 0, isa: int = -1
    ) -> None:
        self._recipe, self._total, self._name = recipe, total, name
        self._threads, self._isa = threads, isa
        empty = [View(0, "F32", (0,))] * recipe.num_experts
        self._search = _native.Search(Call().job(Job(None, empty, recipe, total=total)))
        self._selection: Selection | None = None
        self._phases = Phases(recipe, total, threads, isa)
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
        return [(0, self._total)] if self._phases.pending else []

    def feed(self, base: Array | None, experts: Sequence[Array], *, offset: int) -> None:
        """One piece: contiguous arrays of equal length, whose first element has flat index
        ``offset``. Callers may come from several threads; one works at a time."""
        job = Job(base, experts, self._recipe, name=self._name, offset=offset)
        with self._lock:
            if self._search.wants():
                self._search.feed(Call().job(job, total=self._total), self._threads, self._isa)
                self._advance()
            elif self._phases.pending:
                assert self._selection is not None
                self._selection = self._phases.feed(job, self._selection)

    def result(self) -> Selection:
        """What was found; cuts are flat indices of all the data."""
        if self.wants() or self._selection is None:
            raise InternalError("selection: expected all the data, got a part of it.")
        return self._selection

    def _advance(self) -> None:
        if not self._search.wants():
            self._selection = Selection(*self._search.result())
