"""From what the kernels left on the device to ``Stats``: one copy to the host for all jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from magic_fast.ops.gpu.jobs import Device
from magic_fast.ops.gpu.numbers import (
    ALONE_ROW,
    CUT_ROW,
    MERGED_RULE,
    TOP_ROW,
    WEIGHT_ROW,
    float_of,
    integers_of,
    width_of,
)
from magic_fast.ops.job import Stats
from magic_fast.recipe import Selection, Weigh

NO_INDEX = (1 << 63) - 1  # nothing bad so far


@dataclass
class Rows:
    """What calibration says of the rows: ``coefficient`` float32 [rows], ``repaired`` bool [rows],
    ``norms2`` float64 [K + 2]; ``counts`` int32 [programs, K] of kept entries."""

    coefficient: Tensor
    repaired: Tensor
    norms2: Tensor
    counts: Tensor


class Pending:
    """What a launched job leaves on the device for the end of the call."""

    def __init__(self, report: Tensor, kept: Tensor, rows: Rows | None = None) -> None:
        self.report, self.kept, self.rows = report, kept, rows


def collect(devices: Sequence[Device], pending: Sequence[Pending]) -> list[Stats]:
    """One copy to the host for all jobs, then plain Python."""
    parts: list[Tensor] = []
    for d, p in zip(devices, pending, strict=True):
        parts += [d.integers, d.floats.double().view(torch.int64), p.report, p.kept]
        if p.rows is not None:
            parts.append(p.rows.norms2.view(torch.int64))
    words = iter(torch.cat(parts).tolist())
    return [_stats(d, p, words) for d, p in zip(devices, pending, strict=True)]


def _stats(d: Device, p: Pending, words: Iterator[int]) -> Stats:
    def take(count: int) -> list[int]:
        return [next(words) for _ in range(count)]

    k = len(d.experts)
    integers, floats = take(integers_of(k)), _doubles(take(width_of(k)))
    *first, merged, base, over = (-1 if i == NO_INDEX else i for i in take(k + 3))
    kept = take(k)
    stats = Stats(
        selection=d.job.selection or selection_of(d, integers, floats),
        kept=tuple(d.n if kind == 0 else n for kind, n in zip(d.numbers.kinds, kept, strict=True)),
        first_nonfinite=tuple(first),
        base_nonfinite=base,
        overflow=over,
    )
    if p.rows is not None:
        norms2 = _doubles(take(k + 2))
        *own, before, after = (x**0.5 for x in norms2)
        mean = sum(own) / k
        stats.coefficient = p.rows.coefficient
        stats.extra = {
            "repaired": p.rows.repaired,
            "norms2": torch.tensor(norms2, dtype=torch.float64),
            "magnitude_before": before / mean if mean > 0 else None,
            "magnitude_after": after / mean if mean > 0 else None,
        }
    if d.numbers.rule == MERGED_RULE:
        stats.extra["merged_nonfinite"] = merged
    return stats


def _doubles(words: list[int]) -> list[float]:
    return torch.tensor(words, dtype=torch.int64).view(torch.float64).tolist()


def selection_of(d: Device, integers: list[int], floats: list[float]) -> Selection:
    k = len(d.experts)
    low, cut, high, top_cut = (tuple(integers[i * k : (i + 1) * k]) for i in range(4))
    recipe = d.job.recipe

    def row(i: int, wanted: bool) -> tuple[float, ...]:
        return tuple(floats[i * k : (i + 1) * k]) if wanted else ()

    scored = recipe.weigh is Weigh.SCORE
    return Selection(
        tuple(float_of(x) for x in low),
        cut,
        tuple(float_of(x) for x in high),
        top_cut,
        tuple(floats[:k]),
        integers[6 * k + 1],
        weights=row(WEIGHT_ROW, recipe.weigh is Weigh.ENERGY),
        alone=row(ALONE_ROW, recipe.alone is not None),
        score_cut=row(CUT_ROW, scored),
        score_top=row(TOP_ROW, scored),
    )


def no_rows(d: Device) -> Rows:
    """A tensor without elements: its rows have no norm, which the guards repair."""
    c, k = d.job.calibration, len(d.experts)
    assert c is not None
    device = d.base.device
    return Rows(
        torch.full((c.rows,), float("nan"), device=device),
        torch.full((c.rows,), c.guards, dtype=torch.bool, device=device),
        torch.zeros(k + 2, dtype=torch.float64, device=device),
        torch.zeros((0, k), dtype=torch.int32, device=device),
    )
