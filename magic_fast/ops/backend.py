"""What a backend is. No torch is imported here.

A backend implements four primitives over :class:`~magic_fast.ops.job.Job`: ``select``, ``merge``,
``row_stats`` and ``scale``. ``merge_many`` may be overridden where many small tensors deserve one
call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from magic_fast.ops.job import Array, Job, Stats
from magic_fast.recipe import Selection


class Backend(Protocol):
    """One implementation of the primitives."""

    name: str

    def why_not(self) -> str | None:
        """Why it cannot run here at all, in words a user understands; None if it can."""

    def supports(self, job: Job) -> str | None:
        """Why it cannot run this job; None if it can."""

    def select(self, job: Job) -> Selection:
        """Thresholds, tie cuts, factors and majority sign for ``job.recipe``, one read of the
        data."""

    def merge(self, job: Job) -> Stats:
        """Runs the job into ``job.out``."""

    def merge_many(self, jobs: Sequence[Job]) -> list[Stats]:
        """Runs many jobs, in one call where the backend can."""

    def row_stats(self, job: Job, merged: Array) -> tuple[Any, Any, Any]:
        """gram f64 [rows, K, K], dots f64 [rows, K], norm2 f64 [rows] of the raw task vectors and
        ``merged − base`` (``merged`` itself where base is None), rows by ``job.calibration``."""

    def calibrate(self, job: Job, merged: Array) -> Stats:
        """WSC of a tensor merged elsewhere: base + factor[row]·(merged − base) into ``job.out``;
        rows whose factor is 1 keep the merged values."""

    def scale(self, job: Job, merged: Array, coefficient: Any) -> None:
        """out = base + coefficient[row]·(merged − base), rounded once."""
