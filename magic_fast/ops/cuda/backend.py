"""The CUDA backend: every element-wise recipe in the compiled kernels of csrc/cuda.

All work goes to the current stream of the tensors' device. Within one call nothing waits for the
device until the end, when one copy brings what the host has to know of all jobs together. With
MAGIC_FAST_CUDA_EMULATED the same sources, compiled for the host, run on CPU tensors, for tests:
then only where asked for by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magic_fast.ops.cuda import rows as cuda_rows
from magic_fast.ops.cuda import select as cuda_select
from magic_fast.ops.cuda.calls import emulated, extension
from magic_fast.ops.cuda.rows import Call
from magic_fast.ops.cuda.small import groups_of
from magic_fast.ops.gpu.backend import GpuBackend, merged_rule, on_device_of
from magic_fast.ops.gpu.jobs import (
    Device,
    multiprocessors,
    to_device,
)
from magic_fast.ops.gpu.numbers import VARIED
from magic_fast.ops.gpu.results import NO_INDEX, Pending, no_rows, selection_of
from magic_fast.ops.job import Array, Job
from magic_fast.recipe import Granularity, RowCalibration, Selection, TrimRule
from magic_fast.reference.calibration import RowStats


class CudaBackend(GpuBackend):
    """f32, f16 and bf16 in any mix; contiguous tensors; up to 64 experts; every recipe that is not
    reference-only. ``launch`` can be captured in a CUDA graph and replayed (new values in the same
    tensors, the same recipe), but for calibrations that leave experts out or have one number for a
    tensor, trims by variance, and several small tensors at once (``cuda_many.Group.launch``
    can)."""

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

    # ---- the primitives ----
    def select(self, job: Job) -> Selection:
        with on_device_of(job):
            (d,) = to_device([job])
            cuda_select.prepare(d, _report(d), _kept(d))
            return selection_of(d, d.integers.tolist(), d.floats.tolist())

    def scale(self, job: Job, merged: Array, coefficient: Any) -> None:
        self.check_merged(job, merged)
        assert job.out is not None
        factors = torch.as_tensor(coefficient, dtype=torch.float32, device=merged.device)
        factors = factors.flatten().contiguous()
        if merged.numel() == 0:
            return
        with on_device_of(job):
            # whatever the number of experts: they are not part of it
            d = merged_rule(replace(job, experts=[merged]))
            call = Call(d, _report(d), _kept(d), merged, job.out)
            cuda_rows.scaled(call, factors)

    # ---- steps of a merge ----
    def launch_one(self, d: Device, merged: Array | None = None) -> Pending:
        return _launch(d, merged)

    def launch_small(self, devices: Sequence[Device]) -> dict[int, Pending]:
        return _launch_small(devices)

    def sums_of(self, d: Device, merged: Array, rows: int, cols: int) -> RowStats:
        call = Call(d, _report(d), _kept(d), merged)
        return cuda_rows.row_sums(call, RowCalibration(rows, cols), rows, cols)

    def workspace_of(self, d: Device) -> int:
        return _workspace_bytes(d)


# ---- one job ----
def _report(d: Device) -> Tensor:
    return torch.full((len(d.experts) + 3,), NO_INDEX, dtype=torch.int64, device=d.integers.device)


def _kept(d: Device) -> Tensor:
    return torch.zeros(len(d.experts), dtype=torch.int64, device=d.integers.device)


def _launch(d: Device, merged: Tensor | None = None) -> Pending:
    job = d.job
    call = Call(d, _report(d), _kept(d), merged, job.out)
    if merged is None:
        cuda_select.prepare(d, call.report, call.kept)
    assert job.out is not None
    if d.n == 0:
        return Pending(call.report, call.kept, no_rows(d) if job.calibration is not None else None)
    rows = None
    if job.calibration is None:
        cuda_rows.merged(call, 1, d.n, None)
    else:
        rows = cuda_rows.calibrated(call)
    return Pending(call.report, call.kept, rows)


def _launch_small(devices: Sequence[Device]) -> dict[int, Pending]:
    """Small jobs, one launch for those of one kind."""
    pending = {}
    for group in groups_of(devices):
        group.launch()
        for i, d in enumerate(group.devices):
            pending[id(d)] = Pending(group.report[i], group.kept[i])
    return pending


def _workspace_bytes(d: Device) -> int:
    job, k, n = d.job, len(d.experts), d.n
    device = d.integers.device
    total = 16 * k + 64
    varied = VARIED in d.numbers.kinds
    if d.numbers.targets or varied:
        total += cuda_select.workspace_bytes(k, len(d.numbers.targets) or 1, n, device)
    total += n * varied
    if job.recipe.trim.rule is TrimRule.RANKED:
        total += sum(d.numbers.kinds[i] == 4 for i in range(k)) * n + (64 << 20)
    c = job.calibration
    if c is not None:
        by_row = c.granularity is Granularity.ROW
        total += 8 * c.rows * (k + 3) if by_row else 4 * (k + 1) * (k + 2) * (n // 16384 + 1)
        blocks = 2 * multiprocessors(device)
        total += 8 * blocks * (2 * k * k + (k + 1) * (k + 2) + 4 * (k + 1))
    return total
