"""The Triton backend: every element-wise recipe in fused kernels on a GPU (magic_fast/kernels).

All work goes to the current stream of the tensors' device. Within one call nothing waits for the
device until the end, when one copy brings what the host has to know (counts, thresholds, first
non-finite indices) of all jobs together; ``manifold_exact`` may wait inside torch's eigenvalue
solver, and a trim by variance waits for the number of entries that vary. With
``TRITON_INTERPRET=1`` the same kernels run on CPU tensors, in Python, for tests: then only where
asked for by name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magic_fast.ops.gpu.backend import GpuBackend, on_device_of
from magic_fast.ops.gpu.jobs import Device, everything, to_device
from magic_fast.ops.gpu.results import NO_INDEX, Pending, no_rows, selection_of
from magic_fast.ops.job import Array, Job
from magic_fast.recipe import Selection, TrimRule
from magic_fast.reference.calibration import RowStats

try:
    import triton

    from magic_fast.kernels import launch
    from magic_fast.ops.triton import rows as triton_rows
    from magic_fast.ops.triton import select as triton_select
    from magic_fast.ops.triton.small import groups_of
except ImportError as error:  # remembered: the backend tells it
    missing: str | None = str(error)
else:
    missing = None


def interpreted() -> bool:
    """Whether the kernels were loaded to run in Python."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


class TritonBackend(GpuBackend):
    """f32, f16 and bf16 in any mix; contiguous tensors; up to 64 experts; every recipe that is not
    reference-only."""

    name = "triton"

    def __init__(self) -> None:
        self.interpreted = interpreted()
        self.devices = ("cpu",) if self.interpreted else ("cuda",)

    def why_not(self) -> str | None:
        if missing is not None:
            return f"Triton cannot be imported ({missing}). Install triton."
        if not self.interpreted and not torch.cuda.is_available():
            return "no GPU is visible to torch (TRITON_INTERPRET=1 runs the kernels on the CPU)"
        return None

    def details(self) -> str:
        """Version and device, in words."""
        where = "interpreted" if self.interpreted else torch.cuda.get_device_name()
        return f"Triton {triton.__version__}, {where}"

    # ---- the primitives ----
    def select(self, job: Job) -> Selection:
        with on_device_of(job):
            (d,) = to_device([job])
            triton_select.prepare(d)
            return selection_of(d, d.integers.tolist(), d.floats.tolist())

    def scale(self, job: Job, merged: Array, coefficient: Any) -> None:
        self.check_merged(job, merged)
        assert job.out is not None
        factors = torch.as_tensor(coefficient, dtype=torch.float32, device=merged.device)
        factors = factors.flatten().contiguous()
        if merged.numel() == 0:
            return
        with on_device_of(job):
            (d,) = to_device([replace(job, selection=everything(job))])
            triton_rows.scaled(d, merged, job.out, factors.numel(), factors)

    # ---- steps of a merge ----
    def launch_one(self, d: Device, merged: Array | None = None) -> Pending:
        return _launch(d, merged)

    def launch_small(self, devices: Sequence[Device]) -> dict[int, Pending]:
        return _launch_small(devices)

    def sums_of(self, d: Device, merged: Array, rows: int, cols: int) -> RowStats:
        sources = triton_rows.Sources(d, merged, merged, _report(d), False)
        return triton_rows.row_sums(sources, rows, cols, p=2, wide=False)

    def workspace_of(self, d: Device) -> int:
        return _workspace_bytes(d)


# ---- one job ----
def _report(d: Device) -> Tensor:
    return torch.full((len(d.experts) + 3,), NO_INDEX, dtype=torch.int64, device=d.base.device)


def _launch(d: Device, merged: Tensor | None = None) -> Pending:
    job, k = d.job, len(d.experts)
    report = _report(d)
    kept = torch.zeros(k, dtype=torch.int64, device=d.base.device)
    if merged is None:
        triton_select.prepare(d)
    assert job.out is not None
    if d.n == 0:
        return Pending(report, kept, no_rows(d) if job.calibration is not None else None)
    like = d.experts[0] if merged is None else merged
    sources = triton_rows.Sources(d, like, job.out, report, merged is not None)
    rows = None
    if job.calibration is None:
        counts = triton_rows.merged_blocks(sources, 1, d.n, None)
    else:
        rows = triton_rows.calibrated(sources)
        counts = rows.counts
    if merged is None and any(d.numbers.kinds):
        kept = counts.sum(0, dtype=torch.int64)
    return Pending(report, kept, rows)


def _launch_small(devices: Sequence[Device]) -> dict[int, Pending]:
    """Small jobs, one launch for those of one kind."""
    pending = {}
    for group in groups_of(devices):
        group.launch()
        kept = group.kept() if any(group.devices[0].numbers.kinds) else group.report
        for i, d in enumerate(group.devices):
            pending[id(d)] = Pending(group.report[i], kept[i][: group.k])
    return pending


def _workspace_bytes(d: Device) -> int:
    job, k, n = d.job, len(d.experts), d.n
    shape = launch.block_shape(k, d.widest, d.trims)
    total: int = 4 * k * -(-n // shape.block)  # counts of kept entries
    if d.numbers.targets or job.recipe.needs_variance:
        targets = len(d.numbers.targets) or 1
        total += triton_select.workspace_bytes(k, targets, n, d.base.device)
    if job.recipe.alone is not None:
        total += 8 * k * -(-n // shape.block)
    if job.recipe.trim.rule is TrimRule.RANKED:
        total += sum(d.numbers.kinds[i] == 4 for i in range(k)) * n + (64 << 20)
    if job.calibration is not None:
        total += 8 * job.calibration.rows * (k + 1) * (k + 2)
    return total
