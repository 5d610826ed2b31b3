"""``plan_checkpoints`` and ``merge_checkpoints``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from magic_fast.calibration import WeightCalibration, as_calibration
from magic_fast.config import MergeConfig
from magic_fast.engine import MergePlan, MergeReport
from magic_fast.engine.execute.executor import Executor
from magic_fast.engine.execute.registry import refuse_executor
from magic_fast.engine.plan.devices import device_of
from magic_fast.ops import refuse_backend
from magic_fast.planning.merge import ONE_EXPERT, merges_one_expert, plan_merge
from magic_fast.planning.options import ProgressCall, RunOptions
from magic_fast.planning.outputs import check_disk, check_out, run_and_close
from magic_fast.planning.pause_gc import no_collection
from magic_fast.planning.sources import open_models, read_config
from magic_fast.planning.steps import calibration_of
from magic_fast.planning.vocabulary import align


def plan_checkpoints(
    config: str | Path | MergeConfig | Mapping[str, Any],
    out: str | Path,
    *,
    device: str = RunOptions.device,
    backend: str | None = None,
    max_shard_size: int = RunOptions.max_shard_size,
    memory: int | None = None,
    seed: int | None = None,
    compat: str | None = None,
    calibrate: str | WeightCalibration | Mapping[str, Any] | None = None,
    allow_embedding_truncation: bool = False,
    resume: bool = False,
) -> MergePlan:
    """Everything a merge would do, checked. Of data only what decides it is read: tied weights that
    a model stores twice, buffers, beginnings of quantised weights. Arguments as of
    :func:`merge_checkpoints`.
    """
    options = RunOptions(
        device, backend, max_shard_size=max_shard_size, memory=memory, resume=resume
    )
    return _plan(config, out, options, seed, compat, calibrate, allow_embedding_truncation)


@no_collection()
def _plan(
    config: str | Path | MergeConfig | Mapping[str, Any],
    out: str | Path,
    options: RunOptions,
    seed: int | None,
    compat: str | None,
    calibrate: str | WeightCalibration | Mapping[str, Any] | None,
    allow_embedding_truncation: bool,
) -> MergePlan:
    settings = read_config(config)
    target = check_out(out, options.resume)
    options = replace(options, device=device_of(options.device))
    refuse_backend(options.backend, options.device)
    models = open_models({r: settings.resolve_model(r) for r in settings.model_references})
    try:
        calibration = as_calibration(calibrate) or calibration_of(settings)
        aligned = align(settings, models)
        models = aligned.models
        plan = plan_merge(
            settings,
            aligned,
            target,
            options,
            calibration=calibration,
            seed=seed if seed is not None else (settings.seed or 0),
            compat=compat,
            allow_embedding_truncation=allow_embedding_truncation,
        )
        if calibration is not None and merges_one_expert(plan.steps):
            plan.warnings.append(ONE_EXPERT)
        check_disk(plan)
    except BaseException:
        for model in models.values():
            model.close()
        raise
    return plan


def merge_checkpoints(
    config: str | Path | MergeConfig | Mapping[str, Any],
    out: str | Path,
    *,
    device: str = RunOptions.device,
    backend: str | None = None,
    executor: str | Executor = RunOptions.executor,
    max_shard_size: int = RunOptions.max_shard_size,
    memory: int | None = None,
    seed: int | None = None,
    compat: str | None = None,
    calibrate: str | WeightCalibration | Mapping[str, Any] | None = None,
    allow_embedding_truncation: bool = False,
    nonfinite: str = RunOptions.nonfinite,
    resume: bool = False,
    progress: ProgressCall | None = None,
) -> MergeReport:
    """Merges checkpoints on disk as a configuration says.

    Args:
        config: path of a YAML, YAML text, a mapping, or a :class:`MergeConfig`.
        out: folder (or ``.safetensors`` file) to make; it appears once, whole.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
        backend: a name that ``mf.backends()`` lists; None chooses.
        executor: what runs the plan: ``local`` (this process, on the CPU), ``gpu``, a name that
            :func:`register_executor` or an installed package gave, or an executor itself, which is
            how it takes settings; ``auto``: ``local`` on the CPU, ``gpu`` on GPUs. The bytes are
            the same.
        max_shard_size: bytes of tensors in one file.
        seed: of the random trims, instead of the configuration's.
        compat: ``"mergekit-0.1.4"`` matches that release's faults.
        calibrate: ``"wsc"`` or settings, instead of the configuration's block.
        allow_embedding_truncation: cut embeddings of unequal vocabularies to the leading rows all
            have.
        nonfinite: ``error`` or ``propagate``.
        memory: bytes of buffers (32 MiB at least); None: 128 MiB. Tensors larger than their share
            are streamed in pieces, so it bounds what is held whatever the size of the models. A
            tensor that must be held whole and needs more is refused; with None, one that needs
            more than the machine has free.
        resume: continue an interrupted run of the same configuration and inputs; with nothing to
            continue it starts afresh; where ``out`` is whole it is verified.
        progress: called with :class:`Progress` after each batch of tensors.

    Returns:
        What was done, tensor by tensor; the same is in ``magic_fast.json`` beside the weights.

    Raises:
        ConfigError, CheckpointError, InputError: before anything is written.
        NonFiniteError, OutputError: on the way; nothing is left under the final name.

    >>> merge_checkpoints("ties.yml", "merged")  # doctest: +SKIP
    """
    refuse_executor(executor)
    options = RunOptions(
        device, backend, executor, max_shard_size, memory, nonfinite, resume, progress
    )
    plan = _plan(config, out, options, seed, compat, calibrate, allow_embedding_truncation)
    return run_and_close(plan, options)
