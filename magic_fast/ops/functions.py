"""Calibrations that are plain functions (:class:`~magic_fast.recipe.RowFunction`): which backend
runs them, and how. No torch is imported here.

A backend with ``takes_functions = True`` runs them by itself. Every other one does what it can do
(task vectors, the merge, sums of rows), and the function's ξ is applied around it
(:mod:`magic_fast.ops.by_rows`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from magic_fast.ops.job import Job
from magic_fast.ops.limits import slab_unsupported
from magic_fast.recipe import RowFunction

if TYPE_CHECKING:
    from magic_fast.ops.backend import Backend

_WRAPPED: dict[int, Backend] = {}  # by the id of the backend, which it keeps alive


def why_unsupported(backend: Backend, job: Job) -> str | None:
    """The reason a backend cannot run a job, by itself or around a calibration that is a function;
    or None."""
    if _by_itself(backend, job):
        return backend.supports(job)
    c = job.calibration
    assert c is not None and isinstance(c.variant, RowFunction)
    if c.variant.whole:
        return f"the calibration {c.variant.name} looks at whole tensors"
    if c.axes != tuple(range(len(c.axes))):
        return "it calibrates rows along leading axes only"
    if job.directions is not None or job.details:
        return f"the calibration {c.variant.name} takes merges that are recipes only"
    return slab_unsupported(job) or backend.supports(replace(job, calibration=None))


def as_run(backend: Backend, job: Job) -> Backend:
    """What runs a job that the backend supports: the backend, or the same around a function."""
    if _by_itself(backend, job):
        return backend
    found = _WRAPPED.get(id(backend))
    if found is None:
        from magic_fast.ops.by_rows import ByRowSums

        found = _WRAPPED[id(backend)] = ByRowSums(backend)
    return found


def _by_itself(backend: Backend, job: Job) -> bool:
    c = job.calibration
    function = c is not None and isinstance(c.variant, RowFunction)
    return not function or getattr(backend, "takes_functions", False)
