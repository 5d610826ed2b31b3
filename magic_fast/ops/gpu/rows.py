"""Calibrated rows on the device: what is known of them, and the long way to it, from their sums by
the reference's float64 formulas, run by torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from magic_fast.ops.gpu.jobs import Device
from magic_fast.recipe import RowCalibration
from magic_fast.reference import calibration as wsc


@dataclass
class Rows:
    """What calibration says of the rows: ``coefficient`` float32 [rows], ``repaired`` bool [rows],
    ``norms2`` float64 [K + 2]; ``counts`` int32 [programs, K] of kept entries, where the kernels
    count so."""

    coefficient: Tensor
    repaired: Tensor
    norms2: Tensor
    counts: Tensor | None = None


def no_rows(d: Device) -> Rows:
    """A tensor without elements: its rows have no norm, which the guards repair."""
    c, device = d.job.calibration, d.base.device
    assert c is not None
    return Rows(
        torch.full((c.rows,), float("nan"), device=device),
        torch.full((c.rows,), c.guards, dtype=torch.bool, device=device),
        torch.zeros(len(d.experts) + 2, dtype=torch.float64, device=device),
    )


def stats_of(pairs: Tensor, num_experts: int) -> wsc.RowStats:
    """The reference's sums from upper triangles float64 [rows, (K + 1)(K + 2)/2]: inner products of
    the task vectors and, last, d."""
    k = num_experts
    upper = torch.triu_indices(k + 1, k + 1, device=pairs.device)
    square = pairs.new_empty((pairs.shape[0], k + 1, k + 1))
    square[:, upper[0], upper[1]] = pairs
    square[:, upper[1], upper[0]] = pairs
    return wsc.RowStats(
        square[:, :k, :k].contiguous(), square[:, :k, k].contiguous(), square[:, k, k].clone()
    )


def by_sums(
    stats: wsc.RowStats, c: RowCalibration, merge: Callable[[Tensor], Tensor | None]
) -> Rows:
    """The second of two reads: the merge with the factors that follow from the sums of the first.

    Args:
        merge: multiplies rows by float32 factors; returns ``counts``.
    """
    raw = wsc.coefficient(stats, c)
    squares = counted = stats.gram.diagonal(dim1=-2, dim2=-1)
    if c.included:
        counted = squares * torch.tensor(c.included).to(squares.device, non_blocking=True)
    usable = (counted.sum(-1) > 0) & (stats.norm2 > 0) & torch.isfinite(stats.norm2)
    factor, repaired = wsc.act(raw, c, usable=usable)
    narrow = factor.float().contiguous()
    counts = merge(narrow)
    after = (stats.norm2 * narrow.double().square()).sum()
    return Rows(
        raw.float().expand(c.rows).contiguous(),
        repaired.expand(c.rows).contiguous(),
        torch.cat((squares.sum(0), torch.stack((stats.norm2.sum(), after)))),
        counts,
    )
