"""What a backend is: what it must do, and what it may do beside. No torch is imported here.

:class:`Backend` is required. Each member of :class:`Capable` is optional: the rooms above ask
:func:`offers` for it, and say what happens without it. A backend that is registered with
``streams=True`` also takes arrays that are a :class:`~magic_fast.ops.job.View` (borrowed memory,
no torch), and jobs over a slab of a tensor (``Job.offset``, ``Job.total``, with the selection
given); checkpoints are then merged by it in pieces. See docs/contributing/add-a-backend.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from magic_fast.ops.job import Array, Job, Stats
from magic_fast.ops.search import Search
from magic_fast.recipe import Recipe, Selection

REQUIRED = ("name", "why_not", "supports", "select", "merge")


class Backend(Protocol):
    """One implementation of the primitives: what every backend has."""

    name: str

    def why_not(self) -> str | None:
        """The reason it cannot run here at all, in words a user understands, or None."""

    def supports(self, job: Job) -> str | None:
        """The reason it cannot run this job, or None. Jobs of every kind come here: float64,
        calibrations, masks, means of directions, parts of tensors."""

    def select(self, job: Job) -> Selection:
        """Thresholds, tie cuts, factors and majority sign for ``job.recipe``, one read of the
        data."""

    def merge(self, job: Job) -> Stats:
        """Runs the job into ``job.out``; ``Stats`` tell of NaN, infinity and overflow."""


class Gram(Protocol):
    """Inner products of K vectors, float64, summed over a tensor that comes in pieces."""

    values: Any  # torch tensor, float64 [rows, K, K]

    def feed(
        self, base: Array | None, experts: Sequence[Array], cols: int, *, offset: int = 0
    ) -> None:
        """Rows of ``cols`` elements; or, of one row, the piece at ``offset``: in order, all but
        the last in whole blocks of 65536 elements."""

    def again(self) -> bool:
        """After the last piece: whether all must be fed once more."""


class Capable(Backend, Protocol):
    """A backend with every optional capability.

    Attributes:
        devices: where its arrays may live, if only the loaded backend knows (else as registered).
        splits: a merge keeps its bits when τ, Δ and base + scale·Δ are merges of their own with
            float32 arrays between them. A sweep then forms τ and Δ once for many scales; without
            it, every merge of a sweep runs alone.
        takes_functions: it runs calibrations that are plain functions by itself. Without it they
            never reach it: their ξ is applied around its merge (:mod:`magic_fast.ops.functions`).
    """

    devices: tuple[str, ...]
    splits: bool
    takes_functions: bool

    def details(self) -> str:
        """Version and device in words, for ``mf.backends()``."""

    def merge_many(self, jobs: Sequence[Job]) -> list[Stats]:
        """Many jobs in one call. Without it: one ``merge`` after the other."""

    def calibrate(self, job: Job, merged: Array) -> Stats:
        """WSC of a tensor merged elsewhere: base + factor[row]·(merged − base) into ``job.out``;
        rows whose factor is 1 keep the merged values. Without it: another backend's."""

    def row_stats(self, job: Job, merged: Array) -> tuple[Any, Any, Any]:
        """gram f64 [rows, K, K], dots f64 [rows, K], norm2 f64 [rows] of the raw task vectors and
        ``merged − base`` (``merged`` itself where base is None), rows by ``job.calibration``.
        Without it: another backend's."""

    def scale(self, job: Job, merged: Array, coefficient: Any) -> None:
        """out = base + coefficient[row]·(merged − base), rounded once. Without it: another
        backend's."""

    def kth_magnitude(self, x: Array, k: int) -> float:
        """The k-th largest |x|, k from 1, exactly. Without it: another backend's, or PyTorch's."""

    def search(self, recipe: Recipe, total: int, *, name: str = "") -> Search:
        """What ``select`` finds, from data that arrives in pieces. Without it: a tensor whose
        recipe needs a selection is held whole, and thresholds of a whole model come from PyTorch.

        Args:
            total: elements of all the data: one tensor, or several one behind the other.
            name: of the one tensor; keys its random masks.
        """

    def gram(self, count: int, rows: int) -> Gram:
        """Inner products of ``count`` vectors in each of ``rows`` rows. Without it: a tensor whose
        coefficients follow from all of it is held whole."""


def offers(backend: Backend, capability: str) -> bool:
    """Whether a backend has a member of :class:`Capable`."""
    return bool(getattr(backend, capability, False))


def merge_many(backend: Backend, jobs: Sequence[Job]) -> list[Stats]:
    """Runs jobs, in one call where the backend can."""
    together = getattr(backend, "merge_many", None)
    if together is None:
        return [backend.merge(job) for job in jobs]
    stats: list[Stats] = together(jobs)
    return stats
