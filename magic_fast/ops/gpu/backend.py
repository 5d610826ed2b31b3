"""What the backends of a GPU have in common: a call in three steps, on its tensors' device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from magic_fast.errors import BackendError
from magic_fast.ops.gpu.jobs import Device, everything, to_device, unfit
from magic_fast.ops.gpu.numbers import BYTES, MERGED_RULE, VARIED
from magic_fast.ops.gpu.results import Pending, collect
from magic_fast.ops.job import Array, Job, Stats, View
from magic_fast.ops.limits import default_rows, unsupported
from magic_fast.reference.calibration import RowStats

MOST_EXPERTS = 64
MOST_ELEMENTS = 1 << 18  # of a small tensor; larger ones fill the device by themselves


class GpuBackend(ABC):
    """Merges in three steps: ``prepare`` copies numbers to the device, ``launch`` queues everything
    and waits for nothing, ``finish`` fetches what the host has to know. A backend says how one job
    is launched, and many small ones together."""

    name: str

    def supports(self, job: Job) -> str | None:
        if reason := unfit(job):
            return reason
        if job.directions is not None:
            return "means of directions run in PyTorch"
        if len(job.experts) > MOST_EXPERTS:
            return f"it takes up to {MOST_EXPERTS} experts, not {len(job.experts)}"
        return unsupported(job)

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
            found = self.launch_small(many) if len(many) > 1 else {}
            return [found.get(id(d)) or self.launch_one(d) for d in devices]

    def finish(self, devices: Sequence[Device], pending: Sequence[Pending]) -> list[Stats]:
        """What the host has to know of all jobs, in one copy; waits for it."""
        return collect(devices, pending)

    def workspace_bytes(self, job: Job) -> int:
        """Bytes of device memory that a merge of ``job`` takes beside inputs and output."""
        with on_device_of(job):
            return self.workspace_of(to_device([job])[0])

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

    @abstractmethod
    def launch_one(self, d: Device, merged: Array | None = None) -> Pending:
        """One job; with ``merged`` its rule is that of d = merged − base."""

    @abstractmethod
    def launch_small(self, devices: Sequence[Device]) -> dict[int, Pending]:
        """Small jobs by the ``id`` of their device, one launch for those of one kind."""

    @abstractmethod
    def sums_of(self, d: Device, merged: Array, rows: int, cols: int) -> RowStats:
        """Inner products of the rows of the task vectors and merged − base; nothing is merged."""

    @abstractmethod
    def workspace_of(self, d: Device) -> int:
        """See ``workspace_bytes``."""

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
    d.numbers.kinds = (0,) * len(d.experts)
    return d


def small(d: Device) -> bool:
    """Whether the job may share a launch: nothing to find first, nothing by rows, no masks."""
    recipe = d.job.recipe
    return (
        0 < d.n <= MOST_ELEMENTS
        and d.job.calibration is None
        and not {BYTES, VARIED} & set(d.numbers.kinds)
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
