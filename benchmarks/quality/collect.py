"""From records to paired cells: what the tables are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from quality.paired import Cells, spread

Record = Mapping[str, Any]
Spread = tuple[float, float | None]
METRICS = ("score", "NLL", "ECE")
AS_IT_COMES, BEST = "as it comes", "best"


def of_scenario(records: Iterable[Record], scenario: str, *, development: bool) -> list[Record]:
    return [r for r in records if r["scenario"] == scenario and r["development"] == development]


def rows_of(record: Record, role: str = "main", **wanted: Any) -> list[Mapping[str, Any]]:
    return [
        row
        for row in record["rows"]
        if row["role"] == role and all(row[k] == v for k, v in wanted.items())
    ]


def cells(
    records: Iterable[Record],
    merge: str,
    calibration: str,
    how: str,
    metric: int = 0,
    *,
    part: str = "test",
    role: str = "main",
    clamp: str = "",
    kept_only: bool = True,
) -> dict[tuple[int, str], float]:
    """(seed, task) → a score of one arm; of the kept tasks."""
    found = {}
    for record in records:
        for row in rows_of(record, role, merge=merge, calibration=calibration, clamp=clamp):
            scores = row[part].get(how)
            if scores is None:
                continue
            for name, kept, score in zip(record["tasks"], record["kept"], scores, strict=True):
                if kept or not kept_only:
                    found[record["seed"], name] = score[metric]
    return found


def pooled(
    merges: Sequence[str], of: Callable[[str], Mapping[tuple[int, str], float]]
) -> dict[tuple[int, str], float]:
    """The cells of several merges side by side."""
    return {
        (seed, f"{merge}: {task}"): value
        for merge in merges
        for (seed, task), value in of(merge).items()
    }


def by_seed(found: Cells) -> dict[int, float]:
    """Mean over the tasks of each seed."""
    seeds: dict[int, list[float]] = {}
    for (seed, _), value in found.items():
        seeds.setdefault(seed, []).append(value)
    return {seed: fmean(values) for seed, values in seeds.items()}


def over_seeds(found: Cells) -> Spread | None:
    """Mean and standard deviation over seeds; None without a cell."""
    seeds = by_seed(found)
    return spread(list(seeds.values())) if seeds else None


def bound(records: Iterable[Record], which: str, metric: int = 0) -> dict[tuple[int, str], float]:
    """Cells of the base or of the experts."""
    return {
        (r["seed"], name): score[metric]
        for r in records
        for name, kept, score in zip(r["tasks"], r["kept"], r["bounds"]["test"][which], strict=True)
        if kept
    }


def deviations(records: Iterable[Record], merge: str, calibration: str) -> dict[str, Spread]:
    """Layer → mean and deviation over the seeds of its feature deviation."""
    layers: dict[str, list[float]] = {}
    for record in records:
        for row in rows_of(record, merge=merge, calibration=calibration):
            for layer, value in row.get("deviation", {}).items():
                layers.setdefault(layer, []).append(value)
    return {layer: spread(values) for layer, values in layers.items()}


def within_seed_spread(
    records: Iterable[Record], role: str, calibration: str, how: str
) -> float | None:
    """Standard deviation over masks or draws of the mean score, averaged over merges and seeds."""
    found = []
    for record in records:
        merges = {row["merge"] for row in rows_of(record, role, calibration=calibration)}
        for merge in merges:
            rows = rows_of(record, role, merge=merge, calibration=calibration)
            rows += rows_of(record, merge=merge, calibration=calibration)
            means = []
            for row in rows:
                kept = [s[0] for s, k in zip(row["test"][how], record["kept"], strict=True) if k]
                if kept:
                    means.append(fmean(kept))
            if len(means) > 1:
                found.append(stdev(means))
    return fmean(found) if found else None


def edges(records: Iterable[Record], calibration: str) -> tuple[int, int]:
    """How often the best λ lay at an end of its grid, of how many."""
    rows = [x for r in records for x in rows_of(r, calibration=calibration) if "edge" in x]
    return sum(row["edge"] for row in rows), len(rows)
