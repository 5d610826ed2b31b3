"""``calibrate_checkpoints``: WSC, FSC, DSC, SVC and LiNeS of checkpoints on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from magic_fast.api.checkpoints.calibrate_features import FeatureJob
from magic_fast.calibration import WeightCalibration, as_calibration
from magic_fast.calibration.builtin import SPACES
from magic_fast.calibration.feature import FeatureCalibration, as_features
from magic_fast.calibration.samples import Sampling
from magic_fast.engine import MergeReport
from magic_fast.engine.execute.executor import Executor
from magic_fast.engine.execute.registry import refuse_executor
from magic_fast.engine.plan.devices import device_of
from magic_fast.errors import InputError
from magic_fast.ops import refuse_backend
from magic_fast.planning.options import ProgressCall, RunOptions
from magic_fast.planning.outputs import check_disk, check_out, closing, run_and_close
from magic_fast.planning.sources import open_named
from magic_fast.planning.spectrum import lines_steps, svc_steps
from magic_fast.planning.weights import plan_calibration, weight_steps

_WITH_DATA = ("feature", "dual")


def calibrate_checkpoints(
    base: str | Path,
    experts: Sequence[str | Path] | Mapping[str, str | Path],
    merged: str | Path,
    out: str | Path,
    *,
    space: str = "weight",
    calibration: str | WeightCalibration | Mapping[str, Any] = "wsc",
    data: Mapping[str, Any] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    features: FeatureCalibration | Mapping[str, Any] | None = None,
    samples: int = Sampling.samples,
    batch_size: int = Sampling.batch_size,
    max_length: int = Sampling.max_length,
    alpha: float | None = None,
    beta: float | None = None,
    num_blocks: int | None = None,
    device: str = RunOptions.device,
    backend: str | None = None,
    executor: str | Executor = RunOptions.executor,
    max_shard_size: int = RunOptions.max_shard_size,
    memory: int | None = None,
    nonfinite: str = RunOptions.nonfinite,
    resume: bool = False,
    progress: ProgressCall | None = None,
) -> MergeReport:
    """WSC, FSC, DSC, SVC or LiNeS on a checkpoint that any other tool merged (docs/calibration.md);
    everything else as in :func:`merge_checkpoints`.

    Args:
        base, experts, merged: folders or ``.safetensors`` files of one architecture; experts may be
            a mapping of task names to them.
        out: where the calibrated model goes, in the dtypes of ``merged``.
        space: ``weight`` (WSC), ``feature`` (FSC), ``dual`` (WSC, then FSC on its result), ``svc``
            (singular values, :func:`svc`) or ``lines`` (depth, :func:`lines`).
        calibration: of WSC: ``"wsc"`` or settings.
        data: for FSC: task → path of samples (a ``.jsonl``, a ``.txt``, a folder of images), or
            batches as :func:`calibrate_features` takes them. A task is the name of an expert
            (of its folder, where ``experts`` is a list), or tasks and experts go together in order.
        inputs: from a batch that is given to what the model is called with, as of
            :func:`calibrate_features`; files need none.
        features: settings of FSC; None: the defaults.
        samples, batch_size, max_length: how many samples of a file, together in a batch, and
            tokens of each.
        alpha: of ``svc`` (None: 0.1) and of ``lines`` (None: from the norms of all models, which
            takes one more read).
        beta: of ``lines``, which needs it.
        executor: what writes the result, as of :func:`merge_checkpoints`; FSC runs the model in
            this process all the same.
        num_blocks: of ``lines``; None: as many blocks as the merged model has.

    FSC runs the merged model (an architecture of transformers, extra ``hf``) in float32 with one
    layer's weights in memory at a time, of base, merged and one expert; all samples pass through
    a layer before the next one is read.

    >>> calibrate_checkpoints("base", ["a", "b"], "merged", "calibrated")  # doctest: +SKIP
    """
    refuse_executor(executor)
    settings = as_calibration(calibration)
    if settings is None:
        raise InputError("calibration: expected 'wsc' or a WeightCalibration, got None.")
    if space not in SPACES:
        raise InputError(f"space: expected one of {', '.join(SPACES)}, got {space!r}.")
    if not experts:
        raise InputError("experts: expected at least one checkpoint, got none.")
    if (space in _WITH_DATA) != bool(data):
        raise InputError(
            "data: expected samples of each task for calibration in feature space, got none."
            if not data
            else f"data: expected none for space {space!r}, got some. Choose space 'feature' or "
            "'dual'."
        )
    if inputs is not None and not data:
        raise InputError("inputs: expected it with data, got it without. Leave it out.")
    _refuse_numbers(space, alpha=alpha, beta=beta, num_blocks=num_blocks)
    tasks = list(experts) if isinstance(experts, Mapping) else None
    paths = experts.values() if isinstance(experts, Mapping) else experts
    names = [str(merged), str(base), *(str(e) for e in paths)]
    target = check_out(out, resume)
    options = RunOptions(
        device_of(device), backend, executor, max_shard_size, memory, nonfinite, resume, progress
    )
    refuse_backend(backend, options.device)
    models = open_named(names)
    with closing(models):
        if space not in _WITH_DATA:
            chosen: dict[str, Any] = {"calibrate": settings}
            if space == "weight":
                steps = weight_steps(models, names, settings)
            elif space == "svc":
                steps, numbers = svc_steps(models, names, alpha)
                chosen = {"space": space, **numbers}
            else:
                steps, numbers = lines_steps(models, names, alpha, beta, num_blocks)
                chosen = {"space": space, **numbers}
            plan = plan_calibration(steps, models, names, target, options, chosen)
            check_disk(plan)
            return run_and_close(plan, options)
        from magic_fast.api.checkpoints.feature_model import FeatureSpace

        found = as_features(features)
        assert data is not None
        sampling = Sampling(samples, batch_size, max_length)
        work = FeatureSpace(
            models, names, data, found, sampling, options.device, progress, inputs, tasks
        )
        weights = settings if space == "dual" else None
        job = FeatureJob(names, target, weights, found, sampling, data, options)
        return job.run(work, models)


def _refuse_numbers(space: str, **numbers: float | None) -> None:
    """Refuses a number that would do nothing in the space."""
    used = {"svc": ("alpha",), "lines": tuple(numbers)}.get(space, ())
    for name, value in numbers.items():
        if value is not None and name not in used:
            where = "'svc' or 'lines'" if name == "alpha" else "'lines'"
            raise InputError(
                f"{name}: expected none for space {space!r}, got {value!r}. It belongs to space "
                f"{where}."
            )
    if space == "lines" and numbers["beta"] is None:
        raise InputError(
            "beta for lines: expected a finite number, got none. Give what the last block gets "
            "beyond alpha."
        )
