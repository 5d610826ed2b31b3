"""From what the kernels left on the device to ``Stats``: one copy to the host for all jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from magic_fast.ops.gpu.jobs import Device
from magic_fast.ops.gpu.numbers import MERGED_RULE, float_of
from magic_fast.ops.gpu.rows import Rows
from magic_fast.ops.job import Stats
from magic_fast.recipe import Selection, Weigh
from magic_fast.recipe.codes import Floats, GpuTrim, Integers, place_of
from magic_fast.reference.calibration import magnitude_of

NO_INDEX = (1 << 63) - 1  # nothing bad so far


@dataclass
class Pending:
    """What a launched job leaves on the device for the end of the call: ``report`` int64 [K + 3],
    first bad flat index of the experts, the merged tensor, the base and the overflow; ``kept``
    int64 [K], entries that stayed."""

    report: Tensor
    kept: Tensor
    rows: Rows | None = None

    @classmethod
    def empty(cls, d: Device) -> Pending:
        """Nothing bad, nothing kept."""
        k, device = len(d.experts), d.integers.device
        report = torch.full((k + 3,), NO_INDEX, dtype=torch.int64, device=device)
        return cls(report, torch.zeros(k, dtype=torch.int64, device=device))


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
    integers, floats = take(place_of(Integers.END, k)), _doubles(take(place_of(Floats.END, k)))
    *first, merged, base, over = (-1 if i == NO_INDEX else i for i in take(k + 3))
    kept = take(k)
    stats = Stats(
        selection=d.job.selection or selection_of(d, integers, floats),
        kept=tuple(
            d.n if kind == GpuTrim.ALL else n for kind, n in zip(d.numbers.kinds, kept, strict=True)
        ),
        first_nonfinite=tuple(first),
        base_nonfinite=base,
        overflow=over,
    )
    if p.rows is not None:
        norms2 = torch.tensor(_doubles(take(k + 2)), dtype=torch.float64)
        stats.coefficient = p.rows.coefficient
        more = magnitude_of(norms2)
        stats.extra = {"repaired": p.rows.repaired, "norms2": norms2, **more}
    if d.numbers.rule == MERGED_RULE:
        stats.extra["merged_nonfinite"] = merged
    return stats


def _doubles(words: list[int]) -> list[float]:
    return torch.tensor(words, dtype=torch.int64).view(torch.float64).tolist()


def selection_of(d: Device, integers: list[int], floats: list[float]) -> Selection:
    k = len(d.experts)
    recipe = d.job.recipe

    def whole(row: int) -> tuple[int, ...]:
        return tuple(integers[row * k : (row + 1) * k])

    def row(row: int, wanted: bool = True) -> tuple[float, ...]:
        return tuple(floats[row * k : (row + 1) * k]) if wanted else ()

    scored = recipe.weigh is Weigh.SCORE
    return Selection(
        threshold=tuple(float_of(x) for x in whole(Integers.LOW)),
        tie_cut=whole(Integers.CUT),
        top_threshold=tuple(float_of(x) for x in whole(Integers.HIGH)),
        top_tie_cut=whole(Integers.TOP_CUT),
        factor=row(Floats.FACTOR),
        majority=integers[place_of(Integers.MAJORITY, k)],
        weights=row(Floats.WEIGHT, recipe.weigh is Weigh.ENERGY),
        alone=row(Floats.ALONE, recipe.alone is not None),
        score_cut=row(Floats.SCORE_CUT, scored),
        score_top=row(Floats.SCORE_TOP, scored),
    )
