"""Many small tensors in one launch: which jobs share one, and the table of their addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

from magic_fast.kernels import launch, table
from magic_fast.ops.gpu.jobs import Device
from magic_fast.ops.gpu.results import NO_INDEX

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _key(d: Device) -> tuple[Any, ...]:
    """Jobs of one key run in one launch."""
    out = d.job.out
    assert out is not None
    dtypes = (d.base.dtype, out.dtype, *(e.dtype for e in d.experts))
    offset_ok = d.job.offset % 4 == 0
    wide = d.n % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in (d.base, out, *d.experts))
    return d.has_base, dtypes, d.numbers.kinds, d.numbers.rule, offset_ok, wide


class Group:
    """Jobs of one key and their table on the device: prepared once, launched as often as wanted."""

    def __init__(self, devices: Sequence[Device]) -> None:
        first = devices[0]
        k = len(first.experts)
        self.devices, self.k = list(devices), k
        self.shape = launch.block_shape(k, first.widest, first.trims)
        key = _key(first)
        self.dtypes = tuple(_TYPES[t] for t in key[1])
        self.wide = key[-1]
        words: list[int] = []
        job_of: list[int] = []
        starts: list[int] = []
        for i, d in enumerate(devices):
            assert d.job.out is not None
            addresses = [d.base, d.job.out, *d.experts]
            words += [*(t.data_ptr() for t in addresses), d.n, d.job.offset]
            blocks = range(-(-d.n // self.shape.block))
            job_of += [i] * len(blocks)
            starts += blocks
        device = first.base.device
        host = torch.tensor(words + starts + job_of, dtype=torch.int64)
        on_device = host.to(device, non_blocking=True)
        split = len(words)
        self.programs = len(starts)
        self.table = on_device[:split]
        self.starts = on_device[split : split + self.programs]
        self.job_of = on_device[split + self.programs :]
        # the jobs' numbers side by side, in the order of the table
        self.integers = torch.cat([d.integers for d in devices])
        self.floats = torch.cat([d.floats for d in devices])
        self.report = torch.full((len(devices), k + 3), NO_INDEX, dtype=torch.int64, device=device)
        self.counts = torch.zeros((self.programs, k), dtype=torch.int32, device=device)

    def launch(self) -> None:
        """One launch on the current stream; waits for nothing."""
        first = self.devices[0]
        table.merge_table[(self.programs,)](
            self.table, self.job_of, self.starts, self.integers, self.floats, self.counts,
            self.report, self.k, first.has_base, self.dtypes, first.numbers.kinds,
            first.numbers.rule, first.aligned(), first.words, self.wide,
            self.shape.lanes, self.shape.vec,
            num_warps=self.shape.warps, enable_fp_fusion=False,
        )  # fmt: skip

    def kept(self) -> torch.Tensor:
        """int64 [jobs, K]: entries that stayed."""
        total = torch.zeros(
            (len(self.devices), self.k), dtype=torch.int64, device=self.counts.device
        )
        return total.index_add_(0, self.job_of, self.counts.long())


def groups_of(devices: Sequence[Device]) -> list[Group]:
    """Small jobs by key, in order."""
    found: dict[tuple[Any, ...], list[Device]] = {}
    for d in devices:
        found.setdefault(_key(d), []).append(d)
    return [Group(group) for group in found.values()]
