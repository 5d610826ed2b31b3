"""Many small tensors in one launch of the CUDA kernels: which jobs share one, and the table of
their addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from magic_fast.ops.cuda.calls import call_job, extension, stream_of_device
from magic_fast.ops.gpu.jobs import Device, multiprocessors
from magic_fast.ops.gpu.results import NO_INDEX, Pending

_BLOCK = 1024  # elements of a block: 128 threads, 8 each


def _key(d: Device) -> tuple[Any, ...]:
    """Jobs of one key run in one launch."""
    out = d.job.out
    assert out is not None
    dtypes = (d.base.dtype, out.dtype, *(e.dtype for e in d.experts))
    aligned = all(t.data_ptr() % 16 == 0 for t in (d.base, out, *d.experts))
    return d.has_base, dtypes, d.numbers.kinds, d.numbers.rule, aligned


class Group:
    """Jobs of one key and their table on the device: prepared once, launched as often as wanted."""

    def __init__(self, devices: Sequence[Device]) -> None:
        first = devices[0]
        k = len(first.experts)
        self.devices, self._first = list(devices), first
        self._aligned = _key(first)[-1]
        words: list[int] = []
        job_of: list[int] = []
        starts: list[int] = []
        for i, d in enumerate(devices):
            assert d.job.out is not None
            addresses = [d.base, d.job.out, *d.experts]
            words += [*(t.data_ptr() for t in addresses), d.n, d.job.offset]
            blocks = range(0, d.n, _BLOCK)
            job_of += [i] * len(blocks)
            starts += blocks
        device = first.integers.device
        table = torch.tensor(words + job_of + starts, dtype=torch.int64)
        self._table = table.to(device, non_blocking=True)
        self.blocks = len(starts)
        self._job_of = self._table[len(words) :]
        self._starts = self._table[len(words) + self.blocks :]
        # the jobs' numbers side by side, in the order of the table
        self._integers = torch.cat([d.integers for d in devices])
        self._floats = torch.cat([d.floats for d in devices])
        self.report = torch.full((len(devices), k + 3), NO_INDEX, dtype=torch.int64, device=device)
        self.kept = torch.zeros((len(devices), k), dtype=torch.int64, device=device)
        numbers = Device(
            first.job, first.numbers, self._integers, self._floats, first.masks, first.task_masks,
            first.search,
        )  # fmt: skip
        self._job = call_job(numbers, Pending(self.report, self.kept), out=first.job.out)

    def launch(self) -> None:
        """One launch on the current stream; waits for nothing."""
        device = self._table.device
        extension().merge_table(
            self._job, self._table.data_ptr(), self._job_of.data_ptr(), self._starts.data_ptr(),
            self.blocks, self._aligned, multiprocessors(device), stream_of_device(device),
        )  # fmt: skip


def groups_of(devices: Sequence[Device]) -> list[Group]:
    """Small jobs by key, in order."""
    found: dict[tuple[Any, ...], list[Device]] = {}
    for d in devices:
        found.setdefault(_key(d), []).append(d)
    return [Group(group) for group in found.values()]
