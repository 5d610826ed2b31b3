"""Finds which layers a model is sensitive to: each one's part of the merged task vector is enlarged
alone, and the model is looked at (docs/calibration.md)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.calibration.sensitivity.lists import TOP, SensitivityReport, lowest
from magic_fast.calibration.tensors import TensorFilter
from magic_fast.calibration.values import is_number
from magic_fast.calibration.weight import WeightCalibration
from magic_fast.errors import InputError
from magic_fast.reference.sensitivity import differences_from_median

log = logging.getLogger("magic_fast")

Change = Callable[[str], Tensor]  # name → the tensor with its task vector enlarged
Tensors = str | TensorFilter | Sequence[str] | None


@dataclass(frozen=True)
class Unit:
    """What is enlarged at a time: one tensor, or those of a module."""

    name: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Evaluated:
    """Progress: evaluations done, of how many, and what was enlarged in the last one."""

    done: int
    total: int
    name: str


Progress = Callable[[Evaluated], None]


def units_of(shapes: Mapping[str, Sequence[int]], by: str, tensors: Tensors) -> list[Unit]:
    """The units of a model with tensors of these shapes, in its order.

    Raises:
        InputError: no such tensor, or none at all.
    """
    if by not in ("tensor", "module"):
        raise InputError(f"by: expected 'tensor' or 'module', got {by!r}.")
    chosen = [name for name, shape in shapes.items() if math.prod(shape)]
    if isinstance(tensors, str | TensorFilter):
        rule = WeightCalibration(tensors=tensors)
        chosen = [name for name in chosen if rule.selects(name, shapes[name])]
    elif tensors is not None:
        unknown = [name for name in tensors if name not in shapes]
        if unknown:
            raise InputError(
                f"tensors: expected names of the model's tensors, got {unknown[0]!r}"
                f"{f' (and {len(unknown) - 1} more)' if len(unknown) > 1 else ''}, which it does "
                "not have. Check the list against the model's names."
            )
        chosen = [name for name in chosen if name in set(tensors)]
    if not chosen:
        raise InputError("tensors: expected at least one of the model's tensors, got none.")
    if by == "tensor":
        return [Unit(name, (name,)) for name in chosen]
    modules: dict[str, list[str]] = {}
    for name in chosen:
        modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return [Unit(name, tuple(inside)) for name, inside in modules.items()]


def evaluated_scores(
    plain: Callable[[], Any],
    enlarged: Callable[[Unit], Any],
    units: Sequence[Unit],
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """The caller's scores of the model as it is, float64 [] or [samples], and with each unit
    enlarged, [units] or [units, samples]."""
    first = _scores(plain(), "the model as it is", None)
    rows = []
    for unit in units:
        rows.append(_scores(enlarged(unit), f"{unit.name!r} enlarged", first.shape))
        if progress is not None:
            progress(Evaluated(len(rows), len(units), unit.name))
    return first, torch.stack(rows)


def _scores(value: Any, what: str, shape: torch.Size | None) -> Tensor:
    try:
        found = torch.as_tensor(value).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.dim() > 1 or not found.numel():
        raise InputError(
            f"evaluate for {what}: expected a number or one for each sample, got {_shown(value)}."
        )
    if shape is not None and found.shape != shape:
        raise InputError(
            f"evaluate for {what}: expected {_shown(torch.empty(shape))} as for the model as it "
            f"is, got {_shown(found)}. Evaluate the same samples each time."
        )
    if not bool(found.isfinite().all()):
        raise InputError(f"evaluate for {what}: expected finite scores, got NaN or infinity.")
    return found


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    if not value.dim():
        return "a number"
    return f"{len(value)} numbers" if value.dim() == 1 else f"the shape {tuple(value.shape)}"


@contextmanager
def in_place(model: nn.Module, change: Change, unit: Unit) -> Iterator[nn.Module]:
    """The model with one unit enlarged; afterwards its parameters hold their own values again."""
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name in unit.tensors:
            parameter = model.get_parameter(name)
            kept.append((parameter, parameter.data))
            parameter.data = change(name)
        yield model
    finally:
        for parameter, own in kept:
            parameter.data = own


def in_state(state: Mapping[str, Tensor], change: Change, unit: Unit) -> dict[str, Tensor]:
    """The state dict with one unit enlarged."""
    return {**state, **{name: change(name) for name in unit.tensors}}


@dataclass(frozen=True)
class Probe:
    """How sensitivity is measured; the fields are arguments of ``mf.sensitive_layers``."""

    by: str = "tensor"
    perturbation: float = 1.1
    top: int = TOP
    tensors: Tensors = None
    together: int | None = None
    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.perturbation) or not 0 <= self.perturbation < float("inf"):
            raise InputError(
                f"perturbation: expected a finite factor, got {self.perturbation!r}. "
                "1.1 enlarges a layer's change by a tenth."
            )
        if self.perturbation == 1:
            raise InputError("perturbation: expected a factor other than 1, which changes nothing.")
        for name, least in (("top", 1), ("resamples", 100), ("together", 1)):
            value = getattr(self, name)
            if name == "together" and value is None:
                continue
            if type(value) is not int or value < least:
                raise InputError(
                    f"{name}: expected a whole number of at least {least}, got {value!r}."
                )
        if not is_number(self.confidence) or not 0 < self.confidence < 1:
            raise InputError(
                f"confidence: expected a number between 0 and 1, got {self.confidence!r}."
            )

    def units(self, tensors: Mapping[str, Tensor]) -> list[Unit]:
        return units_of({n: tuple(t.shape) for n, t in tensors.items()}, self.by, self.tensors)

    def report(
        self, units: Sequence[Unit], plain: Tensor, scores: Tensor, metric: str
    ) -> SensitivityReport:
        """What was found, and whether it is more than noise; its warnings are logged too.

        Args:
            plain: score of the model as it is, float64 [] or [samples].
            scores: with each unit enlarged, float64 [units] or [units, samples].
        """
        found = _report_of(self, units, plain, scores, metric)
        for text in found.warnings:
            log.warning("%s", text)
        return found


def _report_of(
    probe: Probe, units: Sequence[Unit], plain: Tensor, scores: Tensor, metric: str
) -> SensitivityReport:
    names, confidence = [unit.name for unit in units], probe.confidence
    samples = scores.shape[1] if scores.dim() > 1 else None
    means = scores if samples is None else scores.mean(1)
    report = SensitivityReport(
        dict(zip(names, means.tolist(), strict=True)), metric, probe.perturbation, probe.by,
        min(probe.top, len(names)), samples, float(plain.mean()),
        confidence=confidence, resamples=probe.resamples, seed=probe.seed,
    )  # fmt: skip
    if bool((means == means[0]).all()) and len(names) > 1:
        report.noise = True
        report.warnings.append(
            "The list of sensitive layers is arbitrary: all scores are equal. Evaluate more "
            "samples, or by a finer measure."
        )
        return report
    if samples is None or len(names) < 2:
        report.warnings.append(
            "Whether the list of sensitive layers is noise is not known: "
            + (
                "nothing else was measured."
                if len(names) < 2
                else "one number was given. Let evaluate return the score of each sample."
            )
        )
        return report
    found, width = differences_from_median(
        scores, resamples=probe.resamples, confidence=confidence, seed=probe.seed
    )
    if not bool(width.isfinite().all()):
        report.warnings.append(
            "Whether the list of sensitive layers is noise is not known: the samples are too few "
            f"({samples})."
        )
        return report
    low, high = (found - width).tolist(), (found + width).tolist()
    report.intervals = dict(zip(names, zip(low, high, strict=True), strict=True))
    listed = lowest(report.scores, report.top)
    report.significant = [n for n in listed if report.intervals[n][1] < 0]
    report.noise = not report.significant
    if report.noise:
        report.warnings.append(
            f"The list of sensitive layers is noise: none of its {report.top} layers loses more "
            f"than the median layer beyond chance (at {confidence:.0%}, on {samples} samples). "
            "Measure on more samples, or calibrate without a list."
        )
    elif len(report.significant) < report.top:
        report.warnings.append(
            f"{len(report.significant)} of {report.top} sensitive layers lose more than the median "
            f"layer beyond chance (at {confidence:.0%}, on {samples} samples); the others may be "
            "noise."
        )
    return report
