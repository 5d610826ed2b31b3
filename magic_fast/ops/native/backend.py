"""The native backend: every element-wise recipe in one fused pass on the CPU, in C++.

Arrays are contiguous torch CPU tensors or :class:`~magic_fast.ops.job.View`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from magic_fast.errors import BackendError, InputError
from magic_fast.ops.job import Array, Job, Stats
from magic_fast.ops.limits import default_rows, is_contiguous, unfit_arrays, unsupported
from magic_fast.ops.native import directions as native_directions
from magic_fast.ops.native.arrays import code_of, doubles, numel_of
from magic_fast.ops.native.jobs import Call
from magic_fast.ops.native.phases import Phases, of_nothing, thresholds_only
from magic_fast.ops.native.plan import missing
from magic_fast.ops.native.results import RowResults
from magic_fast.ops.native.search import StreamingSelect
from magic_fast.recipe import (
    Align,
    Recipe,
    RowCalibration,
    Selection,
    Weigh,
)

if missing is None:
    from magic_fast import _native

_MOST_EXPERTS = 1024
_MOST_COMPETING = 64


class NativeBackend:
    """Fused C++ loops. f32, f16 and bf16 in any mix; contiguous arrays; every recipe that is not
    reference-only.

    Args:
        threads: 0: ``MAGIC_FAST_NUM_THREADS``, else what machine, affinity and cgroup allow.
        isa: ``baseline``, ``avx2``, ``avx512`` or ``neon``; None: ``MAGIC_FAST_CPU_ISA``, else the
            best.
    """

    name = "native"
    splits = True

    def __init__(self, *, threads: int = 0, isa: str | None = None) -> None:
        self.threads = threads
        self.isa = -1 if isa is None else _native.isa_number(isa)

    def why_not(self) -> str | None:
        if missing is not None:
            return f"not built here ({missing}). Install a C++17 compiler and reinstall."
        try:
            _native.isa()
        except ValueError as e:
            return str(e)
        return None

    def details(self) -> str:
        """Instruction set, threads and build, in words."""
        config = _native.build_config()
        return (
            f"{_native.isa()}, {_native.num_threads()} threads; built by {config['compiler']} "
            f"for {', '.join(config['isas'])}"
        )

    def supports(self, job: Job) -> str | None:
        if reason := unfit_arrays(job):
            return reason
        if len(job.experts) > _MOST_EXPERTS:
            return f"it takes up to {_MOST_EXPERTS} experts, not {len(job.experts)}"
        if job.recipe.weigh is Weigh.SCORE and len(job.experts) > _MOST_COMPETING:
            return f"it counts the scores of up to {_MOST_COMPETING} experts, not more"
        return native_directions.unsupported(job) or unsupported(job)

    # ---- the primitives ----
    def select(self, job: Job) -> Selection:
        recipe, n = job.recipe, numel_of(job.experts[0])
        if not _in_phases(recipe):
            return Selection(*_native.select([Call().job(job)], self.threads, self.isa)[0])
        plain = replace(job, recipe=thresholds_only(recipe), calibration=None)
        selection = Selection(*_native.select([Call().job(plain)], self.threads, self.isa)[0])
        phases = Phases(recipe, n, self.threads, self.isa)
        while phases.pending:
            selection = phases.feed(job, selection)
        return selection if n else of_nothing(recipe, selection)

    def merge(self, job: Job) -> Stats:
        return self.merge_many([job])[0]

    def merge_many(self, jobs: Sequence[Job]) -> list[Stats]:
        call = Call()
        jobs = [self._selected(job) for job in jobs]
        rows = [
            None if j.calibration is None else RowResults(j.calibration.rows, len(j.experts))
            for j in jobs
        ]
        sums = [native_directions.as_sum(j, self.threads, self.isa) for j in jobs]
        fields = [call.job(j, rows=r) for j, r in zip(sums, rows, strict=True)]
        results = _native.merge(fields, self.threads, self.isa)
        found = []
        for job, r, result in zip(jobs, rows, results, strict=True):
            used, kept, first, base, _, overflow = result
            selection = Selection(*used)
            if job.selection is not None:  # what a phase found is not told back
                given = job.selection
                selection = replace(
                    selection, weights=given.weights, alone=given.alone,
                    score_cut=given.score_cut, score_top=given.score_top,
                )  # fmt: skip
            stats = Stats(selection, None, kept, first, base, overflow)
            if r is not None:
                stats.coefficient, stats.extra = r.coefficient, r.extra()
            found.append(native_directions.in_terms_of(job, stats))
        return found

    def _selected(self, job: Job) -> Job:
        """With a selection where passes of their own find it; the others are found on the way."""
        if job.selection is not None or not _in_phases(job.recipe):
            return job
        return replace(job, selection=self.select(job))

    def calibrate(self, job: Job, merged: Array) -> Stats:
        """WSC of a tensor merged elsewhere: one read of base, experts and ``merged``, one write."""
        if job.calibration is None:
            raise BackendError(f"calibrate '{job.name}': expected a calibration, got None.")
        _check_merged(job, merged)
        rows = RowResults(job.calibration.rows, len(job.experts))
        task = Call().job(job, merged=merged, rows=rows)
        _, _, first, base, bad, overflow = _native.merge([task], self.threads, self.isa)[0]
        return Stats(
            selection=Selection.keep_everything(len(job.experts), numel_of(job.experts[0])),
            coefficient=rows.coefficient,
            first_nonfinite=(*first, bad),
            base_nonfinite=base,
            overflow=overflow,
            extra=rows.extra(),
        )

    def row_stats(self, job: Job, merged: Array) -> tuple[Any, Any, Any]:
        _check_merged(job, merged)
        if job.calibration is None:
            job = replace(job, calibration=default_rows(job.experts[0]))
        assert job.calibration is not None
        rows, k, like = job.calibration.rows, len(job.experts), job.experts[0]
        gram, g = doubles(like, rows, k, k)
        dots, d = doubles(like, rows, k)
        norm2, s = doubles(like, rows)
        _native.row_stats(Call().job(job, merged=merged), g, d, s, self.threads, self.isa)
        return gram, dots, norm2

    def scale(self, job: Job, merged: Array, coefficient: Any) -> None:
        _check_merged(job, merged)
        values = array("f", [float(x) for x in coefficient])
        if job.calibration is None:
            cols = numel_of(merged) // max(1, len(values))
            job = replace(job, calibration=RowCalibration(len(values), cols))
        task = Call().job(job, merged=merged)
        _native.scale(task, values.buffer_info()[0], self.threads, self.isa)

    def search(self, recipe: Recipe, total: int, *, name: str = "") -> StreamingSelect:
        return StreamingSelect(recipe, total, name=name, threads=self.threads, isa=self.isa)

    def gram(self, count: int, rows: int) -> native_directions.Gram:
        return native_directions.Gram(count, rows, threads=self.threads, isa=self.isa)

    def row_norms(
        self, x: Array, *, base: Array | None = None, rows: int | None = None
    ) -> tuple[Any, Any, Any]:
        """L1, L2 and L∞ norms, float64 [rows] each, of the rows of ``x`` (of ``x − base`` where a
        base is given).

        Args:
            rows: into how many rows the contiguous array falls (default: its first extent).
        """
        view = default_rows(x)
        if rows is not None:
            view = RowCalibration(rows, numel_of(x) // max(1, rows))
        job = Job(base=base, experts=[x], recipe=Recipe((1.0,)), calibration=view)
        (l1, a), (l2, b), (linf, c) = (doubles(x, view.rows) for _ in range(3))
        _native.row_norms(Call().job(job), a, b, c, self.threads, self.isa)
        return l1, l2, linf

    def kth_magnitude(self, x: Array, k: int, *, base: Array | None = None) -> float:
        """The k-th largest |x| (|x − base|), k from 1, exactly."""
        n = numel_of(x)
        if not 1 <= k <= n:
            raise InputError(f"k of kth_magnitude: expected 1 to {n} (the elements), got {k}.")
        call, recipe = Call(), Recipe((1.0,))
        call.plan(recipe, n, count=k)
        task = call.job(Job(base=base, experts=[x], recipe=recipe))
        threshold: float = _native.select([task], self.threads, self.isa)[0][0][0]
        return threshold


def _in_phases(recipe: Recipe) -> bool:
    """Whether more is needed than the native core finds by itself."""
    aligns = recipe.align is not Align.NONE
    return recipe.needs_variance or recipe.looks_across or aligns


def _check_merged(job: Job, merged: Array) -> None:
    if code_of(merged) is None or not is_contiguous(merged):
        raise BackendError(
            f"merged tensor for '{job.name}': expected contiguous float32, float16 or bfloat16 for "
            f"the native backend, got {merged.dtype}. Use backend='torch'."
        )
