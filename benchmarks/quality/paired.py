"""Paired differences with a bootstrap over seeds and tasks; mean and spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: (seed, task) → a score.
Cells = Mapping[tuple[int, str], float]


@dataclass(frozen=True)
class Difference:
    """Mean of a − b over the cells, its 95 % interval, and how many cells and seeds it is from."""

    mean: float
    low: float
    high: float
    cells: int
    seeds: int

    @property
    def seen(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def difference(a: Cells, b: Cells, resamples: int, seed: int = 0) -> Difference | None:
    """a − b, paired by cell; a percentile bootstrap that draws seeds, then tasks within each drawn
    seed. None where no cell is in both.

    >>> d = difference({(0, "x"): 0.75, (1, "x"): 0.75}, {(0, "x"): 0.5, (1, "x"): 0.5}, 100)
    >>> d.mean, d.low, d.high, d.seen
    (0.25, 0.25, 0.25, True)
    """
    rows: dict[int, list[float]] = {}
    for cell in sorted(a.keys() & b.keys()):
        rows.setdefault(cell[0], []).append(a[cell] - b[cell])
    if not rows:
        return None
    by_seed = list(rows.values())
    sizes = np.array([len(r) for r in by_seed])
    padded = np.zeros((len(by_seed), sizes.max()))
    for i, row in enumerate(by_seed):
        padded[i, : len(row)] = row
    random = np.random.default_rng(seed)
    seeds = random.integers(len(by_seed), size=(resamples, len(by_seed)))
    drawn = sizes[seeds][..., None]  # tasks of each drawn seed, as many of which are drawn
    tasks = (random.random((*seeds.shape, sizes.max())) * drawn).astype(int)
    counts = np.arange(sizes.max()) < drawn
    means = (padded[seeds[..., None], tasks] * counts).sum((1, 2)) / counts.sum((1, 2))
    low, high = np.percentile(means, [2.5, 97.5])
    flat = [value for row in by_seed for value in row]
    return Difference(sum(flat) / len(flat), float(low), float(high), len(flat), len(by_seed))


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (None of a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
