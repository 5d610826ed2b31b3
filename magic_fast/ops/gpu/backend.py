"""What the backends of a GPU have in common: a call in three steps, on its tensors' device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magic_fast.errors import BackendError
from magic_fast.ops.gpu.jobs import Device, everything, to_device, unfit
from magic_fast.ops.gpu.numbers import MERGED_RULE
from magic_fast.ops.gpu.results import Pending, collect, selection_of
from magic_fast.ops.gpu.rows import no_rows
from magic_fast.ops.gpu.select import Scans, prepare, workspace_bytes
from magic_fast.ops.gpu.small import Group
from magic_fast.ops.job import Array, Job, Stats, View
from magic_fast.ops.limits import default_rows, unsupported
from magic_fast.ops.order import SMALL_ELEMENTS
from magic_fast.recipe import Selection
from magic_fast.recipe.codes import GpuTrim
from magic_fast.reference.calibration import RowStats

MOST_EXPERTS = 64
MOST_ELEMENTS = SMALL_ELEMENTS  # of a tensor that shares a launch


class GpuBackend(ABC):
    """Merges in three steps: ``prepare`` copies numbers to the device, ``launch`` queues everything
    and waits for nothing, ``finish`` fetches what the host has to know. A backend says how a tensor
    is read before its merge (:class:`~magic_fast.ops.gpu.select.Scans`), how one job is merged, and
    many small ones together."""

    name: str

    def supports(self, job: Job) -> str | None:
        if reason := unfit(job):
            return reason
        if job.directions is not None:
            return "means of directions run in PyTorch"
        if len(job.experts) > MOST_EXPERTS:
            return f"it takes up to {MOST_EXPERTS} experts, not {len(job.experts)}"
        return unsupported(job)

    def select(self, job: Job) -> Selection:
        with on_device_of(job):
            (d,) = to_device([job])
            prepare(d, self.scans_of(d, Pending.empty(d)))
            return selection_of(d, d.integers.tolist(), d.floats.tolist())

    def merge(self, job: Job) -> Stats:
        return self.merge_many([job])[0]

    def merge_many(self, jobs: Sequence[Job]) -> list[Stats]:
        if not jobs:
            return []
        devices = self.prepare(jobs)
        return self.finish(devices, self.launch(devices))

    def prepare(self, jobs: Sequence[Job]) -> list[Device]:
        """The numbers of the recipes, copied to the device."""
        with on_device_of(jobs[0]):
            return to_device(jobs)

    def launch(self, devices: Sequence[Device]) -> list[Pending]:
        """Everything onto the current stream."""
        with on_device_of(devices[0].job):
            many = [d for d in devices if small(d)]
            found: dict[int, Pending] = {}
            for group in self.groups_of(many) if len(many) > 1 else ():
                group.launch()
                found |= group.pending()
            return [found.get(id(d)) or self.launch_one(d) for d in devices]

    def launch_one(self, d: Device, merged: Array | None = None) -> Pending:
        """One job; with ``merged`` its rule is that of d = merged − base."""
        pending = Pending.empty(d)
        if merged is None:
            prepare(d, self.scans_of(d, pending))
        if d.n:
            self.merge_one(d, pending, merged)
        elif d.job.calibration is not None:
            pending.rows = no_rows(d)
        return pending

    def finish(self, devices: Sequence[Device], pending: Sequence[Pending]) -> list[Stats]:
        """What the host has to know of all jobs, in one copy; waits for it."""
        return collect(devices, pending)

    def workspace_bytes(self, job: Job) -> int:
        """Bytes of device memory that a merge of ``job`` takes beside inputs and output."""
        with on_device_of(job):
            (d,) = to_device([job])
            scans = self.scans_of(d, Pending.empty(d))
            return workspace_bytes(d, scans) + self.workspace_of(d)

    def calibrate(self, job: Job, merged: Array) -> Stats:
        """WSC of a tensor merged elsewhere: base + factor[row]·(merged − base)."""
        self.check_merged(job, merged)
        if job.calibration is None:
            raise BackendError(f"calibrate '{job.name}': expected a calibration, got None.")
        with on_device_of(job):
            d = merged_rule(job)
            (stats,) = collect([d], [self.launch_one(d, merged)])
        stats.selection = everything(job)
        stats.first_nonfinite = (*stats.first_nonfinite, stats.extra.pop("merged_nonfinite"))
        stats.kept = ()
        return stats

    def row_stats(self, job: Job, merged: Array) -> tuple[Any, Any, Any]:
        self.check_merged(job, merged)
        view = job.calibration or default_rows(job.experts[0])
        k = len(job.experts)
        if view.rows * view.cols == 0:
            zeros = merged.new_zeros((view.rows, k + 1, k + 1), dtype=torch.float64)
            return zeros[:, :k, :k], zeros[:, :k, k], zeros[:, k, k]
        with on_device_of(job):
            stats = self.sums_of(merged_rule(job), merged, view.rows, view.cols)
        return stats.gram, stats.dots, stats.norm2

    def scale(self, job: Job, merged: Array, coefficient: Any) -> None:
        self.check_merged(job, merged)
        factors = torch.as_tensor(coefficient, dtype=torch.float32, device=merged.device)
        if merged.numel():
            with on_device_of(job):
                # whatever the number of experts: they are not part of it
                d = merged_rule(replace(job, experts=[merged]))
                self.scale_one(d, merged, factors.flatten().contiguous())

    @abstractmethod
    def scans_of(self, d: Device, pending: Pending) -> Scans:
        """The reads of a whole tensor; what they report goes to ``pending``."""

    @abstractmethod
    def merge_one(self, d: Device, pending: Pending, merged: Array | None) -> None:
        """One job that has elements, after its reads, into its ``out``; fills ``pending``. With
        ``merged`` its rule is that of d = merged − base."""

    @abstractmethod
    def scale_one(self, d: Device, merged: Array, factors: Tensor) -> None:
        """out = base + factors[row]·(merged − base), whatever the factor."""

    @abstractmethod
    def groups_of(self, devices: Sequence[Device]) -> list[Group]:
        """Small jobs, one launch for those of one kind."""

    @abstractmethod
    def sums_of(self, d: Device, merged: Array, rows: int, cols: int) -> RowStats:
        """Inner products of the rows of the task vectors and merged − base; nothing is merged."""

    @abstractmethod
    def workspace_of(self, d: Device) -> int:
        """See ``workspace_bytes``: that of its merge and its calibration."""

    def check_merged(self, job: Job, merged: Array) -> None:
        """Raises:
        BackendError: what was merged elsewhere is no tensor that the kernels take.
        """
        if isinstance(merged, View) or unfit(replace(job, base=None, experts=[merged], out=None)):
            raise BackendError(
                f"merged tensor for '{job.name}': expected contiguous float32, float16 or bfloat16 "
                f"for the {self.name} backend, got {merged.dtype}. Use backend='torch'."
            )


def merged_rule(job: Job) -> Device:
    """The job with d = merged − base instead of its recipe."""
    (d,) = to_device([replace(job, selection=everything(job), masks=None, task_masks=None)])
    d.numbers.rule = MERGED_RULE
    d.numbers.kinds = (GpuTrim.ALL,) * len(d.experts)
    return d


def small(d: Device) -> bool:
    """Whether the job may share a launch: nothing to find first, nothing by rows, no masks."""
    recipe = d.job.recipe
    return (
        0 < d.n <= MOST_ELEMENTS
        and d.job.calibration is None
        and not {GpuTrim.BYTES, GpuTrim.VARIED} & set(d.numbers.kinds)
        and (d.job.selection is not None or not recipe.needs_select)
        and d.job.task_masks is None
    )


@contextmanager
def on_device_of(job: Job) -> Iterator[None]:
    """The device of the job's tensors is the current one inside; streams are torch's."""
    device = job.experts[0].device
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
