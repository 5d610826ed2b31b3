"""Many small tensors in one launch of the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from magic_fast.kernels import launch, table
from magic_fast.ops.gpu import small
from magic_fast.ops.gpu.jobs import Device

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Group(small.Group):
    def __init__(self, devices: Sequence[Device]) -> None:
        first = devices[0]
        self._shape = launch.block_shape(len(first.experts), first.widest, first.trims)
        super().__init__(devices, self._shape.block, unit=1)
        self._dtypes = tuple(_TYPES[t.dtype] for t in small.tensors_of(first))
        self._wide = self.key(first)[-1]
        self._counts = torch.zeros((self.blocks, self.k), dtype=torch.int32, device=self.device)

    @staticmethod
    def key(d: Device) -> tuple[Any, ...]:
        return d.job.offset % 4 == 0, d.n % 16 == 0 and small.aligned(d)

    def launch(self) -> None:
        first, shape = self.first, self._shape
        table.merge_table[(self.blocks,)](
            self.table, self.job_of, self.starts, self.integers, self.floats, self._counts,
            self.report, self.k, first.has_base, self._dtypes, first.numbers.kinds,
            first.numbers.rule, first.aligned(), first.words, self._wide, shape.lanes, shape.vec,
            num_warps=shape.warps, enable_fp_fusion=False,
        )  # fmt: skip

    def kept(self) -> Tensor:
        if not any(self.first.numbers.kinds):
            return self.report[:, : self.k]
        total = torch.zeros((len(self.devices), self.k), dtype=torch.int64, device=self.device)
        return total.index_add_(0, self.job_of, self._counts.long())
