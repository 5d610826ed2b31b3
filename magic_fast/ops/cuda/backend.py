"""The CUDA backend: every element-wise recipe in the compiled kernels of csrc/cuda.

All work goes to the current stream of the tensors' device. Within one call nothing waits for the
device until the end, when one copy brings what the host has to know of all jobs together. With
MAGIC_FAST_CUDA_EMULATED the same sources, compiled for the host, run on CPU tensors, for tests:
then only where asked for by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magic_fast.ops.cuda import rows as cuda_rows
from magic_fast.ops.cuda.calls import emulated, extension
from magic_fast.ops.cuda.rows import Call
from magic_fast.ops.cuda.scans import CudaScans
from magic_fast.ops.cuda.small import Group as CudaGroup
from magic_fast.ops.gpu.backend import GpuBackend
from magic_fast.ops.gpu.jobs import Device, multiprocessors
from magic_fast.ops.gpu.results import Pending
from magic_fast.ops.gpu.small import Group
from magic_fast.ops.job import Array
from magic_fast.recipe import Granularity, RowCalibration
from magic_fast.reference.calibration import RowStats


class CudaBackend(GpuBackend):
    """f32, f16 and bf16 in any mix; contiguous tensors; up to 64 experts; every recipe that is not
    reference-only. ``launch`` can be captured in a CUDA graph and replayed (new values in the same
    tensors, the same recipe), but for calibrations that leave experts out or have one number for a
    tensor, trims by variance, and several small tensors at once (``Group.launch`` of
    small.py can)."""

    name = "cuda"

    def __init__(self) -> None:
        self.devices = ("cpu",) if emulated() else ("cuda",)

    def why_not(self) -> str | None:
        try:
            extension()
        except ImportError as error:
            return (
                f"its kernels were not built ({error}). Reinstall where nvcc is on the PATH; "
                "with MAGIC_FAST_CUDA=1 a build that fails says why"
            )
        if not emulated() and not torch.cuda.is_available():
            return f"no GPU is visible to torch (built for {extension().build()})"
        return None

    def details(self) -> str:
        """How it was built and the device, in words."""
        where = "" if emulated() else f", {torch.cuda.get_device_name()}"
        return f"{extension().build()}{where}"

    # ---- steps of a merge ----
    def scans_of(self, d: Device, pending: Pending) -> CudaScans:
        return CudaScans(d, pending)

    def merge_one(self, d: Device, pending: Pending, merged: Array | None) -> None:
        assert d.job.out is not None
        call = Call(d, pending, merged, d.job.out)
        if d.job.calibration is None:
            cuda_rows.merged(call, 1, d.n, None)
        else:
            pending.rows = cuda_rows.calibrated(call)

    def groups_of(self, devices: Sequence[Device]) -> list[Group]:
        return CudaGroup.of(devices)

    def scale_one(self, d: Device, merged: Array, factors: Tensor) -> None:
        cuda_rows.scaled(Call(d, Pending.empty(d), merged, d.job.out), factors)

    def sums_of(self, d: Device, merged: Array, rows: int, cols: int) -> RowStats:
        call = Call(d, Pending.empty(d), merged)
        return cuda_rows.row_sums(call, RowCalibration(rows, cols), rows, cols)

    def workspace_of(self, d: Device) -> int:
        k, n, c = len(d.experts), d.n, d.job.calibration
        device = d.integers.device
        total = 16 * k + 64
        total += n * d.job.recipe.needs_variance  # the mask
        if c is not None:
            by_row = c.granularity is Granularity.ROW
            total += 8 * c.rows * (k + 3) if by_row else 4 * (k + 1) * (k + 2) * (n // 16384 + 1)
            blocks = 2 * multiprocessors(device)
            total += 8 * blocks * (2 * k * k + (k + 1) * (k + 2) + 4 * (k + 1))
        return total
