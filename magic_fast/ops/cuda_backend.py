"""The CUDA backend: every element-wise recipe in the compiled kernels of csrc/cuda.

All work goes to the current stream of the tensors' device. Within one call nothing waits for the
device until the end, when one copy brings what the host has to know of all jobs together. With
MAGIC_FAST_CUDA_EMULATED the same sources, compiled for the host, run on CPU tensors, for tests:
then only where asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magic_fast.errors import BackendError
from magic_fast.ops import cuda_rows, cuda_select
from magic_fast.ops.backend import Array, Job, Stats, View
from magic_fast.ops.cuda_calls import emulated, extension
from magic_fast.ops.cuda_many import groups_of, small
from magic_fast.ops.cuda_rows import Call
from magic_fast.ops.gpu_jobs import (
    MERGED_RULE,
    Device,
    everything,
    multiprocessors,
    to_device,
    unfit,
)
from magic_fast.ops.gpu_results import NO_INDEX, Pending, collect, no_rows, selection_of
from magic_fast.ops.limits import default_rows, unsupported
from magic_fast.recipe import Granularity, RowCalibration, Selection, TrimRule

MOST_EXPERTS = 64


class CudaBackend:
    """f32, f16 and bf16 in any mix; contiguous tensors; up to 64 experts; every recipe that is not
    reference-only."""

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
            return "no GPU is visible to torch"
        return None

    def details(self) -> str:
        """How it was built and the device, in words."""
        where = "" if emulated() else f", {torch.cuda.get_device_name()}"
        return f"{extension().build()}{where}"

    def supports(self, job: Job) -> str | None:
        if reason := unfit(job):
            return reason
        if len(job.experts) > MOST_EXPERTS:
            return f"it takes up to {MOST_EXPERTS} experts, not {len(job.experts)}"
        return unsupported(job)

    # ---- the primitives ----
    def select(self, job: Job) -> Selection:
        with _on(job):
            (d,) = to_device([job])
            cuda_select.prepare(d, _report(d), _kept(d))
            return selection_of(d, d.integers.tolist(), d.floats.tolist())

    def merge(self, job: Job) -> Stats:
        return self.merge_many([job])[0]

    def merge_many(self, jobs: Sequence[Job]) -> list[Stats]:
        if not jobs:
            return []
        devices = self.prepare(jobs)
        return self.finish(devices, self.launch(devices))

    # ---- the same in three steps ----
    def prepare(self, jobs: Sequence[Job]) -> list[Device]:
        """The numbers of the recipes, copied to the device."""
        with _on(jobs[0]):
            return to_device(jobs)

    def launch(self, devices: Sequence[Device]) -> list[Pending]:
        """Everything onto the current stream; waits for nothing, copies nothing from the host but
        for calibrations that leave experts out or have one number for a tensor. Can be captured in
        a CUDA graph and replayed: new values in the same tensors, the same recipe."""
        with _on(devices[0].job):
            many = [d for d in devices if small(d)]
            found = _launch_small(many) if len(many) > 1 else {}
            return [found.get(id(d)) or _launch(d) for d in devices]

    def finish(self, devices: Sequence[Device], pending: Sequence[Pending]) -> list[Stats]:
        """What the host has to know of all jobs, in one copy; waits for it."""
        return collect(devices, pending)

    def calibrate(self, job: Job, merged: Array) -> Stats:
        """WSC of a tensor merged elsewhere: base + factor[row]·(merged − base)."""
        _check_merged(job, merged)
        if job.calibration is None:
            raise BackendError(f"calibrate '{job.name}': expected a calibration, got None.")
        with _on(job):
            d = _merged_rule(job)
            (stats,) = collect([d], [_launch(d, merged)])
        stats.selection = everything(job)
        stats.first_nonfinite = (*stats.first_nonfinite, stats.extra.pop("merged_nonfinite"))
        stats.kept = ()
        return stats

    def row_stats(self, job: Job, merged: Array) -> tuple[Any, Any, Any]:
        _check_merged(job, merged)
        view = job.calibration or default_rows(job.experts[0])
        k = len(job.experts)
        if view.rows * view.cols == 0:
            room = {"dtype": torch.float64, "device": merged.device}
            zeros = torch.zeros((view.rows, k + 1, k + 1), **room)
            return zeros[:, :k, :k], zeros[:, :k, k], zeros[:, k, k]
        with _on(job):
            d = _merged_rule(job)
            plain = RowCalibration(view.rows, view.cols)
            call = Call(d, _report(d), _kept(d), merged)
            stats = cuda_rows.row_sums(call, plain, view.rows, view.cols)
        return stats.gram, stats.dots, stats.norm2

    def scale(self, job: Job, merged: Array, coefficient: Any) -> None:
        _check_merged(job, merged)
        assert job.out is not None
        factors = torch.as_tensor(coefficient, dtype=torch.float32, device=merged.device)
        factors = factors.flatten().contiguous()
        if merged.numel() == 0:
            return
        with _on(job):
            # whatever the number of experts: they are not part of it
            d = _merged_rule(replace(job, experts=[merged]))
            call = Call(d, _report(d), _kept(d), merged, job.out)
            cuda_rows.scaled(call, factors)

    def workspace_bytes(self, job: Job) -> int:
        """Bytes of device memory that a merge of ``job`` takes beside inputs and output."""
        with _on(job):
            return _workspace_bytes(to_device([job])[0])


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


def _merged_rule(job: Job) -> Device:
    """The job with d = merged − base instead of its recipe."""
    (d,) = to_device([replace(job, selection=everything(job), masks=None, task_masks=None)])
    d.numbers.rule = MERGED_RULE
    d.numbers.kinds = (0,) * len(d.experts)
    return d


def _workspace_bytes(d: Device) -> int:
    job, k, n = d.job, len(d.experts), d.n
    device = d.integers.device
    total = 16 * k + 64
    if d.numbers.targets:
        total += cuda_select.workspace_bytes(k, len(d.numbers.targets), n, device)
    if job.recipe.trim.rule is TrimRule.RANKED:
        total += sum(d.numbers.kinds[i] == 4 for i in range(k)) * n + (64 << 20)
    c = job.calibration
    if c is not None:
        by_row = c.granularity is Granularity.ROW
        total += 8 * c.rows * (k + 3) if by_row else 4 * (k + 1) * (k + 2) * (n // 16384 + 1)
        blocks = 2 * multiprocessors(device)
        total += 8 * blocks * (2 * k * k + (k + 1) * (k + 2) + 4 * (k + 1))
    return total


@contextmanager
def _on(job: Job) -> Iterator[None]:
    """The device of the job's tensors is the current one inside; streams are torch's."""
    device = job.experts[0].device
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


def _check_merged(job: Job, merged: Array) -> None:
    if isinstance(merged, View) or unfit(replace(job, base=None, experts=[merged], out=None)):
        raise BackendError(
            f"merged tensor for '{job.name}': expected contiguous float32, float16 or bfloat16 for "
            f"the cuda backend, got {merged.dtype}. Use backend='torch'."
        )
