"""The choice of defaults on development seeds, and what it is worth on the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from quality.arms import CALIBRATIONS, MERGES
from quality.collect import AS_IT_COMES, Record, cells, pooled
from quality.settings import CLAMPED, CLAMPS, FIXED

SCALES = (AS_IT_COMES, *(f"{s:.2f}" for s in FIXED))
PACKAGE = {"WSC": "WSC manifold", "FSC": "FSC", "DSC": "DSC"}
OPTIONS = {
    "WSC": ("WSC manifold", "WSC sphere"),
    "FSC": ("FSC", "FSC sequential"),
    "DSC": ("DSC", "DSC sphere"),
}


@dataclass(frozen=True)
class Setting:
    """A calibration with a fixed λ and a clamp ('' is the package's)."""

    calibration: str
    scale: str = AS_IT_COMES
    clamp: str = ""

    def __str__(self) -> str:
        scale = "1" if self.scale == AS_IT_COMES else self.scale
        return f"{self.calibration}, λ {scale}" + (f", {self.clamp}" if self.clamp else "")


def value(records: Iterable[Record], setting: Setting, merges: Sequence[str]) -> float | None:
    """Mean validation score over merges, scenarios, seeds and tasks."""
    records = list(records)
    found: list[float] = []
    for scenario in sorted({r["scenario"] for r in records}):
        of = [r for r in records if r["scenario"] == scenario]
        for merge in merges:
            found += score_cells(of, setting, merge, "validation").values()
    return fmean(found) if found else None


def score_cells(
    records: Iterable[Record], setting: Setting, merge: str, part: str
) -> dict[tuple[int, str], float]:
    role = "clamp" if setting.clamp else "main"
    return cells(
        records, merge, setting.calibration, setting.scale,
        part=part, role=role, clamp=setting.clamp,
    )  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """What the development seeds chose for a calibration.

    Attributes:
        setting: variant or order, and λ, over all merges.
        clamp: with that setting, over the merges on which clamps were varied ('': the package's).
        tried: every setting compared, with its mean validation score.
        clamps: every clamp compared.
    """

    setting: Setting
    clamp: str
    tried: list[tuple[Setting, float]]
    clamps: list[tuple[str, float]]


def choose(development: Sequence[Record]) -> dict[str, Choice]:
    """Calibration → what is best by the mean validation score."""
    chosen = {}
    for name, options in OPTIONS.items():
        tried = [
            (s, v)
            for calibration in options
            for scale in SCALES
            if (v := value(development, s := Setting(calibration, scale), MERGES)) is not None
        ]
        if not tried:
            continue
        best = max(tried, key=lambda pair: pair[1])[0]
        clamps = [
            (clamp, v)
            for clamp in ("", *CLAMPS)
            if (v := value(development, replace(best, clamp=clamp), CLAMPED)) is not None
        ]
        clamp = max(clamps, key=lambda pair: pair[1])[0] if clamps else ""
        chosen[name] = Choice(best, clamp, tried, clamps)
    return chosen


def compared(
    records: Sequence[Record], setting: Setting, other: Setting
) -> tuple[dict[tuple[int, str], float], dict[tuple[int, str], float]]:
    """Test cells of two settings over the merges that both were run on."""
    merges = CLAMPED if setting.clamp or other.clamp else MERGES
    return (
        pooled(merges, lambda m: score_cells(records, setting, m, "test")),
        pooled(merges, lambda m: score_cells(records, other, m, "test")),
    )


assert set(PACKAGE.values()) <= set(CALIBRATIONS)
