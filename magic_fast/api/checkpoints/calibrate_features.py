"""FSC and DSC of checkpoints: coefficients first, then the plan that folds them in."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magic_fast.api.results import FeatureReport
from magic_fast.calibration import WeightCalibration
from magic_fast.calibration.feature import FeatureCalibration
from magic_fast.checkpoint import Checkpoint, OutputFolder, open_checkpoint
from magic_fast.engine import MergePlan, MergeReport, Written
from magic_fast.engine.output.finished import finished
from magic_fast.engine.output.record import write_small_files
from magic_fast.errors import InputError
from magic_fast.planning.options import RunOptions
from magic_fast.planning.outputs import check_disk, is_whole, run_and_close
from magic_fast.planning.weights import calibration_text, plan_calibration, weight_steps

if TYPE_CHECKING:
    from magic_fast.api.checkpoints.feature_model import FeatureSpace


class FeatureJob:
    """FSC, after WSC where that is asked for, and what it writes."""

    def __init__(
        self,
        names: Sequence[str],
        out: str,
        weights: WeightCalibration | None,
        features: FeatureCalibration,
        sampling: Any,
        data: Mapping[str, Any],
        options: RunOptions,
    ) -> None:
        self._names, self._out, self._options = list(names), out, options
        if weights is not None and weights.sensitive is None and features.sensitive is not None:
            weights = replace(weights, sensitive=features.sensitive)
        self._weights = weights
        parts: dict[str, Any] = {} if weights is None else {"calibrate": weights}
        self._settings = {**parts, "features": features, "sampling": vars(sampling)}
        paths = {t: str(v) for t, v in data.items() if isinstance(v, str | Path)}
        self._text = calibration_text(names, **self._settings, data=paths)

    def run(self, work: FeatureSpace, models: Mapping[str, Checkpoint]) -> MergeReport:
        files = [(f.size, f.header_hash) for name in self._names for f in models[name].files]
        self._settings |= {
            "data": work.digest(),
            "models": hashlib.sha256(repr(files).encode()).hexdigest(),
        }
        if self._options.resume and is_whole(Path(self._out)):
            return finished(self._out, self._text, self._settings)
        started = time.monotonic()
        middle, whole = (_beside(self._out, purpose) for purpose in ("wsc", "whole"))
        shutil.rmtree(whole, ignore_errors=True)
        first: MergeReport | None = None
        try:
            if self._weights is not None:
                first = self._first(middle, models)
                work.take_merged(open_checkpoint(middle))
            report = self._second(work, models, whole, first)
        except InputError:
            shutil.rmtree(middle, ignore_errors=True)  # it would come again
            raise
        finally:
            shutil.rmtree(whole, ignore_errors=True)
        shutil.rmtree(middle, ignore_errors=True)
        report.seconds = time.monotonic() - started
        return report

    def _first(self, middle: str, models: Mapping[str, Checkpoint]) -> MergeReport:
        """WSC into a checkpoint beside OUT, in float32 what it changes."""
        assert self._weights is not None
        if not self._options.resume:
            shutil.rmtree(middle, ignore_errors=True)
        steps = weight_steps(models, self._names, self._weights, wide=True)
        settings = {"calibrate": self._weights}
        plan = plan_calibration(steps, models, self._names, middle, self._options, settings)
        check_disk(plan)
        return run_and_close(plan, self._options)

    def _second(
        self,
        work: FeatureSpace,
        models: Mapping[str, Checkpoint],
        whole: str,
        first: MergeReport | None,
    ) -> MergeReport:
        steps, found = work.steps(models, whole)
        plan = plan_calibration(
            steps, work.models, self._names, self._out, self._options, self._settings,
            text=self._text, warnings=work.warnings,
        )  # fmt: skip
        check_disk(plan)
        finish = partial(_finish, found, first)
        report = run_and_close(plan, self._options, finish)
        report.bytes_read += work.bytes_read
        if first is not None:
            report.bytes_read += first.bytes_read
            report.bytes_written += first.bytes_written
        return report


def _finish(
    found: FeatureReport,
    first: MergeReport | None,
    plan: MergePlan,
    report: MergeReport,
    output: OutputFolder,
    written: Written,
) -> None:
    """One report of both spaces."""
    report.layers = [layer.as_dict() for layer in found.layers]
    report.left = found.left
    if first is not None:
        report.tensors = first.tensors
    write_small_files(plan, report, output, written)


def _beside(out: str, purpose: str) -> str:
    """A folder beside OUT for what is needed on the way."""
    path = Path(out)
    return str(path.parent / f".{path.name}.{purpose}")
