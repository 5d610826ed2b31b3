"""``calibrate_checkpoints``: WSC, FSC and DSC of checkpoints on disk."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magic_fast.api.checkpoints import (
    ProgressCall,
    check_disk,
    check_out,
    is_whole,
    open_named,
    run_and_close,
)
from magic_fast.api.records import finished, write_small_files
from magic_fast.api.steps import input_of
from magic_fast.calibration import WeightCalibration, as_calibration
from magic_fast.calibration.feature import FeatureCalibration, as_features
from magic_fast.checkpoint import Checkpoint, OutputFolder, open_checkpoint
from magic_fast.engine import MergePlan, MergeReport, Step, Written, common_shape, place
from magic_fast.engine.native import device_of
from magic_fast.engine.plan import FLOATS
from magic_fast.errors import InputError
from magic_fast.ops import refuse_backend
from magic_fast.recipe import Recipe

if TYPE_CHECKING:
    from magic_fast.api.feature_checkpoints import FeatureSpace

_SPACES = ("weight", "feature", "dual")


def calibrate_checkpoints(
    base: str | Path,
    experts: Sequence[str | Path],
    merged: str | Path,
    out: str | Path,
    *,
    space: str = "weight",
    calibration: str | WeightCalibration | Mapping[str, Any] = "wsc",
    data: Mapping[str, Any] | None = None,
    features: FeatureCalibration | Mapping[str, Any] | None = None,
    samples: int = 64,
    batch_size: int = 8,
    max_length: int = 512,
    device: str = "auto",
    backend: str | None = None,
    max_shard_size: int = 5 * 10**9,
    memory: int | None = None,
    nonfinite: str = "error",
    resume: bool = False,
    progress: ProgressCall | None = None,
) -> MergeReport:
    """WSC, FSC or DSC on a checkpoint that any other tool merged (docs/calibration.md); everything
    else as in :func:`merge_checkpoints`.

    Args:
        base, experts, merged: folders or ``.safetensors`` files of one architecture.
        out: where the calibrated model goes, in the dtypes of ``merged``.
        space: ``weight`` (WSC), ``feature`` (FSC) or ``dual`` (WSC, then FSC on its result).
        calibration: of WSC: ``"wsc"`` or settings.
        data: for FSC: task → path of samples (a ``.jsonl``, a ``.txt``, a folder of images), or
            batches as :func:`calibrate_features` takes them. A task is the name of an expert's
            folder, or tasks and experts go together in order.
        features: settings of FSC; None: the defaults.
        samples, batch_size, max_length: how many samples of a file, together in a batch, and
            tokens of each.

    FSC runs the merged model (an architecture of transformers, extra ``hf``) in float32 with one
    layer's weights in memory at a time, of base, merged and one expert; all samples pass through
    a layer before the next one is read.

    >>> calibrate_checkpoints("base", ["a", "b"], "merged", "calibrated")  # doctest: +SKIP
    """
    settings = as_calibration(calibration)
    if settings is None:
        raise InputError("calibration: expected 'wsc' or a WeightCalibration, got None.")
    if space not in _SPACES:
        raise InputError(f"space: expected one of {', '.join(_SPACES)}, got {space!r}.")
    if not experts:
        raise InputError("experts: expected at least one checkpoint, got none.")
    if (space == "weight") != (not data):
        raise InputError(
            "data: expected samples of each task for calibration in feature space, got none."
            if not data
            else "data: expected none in weight space, got some. Choose space 'feature' or 'dual'."
        )
    names = [str(merged), str(base), *(str(e) for e in experts)]
    target = check_out(out, resume)
    device = device_of(device)
    refuse_backend(backend, device)
    options: dict[str, Any] = {"backend": backend, "memory": memory, "device": device}
    models = open_named(names)
    try:
        if space == "weight":
            steps = _calibration_steps(models, names, settings)
            plan = MergePlan(
                "calibrate",
                steps,
                place(steps, target, max_shard_size),
                models,
                str(merged),
                target,
                recipe_text=_calibration_text(names, calibrate=settings),
                settings={"calibrate": settings},
                **options,
            )
            if not is_whole(Path(target)):
                check_disk(plan)
            return run_and_close(plan, nonfinite, resume, progress)
        from magic_fast.api.feature_checkpoints import FeatureSpace
        from magic_fast.integrations.hf_data import Sampling

        found = as_features(features)
        assert data is not None
        sampling = Sampling(samples, batch_size, max_length)
        work = FeatureSpace(models, names, data, found, sampling, device, progress)
        job = _FeatureJob(
            names, target, settings if space == "dual" else None, found, sampling, data, options,
            max_shard_size, nonfinite, resume, progress,
        )  # fmt: skip
        return job.run(work, models)
    finally:
        for model in models.values():
            model.close()


class _FeatureJob:
    """FSC, after WSC where that is asked for, and what it writes."""

    def __init__(
        self,
        names: Sequence[str],
        out: str,
        weights: WeightCalibration | None,
        features: FeatureCalibration,
        sampling: Any,
        data: Mapping[str, Any],
        options: Mapping[str, Any],
        max_shard_size: int,
        nonfinite: str,
        resume: bool,
        progress: ProgressCall | None,
    ) -> None:
        self._names, self._out, self._options = list(names), out, dict(options)
        self._max_shard_size, self._nonfinite = max_shard_size, nonfinite
        self._resume, self._progress = resume, progress
        if weights is not None and weights.sensitive is None and features.sensitive is not None:
            weights = replace(weights, sensitive=features.sensitive)
        self._weights = weights
        parts: dict[str, Any] = {} if weights is None else {"calibrate": weights}
        self._settings = {**parts, "features": features, "sampling": vars(sampling)}
        paths = {t: str(v) for t, v in data.items() if isinstance(v, str | Path)}
        self._text = _calibration_text(names, **self._settings, data=paths)

    def run(self, work: FeatureSpace, models: Mapping[str, Checkpoint]) -> MergeReport:
        files = [(f.size, f.header_hash) for name in self._names for f in models[name].files]
        self._settings |= {
            "data": work.digest(),
            "models": hashlib.sha256(repr(files).encode()).hexdigest(),
        }
        if self._resume and is_whole(Path(self._out)):
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
        if not self._resume:
            shutil.rmtree(middle, ignore_errors=True)
        steps = _calibration_steps(models, self._names, self._weights, wide=True)
        plan = MergePlan(
            "calibrate",
            steps,
            place(steps, middle, self._max_shard_size),
            models,
            self._names[0],
            middle,
            recipe_text=_calibration_text(self._names, calibrate=self._weights),
            settings={"calibrate": self._weights},
            **self._options,
        )
        if not is_whole(Path(middle)):
            check_disk(plan)
        return run_and_close(plan, self._nonfinite, self._resume, self._progress)

    def _second(
        self,
        work: FeatureSpace,
        models: Mapping[str, Checkpoint],
        whole: str,
        first: MergeReport | None,
    ) -> MergeReport:
        steps, layers = work.steps(models, whole)
        plan = MergePlan(
            "calibrate",
            steps,
            place(steps, self._out, self._max_shard_size),
            work.models,
            self._names[0],
            self._out,
            recipe_text=self._text,
            settings=self._settings,
            warnings=work.warnings,
            **self._options,
        )
        check_disk(plan)
        finish = partial(_finish, layers, first)
        report = run_and_close(plan, self._nonfinite, self._resume, self._progress, finish)
        report.bytes_read += work.bytes_read
        if first is not None:
            report.bytes_read += first.bytes_read
            report.bytes_written += first.bytes_written
        return report


def _finish(
    layers: list[dict[str, Any]],
    first: MergeReport | None,
    plan: MergePlan,
    report: MergeReport,
    output: OutputFolder,
    written: Written,
) -> None:
    """One report of both spaces."""
    report.layers = layers
    if first is not None:
        report.tensors = first.tensors
    write_small_files(plan, report, output, written)


def _beside(out: str, purpose: str) -> str:
    """A folder beside OUT for what is needed on the way."""
    path = Path(out)
    return str(path.parent / f".{path.name}.{purpose}")


def _calibration_text(names: Sequence[str], **settings: Any) -> str:
    import yaml

    merged, base, *experts = names
    document = {"base": base, "experts": experts, "merged": merged}
    document |= {k: _fields(v) for k, v in settings.items()}
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    return text


def _fields(value: Any) -> Any:
    """Settings as YAML has them."""
    if not isinstance(value, WeightCalibration | FeatureCalibration):
        return value
    found = {
        k: str(v) if not isinstance(v, bool | int | float | list | type(None)) else v
        for k, v in vars(value).items()
        if not k.startswith("_") and k not in ("sensitive", "clamp")
    }
    found["clamp"] = None if value.clamp is None else list(value.clamp)
    found["sensitive"] = None if value.sensitive is None else list(value.sensitive)
    return found


def _calibration_steps(
    models: Mapping[str, Checkpoint],
    names: Sequence[str],
    settings: WeightCalibration,
    *,
    wide: bool = False,
) -> list[Step]:
    """One step a tensor; ``wide`` keeps what is calibrated in float32."""
    merged, base, *experts = names
    settings.check_names(models[merged])
    model_type = models[merged].config.get("model_type")
    recipe = Recipe(weights=(1.0,) * len(experts))
    steps = []
    for name in models[merged]:
        own = input_of(models, merged, name)
        dtype = models[merged].stored_dtype(name)
        plain = Step(name, own.info.shape, dtype, None, (own,), copy=True)
        if own.info.dtype not in FLOATS:
            steps.append(plain)
            continue
        resolved = settings.resolve(name, own.info.shape, recipe.weights, model_type=model_type)
        if resolved is None:
            steps.append(plain)
            continue
        rows = [input_of(models, m, name) for m in (base, *experts)]
        common_shape(name, [own, *rows])
        steps.append(
            replace(
                plain, dtype="F32" if wide and dtype != "F64" else dtype,
                base=rows[0], experts=tuple(rows[1:]), recipe=recipe, merged=own,
                calibration=resolved, copy=False,
            )
        )  # fmt: skip
    return steps
