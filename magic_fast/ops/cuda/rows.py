"""Merges with the CUDA kernels: plain, calibrated by rows in one pass, or by one number for the
tensor in two."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from magic_fast.ops.cuda.calls import call_job, extension, pointer, stream_of_device
from magic_fast.ops.gpu.jobs import Device, multiprocessors
from magic_fast.ops.gpu.results import Pending
from magic_fast.ops.gpu.rows import Rows, by_sums, stats_of
from magic_fast.recipe import Granularity, RowCalibration, Variant
from magic_fast.recipe.codes import DIRECTIONS, EPS_MODES, VARIANTS
from magic_fast.reference import calibration as wsc

_SEGMENT = 16384  # elements of a tensor that are summed as one row


@dataclass
class Call:
    """A job on the device with what it reports into, and the model merged elsewhere, if any."""

    d: Device
    pending: Pending
    merged: Tensor | None = None
    out: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.d.integers.device

    @property
    def stream(self) -> int:
        return stream_of_device(self.device)

    def job(self, start: int = 0, *, out: bool = True) -> object:
        to = self.out if out else None
        return call_job(self.d, self.pending, merged=self.merged, out=to, start=start)


def merged(call: Call, rows: int, cols: int, factors: Tensor | None) -> None:
    """The merge itself, rows multiplied by ``factors`` float32 [rows]."""
    keeps = factors is not None and call.merged is not None
    extension().merge(
        call.job(), rows, cols, pointer(factors), keeps, multiprocessors(call.device), call.stream
    )


def calibrated(call: Call) -> Rows:
    """Runs one job with its calibration."""
    c = call.d.job.calibration
    assert c is not None
    if c.granularity is Granularity.ROW:
        return _by_rows(call, c)
    return _by_tensor(call, c)


def _by_rows(call: Call, c: RowCalibration) -> Rows:
    k, device = len(call.d.experts), call.device
    found = Rows(
        torch.empty(c.rows, dtype=torch.float32, device=device),
        torch.empty(c.rows, dtype=torch.uint8, device=device),
        torch.empty((c.rows, k + 2), dtype=torch.float64, device=device),
    )
    _rows(call, call.job(), c, c.rows, c.cols, found=found)
    found.repaired = found.repaired.view(torch.bool)
    found.norms2 = found.norms2.sum(0)
    return found


def _rows(
    call: Call,
    job: object,
    c: RowCalibration,
    rows: int,
    cols: int,
    *,
    found: Rows | None = None,
    pairs: Tensor | None = None,
    powers: Tensor | None = None,
) -> None:
    variant, p = VARIANTS[Variant(c.variant)], float(c.p) if c.variant is Variant.SPHERE else 2.0
    k, processors = len(call.d.experts), multiprocessors(call.device)
    size = extension().rows_work(k, variant, rows, processors)
    work = torch.empty(size, dtype=torch.float64, device=call.device)
    kept = () if found is None else (found.coefficient, found.repaired, found.norms2)
    results = [x.data_ptr() for x in kept] or [0, 0, 0]
    extension().rows(
        job, rows, cols, variant, p, EPS_MODES[c.eps_mode], c.guards, c.clamp, c.strength,
        c.scale, DIRECTIONS[c.direction], list(c.included or (True,) * k),
        *results, pointer(pairs), pointer(powers), work.data_ptr(),
        call.merged is not None, processors, call.stream,
    )  # fmt: skip


def row_sums(call: Call, c: RowCalibration, rows: int, cols: int) -> wsc.RowStats:
    """Sums of [rows, cols], nothing merged."""
    return _stats(call, *_sums(call, c, rows, cols, 0))


def _sums(
    call: Call, c: RowCalibration, rows: int, cols: int, start: int
) -> tuple[Tensor, Tensor | None]:
    m = len(call.d.experts) + 1
    wide = torch.empty(0, dtype=torch.float64, device=call.device)
    pairs = wide.new_empty((rows, m * (m + 1) // 2))
    wanted = c.variant is Variant.SPHERE and c.p != 2
    powers = wide.new_empty((rows, m)) if wanted else None
    _rows(call, call.job(start, out=False), c, rows, cols, pairs=pairs, powers=powers)
    return pairs, powers


def _stats(call: Call, pairs: Tensor, powers: Tensor | None) -> wsc.RowStats:
    k = len(call.d.experts)
    stats = stats_of(pairs, k)
    if powers is not None:
        stats.powers, stats.merged_powers = powers[:, :k], powers[:, k]
    return stats


def _by_tensor(call: Call, c: RowCalibration) -> Rows:
    """One read for the sums, the coefficient by torch, one read to merge. The sums of a tensor are
    those of its segments, added in their order."""
    n = call.d.n
    whole = n // _SEGMENT
    parts = [_sums(call, c, whole, _SEGMENT, 0)] if whole else []
    if n % _SEGMENT:
        parts.append(_sums(call, c, 1, n % _SEGMENT, whole * _SEGMENT))
    call.pending.kept.zero_()  # counted again by the merge
    pairs = torch.cat([pairs for pairs, _ in parts]).sum(0, keepdim=True)
    powers = None
    if parts[0][1] is not None:
        every = torch.cat([powers for _, powers in parts if powers is not None])
        largest = math.isinf(c.p)
        powers = every.amax(0, keepdim=True) if largest else every.sum(0, keepdim=True)
    return by_sums(_stats(call, pairs, powers), c, lambda factors: merged(call, 1, n, factors))


def scaled(call: Call, factors: Tensor) -> None:
    """out = base + factors[row]·(merged − base), whatever the factor."""
    n = call.d.n
    rows = factors.numel()
    extension().merge(
        call.job(), rows, n // rows, factors.data_ptr(), False, multiprocessors(call.device),
        call.stream,
    )  # fmt: skip
