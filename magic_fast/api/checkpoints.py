"""Whole checkpoints: plan, merge, calibrate, inspect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from magic_fast.api.collection import no_collection
from magic_fast.api.steps import calibration_of, steps_of
from magic_fast.api.tokenizing import align
from magic_fast.calibration import WeightCalibration, as_calibration
from magic_fast.checkpoint import Checkpoint
from magic_fast.config import MergeConfig
from magic_fast.config.references import find_model
from magic_fast.engine import (
    MergePlan,
    MergeReport,
    Progress,
    place,
)
from magic_fast.engine import run as run_plan
from magic_fast.engine.output.record import verified, write_small_files
from magic_fast.engine.plan.devices import device_of
from magic_fast.engine.plan.plan import free_bytes
from magic_fast.engine.run import Finish
from magic_fast.engine.sources.adapted import open_model
from magic_fast.errors import OutputError
from magic_fast.ops import refuse_backend

ProgressCall = Callable[[Progress], None]


def read_config(config: str | Path | MergeConfig | Mapping[str, Any]) -> MergeConfig:
    """A configuration from a path, YAML text, a mapping, or one already read."""
    if isinstance(config, MergeConfig):
        return config
    if isinstance(config, Mapping):
        return MergeConfig.from_dict(config)
    if isinstance(config, str) and ("\n" in config or ": " in config):
        return MergeConfig.from_yaml(config)
    return MergeConfig.from_file(config)


@no_collection()
def open_models(references: Mapping[str, tuple[Path, Path | None]]) -> dict[str, Checkpoint]:
    """Reference → checkpoint, of where each model and its adapter lie."""
    models: dict[str, Checkpoint] = {}
    try:
        for reference, (path, adapter) in references.items():
            models[reference] = open_model(path, adapter)
    except BaseException:
        for model in models.values():
            model.close()
        raise
    return models


def open_named(names: Iterable[str]) -> dict[str, Checkpoint]:
    """Checkpoints by their paths, ``model+adapter`` among them."""
    return open_models({n: find_model(n, None) or (Path(n), None) for n in names})


def check_out(out: str | Path, resume: bool) -> str:
    """OUT as a string, refused where something is in the way (which may be the finished result of a
    run that is resumed)."""
    path = Path(out).expanduser()
    if resume and is_whole(path):
        return str(path)
    if path.suffix == ".safetensors":
        return check_new_file(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(
            f"output folder {str(path)!r}: expected it missing or empty, got something in it. "
            "Remove it, or name another."
        )
    return str(path)


def check_new_file(path: str | Path) -> str:
    """A file to make, refused where one is."""
    path = Path(path).expanduser()
    if path.exists():
        raise OutputError(
            f"output file {str(path)!r}: expected none of that name, got one. Remove it, "
            "or name another."
        )
    return str(path)


def is_whole(path: Path) -> bool:
    """Whether a finished result lies there: nothing else has the final name."""
    if path.suffix == ".safetensors":
        return path.is_file()
    return path.is_dir() and any(path.iterdir())


def check_disk(plan: MergePlan) -> None:
    free = free_bytes(plan.out)
    if free < plan.disk_needed:
        raise OutputError(
            f"disk for {plan.out!r}: expected {plan.disk_needed} free bytes, got {free}. "
            "Free some space, or write elsewhere."
        )


@no_collection()
def plan_checkpoints(
    config: str | Path | MergeConfig | Mapping[str, Any],
    out: str | Path,
    *,
    device: str = "auto",
    backend: str | None = None,
    max_shard_size: int = 5 * 10**9,
    memory: int | None = None,
    seed: int | None = None,
    compat: str | None = None,
    calibrate: str | WeightCalibration | Mapping[str, Any] | None = None,
    allow_embedding_truncation: bool = False,
    resume: bool = False,
) -> MergePlan:
    """Everything a merge would do, checked, before any data is read. Arguments as of
    :func:`merge_checkpoints`."""
    settings = read_config(config)
    target = check_out(out, resume)
    place_of_work = device_of(device)
    refuse_backend(backend, place_of_work)
    models = open_models({r: settings.resolve_model(r) for r in settings.model_references})
    try:
        calibration = as_calibration(calibrate) or calibration_of(settings)
        chosen_seed = seed if seed is not None else (settings.seed or 0)
        aligned = align(settings, models)
        models = aligned.models
        steps, vocab_size = steps_of(
            settings,
            models,
            calibration,
            seed=chosen_seed,
            compat=compat,
            allow_truncation=allow_embedding_truncation,
        )
        warnings = list(settings.warnings)
        if calibration is not None and max((len(s.experts) for s in steps), default=0) == 1:
            warnings.append(
                "calibrating the merge of one expert gives back a full-size task vector"
            )
        plan = MergePlan(
            settings.merge_method,
            steps,
            place(steps, target, max_shard_size),
            models,
            settings.donor,
            target,
            backend,
            settings.num_layers,
            vocab_size or aligned.rows,
            settings.to_yaml(),
            warnings,
            memory,
            place_of_work,
            {
                "seed": chosen_seed,
                "calibrate": calibration,
                "preset": settings.preset,
                "dtype": settings.dtype,
                "out_dtype": settings.out_dtype,
                "compat": compat,
                "allow_embedding_truncation": allow_embedding_truncation,
                **aligned.settings,
            },
            aligned.tokenizer,
        )
        if not is_whole(Path(target)):
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
    device: str = "auto",
    backend: str | None = None,
    max_shard_size: int = 5 * 10**9,
    memory: int | None = None,
    seed: int | None = None,
    compat: str | None = None,
    calibrate: str | WeightCalibration | Mapping[str, Any] | None = None,
    allow_embedding_truncation: bool = False,
    nonfinite: str = "error",
    resume: bool = False,
    progress: ProgressCall | None = None,
) -> MergeReport:
    """Merges checkpoints on disk as a configuration says.

    Args:
        config: path of a YAML, YAML text, a mapping, or a :class:`MergeConfig`.
        out: folder (or ``.safetensors`` file) to make; it appears once, whole.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
        backend: ``native``, ``torch``; None chooses.
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
    plan = plan_checkpoints(
        config,
        out,
        device=device,
        backend=backend,
        max_shard_size=max_shard_size,
        memory=memory,
        seed=seed,
        compat=compat,
        calibrate=calibrate,
        allow_embedding_truncation=allow_embedding_truncation,
        resume=resume,
    )
    return run_and_close(plan, nonfinite, resume, progress)


def run_and_close(
    plan: MergePlan,
    nonfinite: str,
    resume: bool,
    progress: ProgressCall | None,
    finish: Finish = write_small_files,
) -> MergeReport:
    """Runs a plan, or verifies its finished result; its checkpoints are closed afterwards."""
    try:
        if resume and is_whole(Path(plan.out)):
            return verified(plan, nonfinite)
        return run_plan(plan, nonfinite=nonfinite, resume=resume, progress=progress, finish=finish)
    finally:
        for model in plan.models.values():
            model.close()
