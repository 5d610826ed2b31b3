"""The PyTorch backend: the reference formulas, on any device torch knows. Fallback and oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from magic_fast.ops.directions import Directions
from magic_fast.ops.job import Array, Job, Stats
from magic_fast.ops.slabs import first_nonfinite, join_slabs, slabs_of
from magic_fast.recipe import Granularity, Selection, TrimRule
from magic_fast.reference import calibration as wsc
from magic_fast.reference import merge as reference
from magic_fast.reference.gram import Vectors

_SLAB_ELEMENTS = 1 << 23  # a slab of float32 is 32 MiB: small against any tensor that needs slabs


class TorchBackend:
    """Every recipe, every dtype, every stride; holds about (K + 2) float32 copies of the tensor."""

    name = "torch"
    takes_functions = True

    def why_not(self) -> str | None:
        return None

    def supports(self, job: Job) -> str | None:
        if any(hasattr(a, "ptr") for a in (job.base, *job.experts, job.out) if a is not None):
            return "it takes torch tensors only"
        return None

    def select(self, job: Job) -> Selection:
        return reference.select(
            job.base, job.experts, job.recipe, stream=job.stream, masks=job.masks
        )

    def merge(self, job: Job) -> Stats:
        if job.directions is not None:
            return self.finish(job, self._combine(job, job.directions))
        slabs = self._slabs(job)
        if len(slabs) == 1:
            return self._merge_whole(job)
        selection = job.selection
        if selection is None:
            selection = self.select(job)
        parts = slabs_of(job, slabs, selection)
        return join_slabs([(slab, self._merge_whole(slab)) for slab in parts])

    @staticmethod
    def _slabs(job: Job) -> list[slice]:
        """Rows of a large tensor in blocks, so that the float32 copies stay small; one block where
        the recipe looks at more than a row, or the caller wants the decisions."""
        shape = tuple(job.experts[0].shape)
        n = job.experts[0].numel()
        whole = [slice(None)]
        if n <= _SLAB_ELEMENTS or not shape or job.details or job.recipe.reference_only:
            return whole
        if job.recipe.trim.rank_dim1 and len(shape) > 2:
            return whole
        c = job.calibration
        if c is not None and (c.axes[0] != 0 or c.granularity is not Granularity.ROW):
            return whole
        if c is not None and c.needs_tensors:
            return whole
        if len(shape) == 1 and job.recipe.trim.rule is TrimRule.RANKED:
            return whole
        rows = max(1, _SLAB_ELEMENTS * shape[0] // n)
        return [slice(r, min(r + rows, shape[0])) for r in range(0, shape[0], rows)]

    def _merge_whole(self, job: Job) -> Stats:
        decisions = reference.decide(
            job.base,
            job.experts,
            job.recipe,
            stream=job.stream,
            offset=job.offset,
            masks=job.masks,
            task_masks=job.task_masks,
            selection=job.selection,
        )
        dtype = reference.decision_dtype(job.base, job.experts)
        delta = reference.combine(job.base, job.experts, job.recipe, decisions, dtype=dtype)
        stats = self._finish(job, delta, decisions.selection)
        n = job.experts[0].numel()
        stats.kept = tuple(n if m is None else int(m.sum()) for m in decisions.keep)
        if job.details:
            stats.extra["decisions"] = decisions
        return stats

    @staticmethod
    def _combine(job: Job, directions: Directions) -> Tensor:
        """Nothing waits for the device but what the rule itself waits for."""
        base, vectors = directions.vectors(job.base, job.experts)
        dtype = reference.decision_dtype(base, vectors)
        found = Vectors.of(base, vectors, dtype, directions.axis)
        return found.combine(directions.rule(found.gram()))

    def finish(self, job: Job, merged: Tensor) -> Stats:
        """Calibrates, adds, rounds and checks a tensor that was merged by other means."""
        delta = merged if job.base is None else merged - job.base.to(merged.dtype)
        keep_everything = Selection.keep_everything(len(job.experts), merged.numel())
        if job.calibration is None:
            return self._finish(job, merged, keep_everything, add_base=False)
        return self._finish(job, delta, keep_everything)

    def _finish(
        self, job: Job, delta: Tensor, selection: Selection, *, add_base: bool = True
    ) -> Stats:
        coefficient = None
        extra: dict[str, Any] = {}
        if job.calibration is not None:
            taus = reference.task_vectors(job.base, job.experts, delta.dtype)
            rows = wsc.calibrate_rows(taus, delta, job.calibration)
            delta = wsc.calibrated_change(taus, delta, job.calibration, rows.factor)
            coefficient = rows.raw.float()
            norms2 = wsc.norms2(rows, None if wsc.by_factors(job.calibration) else delta)
            extra = {"repaired": rows.repaired, "norms2": norms2, **wsc.magnitude_of(norms2)}
        assert job.out is not None
        return Stats(
            selection=selection,
            coefficient=coefficient,
            overflow=self._store(job.base if add_base else None, delta, job.out),
            first_nonfinite=tuple(first_nonfinite(e) for e in job.experts),
            base_nonfinite=-1 if job.base is None else first_nonfinite(job.base),
            extra=extra,
        )

    def merge_many(self, jobs: Sequence[Job]) -> list[Stats]:
        return [self.merge(job) for job in jobs]

    @staticmethod
    def _store(base: Array | None, delta: Tensor, out: Tensor) -> int:
        """out = base + delta, rounded once; flat index of the first finite value that overflowed,
        or −1."""
        result = delta if base is None else base.to(delta.dtype) + delta
        out.copy_(result)
        overflowed = torch.isinf(out) & torch.isfinite(result)
        return int(overflowed.flatten().nonzero()[0]) if bool(overflowed.any()) else -1

    def row_stats(self, job: Job, merged: Array) -> tuple[Tensor, Tensor, Tensor]:
        dtype = reference.decision_dtype(job.base, [*job.experts, merged])
        *taus, delta = reference.task_vectors(job.base, [*job.experts, merged], dtype)
        axes = job.calibration.axes if job.calibration is not None else (0,)
        stats = wsc.row_stats([wsc.row_view(t, axes) for t in taus], wsc.row_view(delta, axes))
        return stats.gram, stats.dots, stats.norm2

    def calibrate(self, job: Job, merged: Array) -> Stats:
        """WSC of a tensor merged elsewhere: out = base + factor[row]·(merged − base)."""
        assert job.calibration is not None and job.out is not None
        dtype = reference.decision_dtype(job.base, [*job.experts, merged])
        *taus, delta = reference.task_vectors(job.base, [*job.experts, merged], dtype)
        rows, changed = wsc.calibrate_rows(taus, delta, job.calibration), None
        if not wsc.by_factors(job.calibration):
            changed = wsc.calibrated_change(taus, delta, job.calibration, rows.factor)
            overflow = self._store(job.base, changed, job.out)
        elif bool((rows.factor == 1).all()):
            job.out.copy_(
                merged
            )  # nothing acts: the merged weights as they are, not base + (merged − base)
            overflow = -1
        else:
            overflow = self._scaled(job, merged, delta, rows.factor)
        k = len(taus)
        return Stats(
            selection=Selection.keep_everything(k, delta.numel()),
            coefficient=rows.raw.float(),
            first_nonfinite=(*(first_nonfinite(e) for e in job.experts), first_nonfinite(merged)),
            base_nonfinite=-1 if job.base is None else first_nonfinite(job.base),
            overflow=overflow,
            extra={"repaired": rows.repaired, **wsc.magnitude_of(wsc.norms2(rows, changed))},
        )

    def _scaled(self, job: Job, merged: Tensor, delta: Tensor, factor: Tensor) -> int:
        """Rows of factor 1 keep the merged bits; the others are base + factor·delta."""
        assert job.calibration is not None and job.out is not None
        scaled = torch.empty_like(job.out)
        overflow = self._store(
            job.base, wsc.apply_rows(delta, factor, job.calibration.axes), scaled
        )
        acts = wsc.apply_rows(torch.ones_like(delta), (factor != 1).double(), job.calibration.axes)
        job.out.copy_(torch.where(acts != 0, scaled, merged.to(scaled.dtype)))
        return overflow

    def scale(self, job: Job, merged: Array, coefficient: Array) -> None:
        """out = base + coefficient[row]·(merged − base)."""
        dtype = reference.decision_dtype(job.base, [merged])
        delta = reference.task_vectors(job.base, [merged], dtype)[0]
        axes = job.calibration.axes if job.calibration is not None else (0,)
        assert job.out is not None
        self._store(job.base, wsc.apply_rows(delta, coefficient.double(), axes), job.out)
