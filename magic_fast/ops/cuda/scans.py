"""The reads of a whole tensor before its merge, by the CUDA kernels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magic_fast.ops.cuda.calls import call_job, extension, stream_of_device
from magic_fast.ops.gpu.jobs import Device, multiprocessors
from magic_fast.ops.gpu.results import Pending
from magic_fast.ops.gpu.select import Scans, Search
from magic_fast.recipe.codes import GpuTrim, Integers, place_of

_SUM_BLOCK = 1 << 16  # elements of a partial sum
_VECTOR = 8 * 128  # elements of one step of a block
_BIN_BYTES = 32 << 20  # of all targets of a select
_SEGMENTS = 8  # of a scan, a multiprocessor


def segments_of(n: int, processors: int) -> tuple[int, int]:
    """(segments, elements of each) of a scan: a few a multiprocessor, whole steps of a block."""
    steps = -(-n // _VECTOR)
    length = -(-steps // (_SEGMENTS * processors)) * _VECTOR
    return -(-n // length), length


def log_bins_of(targets: int, n: int) -> int:
    """Bins of a scan. One scan is enough where the bracket has no more bit patterns than bins, else
    the next one looks into one bin: so as many as 32 MiB hold for all targets, 4 bytes each, and as
    are worth clearing for a tensor of ``n`` elements."""
    if n < 1 << 20:
        return 12
    return min((_BIN_BYTES // (4 * targets)).bit_length() - 1, (n // 2).bit_length() - 1, 22)


def scans_for(sampled_all: bool, log_bins: int) -> int:
    """Launches of a scan: one where the sample is the tensor, else as many as a bracket that missed
    needs; those with nothing left to do return at once."""
    return 1 if sampled_all else 1 + math.ceil(31 / log_bins)


class CudaScans(Scans):
    """A trim by variance becomes a mask of one byte an element: formed where it is needed, the
    variance would be read K times for every expert."""

    def __init__(self, d: Device, pending: Pending) -> None:
        super().__init__(d)
        self._pending = pending
        self._device = d.integers.device
        self._stream = stream_of_device(self._device)

    def _job(self, d: Device, start: int = 0) -> Any:
        return call_job(d, self._pending, start=start)

    def search_bytes(self, targets: int) -> int:
        segments = segments_of(self.d.n, multiprocessors(self._device))[0]
        bins = 1 << log_bins_of(targets, self.d.n)
        return targets * (4 * bins + 8 * (bins >> 10) + 24 * segments + 128)

    def find(self, search: Search, into: Tensor) -> None:
        d, targets = self.d, search.targets
        n, count, device = d.n, len(targets), self._device
        log_bins = log_bins_of(count, n)
        segments, length = segments_of(n, multiprocessors(device))

        def room(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        sample = room(search.sampled, search.size, dtype=torch.int32)
        parts = {
            "state": room(count, 8),
            "heavy": room(count, 2, dtype=torch.int32),
            "bins": room(count, 1 << log_bins, dtype=torch.int32),
            "coarse": room(count, (1 << log_bins) >> 10),
            "above": room(segments, count),
            "equals": room(segments, count, 2),
        }
        described = extension().Search(
            sample=sample.data_ptr(),
            **{name: x.data_ptr() for name, x in parts.items()},
            places=search.words.data_ptr(),
            counts=search.words[3 * count :].data_ptr(),
            numel=n, size=search.size, runs=search.runs, run=search.run, segments=segments,
            length=length, log_bins=log_bins, scans=scans_for(search.size == n, log_bins),
            key=search.key,
        )  # fmt: skip
        job = self._job(d)
        extension().sample(job, described, self._stream)
        ordered = torch.sort(sample, dim=1).values
        extension().select(
            job,
            described,
            sorted=ordered.data_ptr(),
            owners=[t.owner for t in targets],
            tops=[t.top for t in targets],
            ties=[t.ties for t in targets],
            integers=into.data_ptr(),
            stream=self._stream,
        )

    def magnitudes(self, expert: int, part: slice) -> Tensor:
        d, n = self.d, part.stop - part.start
        job = replace(d.job, experts=[d.experts[expert]], masks=None, task_masks=None)
        masks = (d.masks[expert],)
        numbers = replace(d.numbers, kinds=(GpuTrim.ALL,))
        alone = replace(d, job=job, numbers=numbers, masks=masks, task_masks=masks)
        bits = torch.empty(n, dtype=torch.int32, device=self._device)
        extension().magnitudes(self._job(alone, part.start), n, bits.data_ptr(), self._stream)
        return bits

    def keep_ranked(self, expert: int, part: slice, order: Tensor, mask: Tensor) -> None:
        trim, words, k = self.d.job.recipe.trim, self.d.numbers.integers, len(self.d.experts)
        density, epsilon = trim.density[expert], trim.epsilon[expert]
        extension().keep_ranked(
            order.data_ptr(), mask.data_ptr(), *order.shape, self.d.job.offset + part.start,
            words[place_of(Integers.STREAM, k) + expert], words[place_of(Integers.SEED, k)],
            density - epsilon, 2 * epsilon, density, self._stream,
        )  # fmt: skip

    def norm_sums(self, of: Device, power: int) -> Tensor:
        blocks, k = -(-of.n // _SUM_BLOCK), len(of.experts)
        partial = torch.zeros((blocks, k, 2), dtype=torch.float64, device=self._device)
        extension().norm_sums(self._job(of), of.n, power, partial.data_ptr(), self._stream)
        return partial

    def held(self) -> Tensor:
        counts = torch.zeros((len(self.d.experts), 2), dtype=torch.int64, device=self._device)
        extension().held(self._job(self.d), self.d.n, counts.data_ptr(), self._stream)
        return counts

    def votes(self) -> Tensor:
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        extension().vote_sum(self._job(self.d), self.d.n, total.data_ptr(), self._stream)
        return total

    def _varied(self, d: Device) -> Tensor:
        """uint8 [n]: entries whose variance lies at or above the bounds of ``d``."""
        mask = torch.empty(d.n, dtype=torch.uint8, device=self._device)
        extension().keep_varied(self._job(d), d.n, mask.data_ptr(), self._stream)
        return mask

    def varying(self) -> int:
        above_zero = replace(self.d, integers=torch.zeros_like(self.d.integers))
        return int(self._varied(above_zero).count_nonzero())

    def mask_varied(self) -> None:
        """One mask for all experts that the trim decides."""
        mask, pairs = self._varied(self.d), zip(self.d.numbers.kinds, self.d.masks, strict=True)
        self.d.masks = tuple(mask if kind == GpuTrim.VARIED else m for kind, m in pairs)
