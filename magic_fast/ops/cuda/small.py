"""Many small tensors in one launch of the CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magic_fast.ops.cuda.calls import call_job, extension, stream_of_device
from magic_fast.ops.gpu import small
from magic_fast.ops.gpu.jobs import Device, multiprocessors
from magic_fast.ops.gpu.results import Pending

_BLOCK = 1024  # elements of a block: 128 threads, 8 each


class Group(small.Group):
    def __init__(self, devices: Sequence[Device]) -> None:
        super().__init__(devices, _BLOCK, unit=_BLOCK)
        self._kept = torch.zeros((len(devices), self.k), dtype=torch.int64, device=self.device)
        numbers = replace(self.first, integers=self.integers, floats=self.floats)
        self._job = call_job(numbers, Pending(self.report, self._kept), out=self.first.job.out)

    @staticmethod
    def key(d: Device) -> tuple[Any, ...]:
        return (small.aligned(d),)

    def launch(self) -> None:
        extension().merge_table(
            self._job, self.table.data_ptr(), self.job_of.data_ptr(), self.starts.data_ptr(),
            self.blocks, small.aligned(self.first), multiprocessors(self.device),
            stream_of_device(self.device),
        )  # fmt: skip

    def kept(self) -> Tensor:
        return self._kept
