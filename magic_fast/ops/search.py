"""Selections over data that arrives piece by piece: tensors larger than memory, or a whole model.
No torch is imported here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Protocol

from magic_fast.ops.job import Array, Job
from magic_fast.recipe import Recipe, Selection


class Search(Protocol):
    """The selection of a recipe, found from pieces of the data; the same as with all of it in
    memory.

    Example::

        search = backend.search(recipe, total)
        while ranges := search.wants():
            for start, stop in ranges:
                search.feed(base[start:stop], [e[start:stop] for e in experts], offset=start)
        selection = search.result()
    """

    def sample(self, base: Array | None, experts: Sequence[Array]) -> None:
        """Optional for the caller, before the first ``feed``: data from anywhere."""

    def wants(self) -> list[tuple[int, int]]:
        """Flat ranges [start, stop) to feed now, each element once, in any order and cut; for norm
        factors in whole blocks of 65536 elements, but for the last of a tensor. Empty: finished."""

    def feed(self, base: Array | None, experts: Sequence[Array], *, offset: int) -> None:
        """One piece: contiguous arrays of equal length, whose first element has flat index
        ``offset``. Callers may come from several threads."""

    def result(self) -> Selection:
        """Once nothing more is wanted. Cuts are flat indices of all the data."""


def select_over(jobs: Sequence[Job], search: Callable[[Recipe, int], Search]) -> list[Selection]:
    """The selections of tensors in memory that are trimmed as one, one behind the other in the
    order given.

    Args:
        jobs: of one recipe, arrays of torch.
        search: of a backend.
    """
    sizes = [prod(job.experts[0].shape) for job in jobs]
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    # task masks that are fed in have no part in it
    searching = search(replace(jobs[0].recipe, consensus=None), sum(sizes))

    def part(array: Array | None, first: int, last: int) -> Array | None:
        return None if array is None else array.view(-1)[first:last]

    while ranges := searching.wants():
        for start, stop in ranges:
            for job, offset, size in zip(jobs, starts, sizes, strict=True):
                first, last = max(start - offset, 0), min(stop - offset, size)
                if first < last:
                    experts = [part(expert, first, last) for expert in job.experts]
                    searching.feed(part(job.base, first, last), experts, offset=offset + first)
    whole = searching.result()
    return [cut_for(whole, start, size) for start, size in zip(starts, sizes, strict=True)]


def cut_for(selection: Selection, start: int, numel: int) -> Selection:
    """The part of a selection over many tensors that concerns the one at [start, start + numel)."""

    def local(cuts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(max(c - start, 0), numel) for c in cuts)

    return replace(
        selection,
        tie_cut=local(selection.tie_cut),
        top_tie_cut=local(selection.top_tie_cut),
    )
