"""Means of directions on the native backend: one read for the inner products, and the weights of
the sum that the second read forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from magic_fast.errors import InternalError
from magic_fast.ops.directions import RowWeights, weights_of
from magic_fast.ops.job import Array, Job, Stats
from magic_fast.ops.native.arrays import numel_of
from magic_fast.ops.native.jobs import Call
from magic_fast.recipe import Recipe, Selection

try:
    from magic_fast import _native
except ImportError:  # the backend tells it
    pass


_SHORT_ROW = 512  # elements; over more of them the errors of float32 sums cancel


def unsupported(job: Job) -> str | None:
    """Why the native backend does not run the directions of a job; None where it does."""
    if job.directions is None:
        return None
    if job.directions.length(job.experts[0].shape) is None:
        return "vectors along dimension 0 are summed in PyTorch"
    whole = job.total is None or job.total == numel_of(job.experts[0])
    if job.directions.axis is None and job.weights is None and not whole:
        return "a part of a tensor needs coefficients found over the whole"
    return None


class Gram:
    """Inner products of K vectors in each row of a tensor, which may come in pieces.

    Args:
        count: K.
        rows: of the tensor.
        threads, isa: as of :class:`~magic_fast.ops.native.backend.NativeBackend`.
    """

    def __init__(self, count: int, rows: int, *, threads: int = 0, isa: int = -1) -> None:
        import torch

        self._threads, self._isa = threads, isa
        self._fed = 0
        self._wide = False
        self.values = torch.zeros(rows, count, count, dtype=torch.float64)

    def feed(
        self, base: Array | None, experts: Sequence[Array], cols: int, *, offset: int = 0
    ) -> None:
        """Rows of ``cols`` elements; or, of one row, the piece at ``offset``: in order, all but
        the last in whole blocks of 65536 elements."""
        if offset != self._fed:
            raise InternalError(f"inner products: expected element {self._fed}, got {offset}.")
        job = Job(base, experts, Recipe((1.0,) * len(experts)))
        wide = self._wide or (offset == 0 and cols < _SHORT_ROW)
        _native.gram(Call().job(job), cols, wide, self.values.data_ptr(), self._threads, self._isa)
        self._fed += numel_of(experts[0])

    def again(self) -> bool:
        """Whether all must be fed once more: a square of float32 overflowed, so now in float64. (A
        NaN or infinity among the elements is none the better for it.)"""
        if self._wide or bool(self.values.isfinite().all()):
            return False
        self._wide, self._fed = True, 0
        self.values.zero_()
        return True


def as_sum(job: Job, threads: int, isa: int) -> Job:
    """A job with directions as a plain sum with weights, which are looked for where they are not
    given; any other job as it is."""
    if job.directions is None:
        return job
    directions, experts = job.directions, list(job.experts)
    member = directions.member and job.base is not None
    split = member and job.calibration is not None
    weights = job.weights or find_weights(job, threads, isa, split=split)
    base = job.base
    if member and not split:
        base, experts = None, [job.base, *experts]
    recipe = Recipe((1.0,) * len(experts))
    return replace(job, base=base, experts=experts, recipe=recipe, weights=weights)


def find_weights(job: Job, threads: int, isa: int, *, split: bool) -> RowWeights:
    """One read of the tensor; two where a square overflows float32."""
    assert job.directions is not None
    cols = job.directions.length(job.experts[0].shape)
    assert cols is not None
    cols = max(cols, 1)
    base, vectors = job.directions.vectors(job.base, job.experts)
    rows = max(numel_of(vectors[0]) // cols, 1)
    gram = Gram(len(vectors), rows, threads=threads, isa=isa)
    gram.feed(base, vectors, cols)
    if gram.again():
        gram.feed(base, vectors, cols)
    return weights_of(job.directions, gram.values, cols, split=split)


def in_terms_of(job: Job, stats: Stats) -> Stats:
    """What was found, as the caller has the job: a base among the experts is the base again."""
    count = len(job.experts)
    if len(stats.first_nonfinite) > count:
        stats.base_nonfinite, *own = stats.first_nonfinite
        stats.first_nonfinite, stats.kept = tuple(own), stats.kept[1:]
        stats.selection = Selection.keep_everything(count, numel_of(job.experts[0]))
    return stats
