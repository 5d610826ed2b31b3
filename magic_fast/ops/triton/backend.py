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

import torch
from torch import Tensor

from magic_fast.ops.gpu.backend import GpuBackend
from magic_fast.ops.gpu.jobs import Device
from magic_fast.ops.gpu.results import Pending
from magic_fast.ops.gpu.select import Scans
from magic_fast.ops.gpu.small import Group
from magic_fast.ops.job import Array
from magic_fast.reference.calibration import RowStats

try:
    import triton

    from magic_fast.kernels import launch
    from magic_fast.ops.triton import rows as triton_rows
    from magic_fast.ops.triton import scans as triton_scans
    from magic_fast.ops.triton import small as triton_small
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

    # ---- steps of a merge ----
    def scans_of(self, d: Device, pending: Pending) -> Scans:
        return triton_scans.TritonScans(d)

    def merge_one(self, d: Device, pending: Pending, merged: Array | None) -> None:
        assert d.job.out is not None
        like = d.experts[0] if merged is None else merged
        sources = triton_rows.Sources(d, like, d.job.out, pending.report, merged is not None)
        if d.job.calibration is None:
            counts: Tensor | None = triton_rows.merged_blocks(sources, 1, d.n, None)
        else:
            pending.rows = triton_rows.calibrated(sources)
            counts = pending.rows.counts
        if merged is None and any(d.numbers.kinds):
            assert counts is not None
            pending.kept = counts.sum(0, dtype=torch.int64)

    def groups_of(self, devices: Sequence[Device]) -> list[Group]:
        return triton_small.Group.of(devices)

    def scale_one(self, d: Device, merged: Array, factors: Tensor) -> None:
        assert d.job.out is not None
        triton_rows.scaled(d, merged, d.job.out, factors)

    def sums_of(self, d: Device, merged: Array, rows: int, cols: int) -> RowStats:
        sources = triton_rows.Sources(d, merged, merged, Pending.empty(d).report, False)
        return triton_rows.row_sums(sources, rows, cols, p=2, wide=False)

    def workspace_of(self, d: Device) -> int:
        job, k, n = d.job, len(d.experts), d.n
        blocks = -(-n // launch.block_shape(k, d.widest, d.trims).block)
        total: int = 4 * k * blocks  # counts of kept entries
        if job.recipe.alone is not None:
            total += 8 * k * blocks
        if job.calibration is not None:
            total += 8 * job.calibration.rows * (k + 1) * (k + 2)
        return total
