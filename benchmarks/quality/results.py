"""The figures behind the tables, and how one is written."""

from __future__ import annotations

from collections.abc import Sequence

from quality import collect
from quality.arms import ABSOLUTE, CONTROLS, FEATURE, MERGES, PERMUTED, SCALAR, TENSOR, WEIGHT
from quality.collect import AS_IT_COMES, BEST, Record
from quality.paired import Cells, Difference, difference
from quality.settings import RESAMPLES, SCENARIOS

COLUMNS = ("none", *WEIGHT, SCALAR, TENSOR, *PERMUTED, *FEATURE)
PACKAGE_CLAMP = "clamp 0.1–10"
HOW = {AS_IT_COMES: "as it comes (λ = 1, nothing tuned)", BEST: "best λ on validation (labels)"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown lines of a table.

    >>> table(["a", "b"], [["1", "2"]])
    ['| a | b |', '|---|---|', '| 1 | 2 |', '']
    """
    lines = [header, ["---"] * len(header), *rows]
    written = ["| " + " | ".join(line) + " |" for line in lines]
    written[1] = "|" + "---|" * len(header)
    return [*written, ""]


def plus_minus(value: collect.Spread | None) -> str:
    """``mean ± standard deviation``; of a single seed the mean alone."""
    if value is None:
        return "–"
    return f"{value[0]:.3f}" + ("" if value[1] is None else f" ± {value[1]:.3f}")


def signed(d: Difference | None) -> str:
    """Mean and interval; bold where the interval leaves out 0."""
    if d is None:
        return "–"
    text = f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    return f"**{text}**" if d.seen else text


def columns_of(scenario: str) -> tuple[str, ...]:
    return (*COLUMNS, ABSOLUTE) if scenario.endswith("/tiny") else COLUMNS


class Results:
    """All figures of one set of records (the reported seeds)."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = [r for r in records if not r["development"]]
        self.development = [r for r in records if r["development"]]
        self.scenarios = [s for s in SCENARIOS if self.of(s)]

    def of(self, scenario: str) -> list[Record]:
        return collect.of_scenario(self.records, scenario, development=False)

    def cells(
        self, scenario: str, merge: str, calibration: str, how: str, metric: int = 0
    ) -> dict[tuple[int, str], float]:
        return collect.cells(self.of(scenario), merge, calibration, how, metric)

    def pooled(
        self, scenario: str, calibration: str, how: str, metric: int = 0
    ) -> dict[tuple[int, str], float]:
        return collect.pooled(MERGES, lambda m: self.cells(scenario, m, calibration, how, metric))

    def versus(self, a: Cells, b: Cells) -> Difference | None:
        return difference(a, b, RESAMPLES)


assert set(CONTROLS) <= set(COLUMNS)
