"""Many small tensors in one launch: which jobs share one, and the table of their addresses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from magic_fast.ops.gpu.jobs import Device
from magic_fast.ops.gpu.results import NO_INDEX, Pending


class Group(ABC):
    """Jobs of one key and their table on the device: prepared once, launched as often as wanted.

    Args:
        devices: the jobs.
        block: elements of a block.
        unit: what ``starts`` counts a block as.

    Attributes:
        blocks: how many they have together.
        table: int64 [jobs, K + 4]: addresses of base, result and experts, elements, offset.
        job_of, starts: int64 [blocks]: which job, and which of its blocks.
        integers, floats: the jobs' numbers side by side, in the order of the table.
        report: int64 [jobs, K + 3], first non-finite indices.
    """

    def __init__(self, devices: Sequence[Device], block: int, unit: int) -> None:
        self.devices, self.first, self.k = list(devices), devices[0], len(devices[0].experts)
        words: list[int] = []
        job_of: list[int] = []
        starts: list[int] = []
        for i, d in enumerate(devices):
            words += [*(t.data_ptr() for t in tensors_of(d)), d.n, d.job.offset]
            blocks = range(-(-d.n // block))
            job_of += [i] * len(blocks)
            starts += (unit * one for one in blocks)
        self.device = self.first.integers.device
        self.blocks = len(starts)
        host = torch.tensor(words + job_of + starts, dtype=torch.int64)
        found = host.to(self.device, non_blocking=True)
        self.table, blocks_of = found[: len(words)], found[len(words) :]
        self.job_of, self.starts = blocks_of[: self.blocks], blocks_of[self.blocks :]
        self.integers = torch.cat([d.integers for d in devices])
        self.floats = torch.cat([d.floats for d in devices])
        self.report = torch.full(
            (len(devices), self.k + 3), NO_INDEX, dtype=torch.int64, device=self.device
        )

    @classmethod
    def of(cls, devices: Sequence[Device]) -> list[Group]:
        """Small jobs by key, in order."""
        found: dict[tuple[Any, ...], list[Device]] = {}
        for d in devices:
            dtypes = tuple(t.dtype for t in tensors_of(d))
            key = (d.has_base, dtypes, d.numbers.kinds, d.numbers.rule, *cls.key(d))
            found.setdefault(key, []).append(d)
        return [cls(group) for group in found.values()]  # type: ignore[call-arg]

    def pending(self) -> dict[int, Pending]:
        """What each job reports into, by the ``id`` of its device, after a launch."""
        rows = zip(self.devices, self.report, self.kept(), strict=True)
        return {id(d): Pending(report, kept) for d, report, kept in rows}

    @staticmethod
    @abstractmethod
    def key(d: Device) -> tuple[Any, ...]:
        """What else than dtypes and rule is the same for all jobs of a launch."""

    @abstractmethod
    def launch(self) -> None:
        """One launch on the current stream; waits for nothing."""

    @abstractmethod
    def kept(self) -> Tensor:
        """int64 [jobs, K]: entries that stayed."""


def tensors_of(d: Device) -> list[Tensor]:
    """Base, result and experts."""
    assert d.job.out is not None
    return [d.base, d.job.out, *d.experts]


def aligned(d: Device) -> bool:
    """Whether all addresses are multiples of 16 bytes."""
    return all(t.data_ptr() % 16 == 0 for t in tensors_of(d))
