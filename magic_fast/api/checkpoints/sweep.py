"""Whole checkpoints merged in many combinations of parameters, from one read of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from magic_fast.calibration import WeightCalibration, as_calibration
from magic_fast.config import MergeConfig
from magic_fast.engine import MergePlan, MergeReport
from magic_fast.engine.execute.executor import Executor
from magic_fast.engine.execute.registry import refuse_executor
from magic_fast.engine.output.record import write_small_files
from magic_fast.engine.plan.devices import device_of
from magic_fast.engine.plan.plan import free_bytes
from magic_fast.engine.run import run_sweep
from magic_fast.errors import InputError, OutputError
from magic_fast.ops import refuse_backend
from magic_fast.planning.combinations import Combination, check_settings, combinations, configure
from magic_fast.planning.merge import ONE_EXPERT, merges_one_expert, plan_merge
from magic_fast.planning.options import ProgressCall, RunOptions
from magic_fast.planning.outputs import check_out
from magic_fast.planning.sources import open_models, read_config
from magic_fast.planning.steps import calibration_of
from magic_fast.planning.vocabulary import align


@dataclass
class SweepReport:
    """What a sweep did.

    Attributes:
        out: the folder; ``reports[i]`` is of its sub-folder ``combinations[i].name``.
        combinations: the values of each.
        reports: of each, as of a merge; ``bytes_read`` counts the one read that all share.
        seconds: wall time.
    """

    out: str
    method: str
    combinations: list[Combination]
    reports: list[MergeReport]
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sweep_checkpoints(
    config: str | Path | MergeConfig | Mapping[str, Any],
    out: str | Path,
    settings: Mapping[str, Sequence[Any]],
    *,
    device: str = RunOptions.device,
    backend: str | None = None,
    executor: str | Executor = RunOptions.executor,
    max_shard_size: int = RunOptions.max_shard_size,
    memory: int | None = None,
    compat: str | None = None,
    calibrate: str | WeightCalibration | Mapping[str, Any] | None = None,
    allow_embedding_truncation: bool = False,
    nonfinite: str = RunOptions.nonfinite,
    progress: ProgressCall | None = None,
) -> SweepReport:
    """Merges checkpoints once for every combination of values, reading them once.

    What is read is merged in all combinations before it is let go. Combinations that differ in
    ``lambda`` alone share everything up to the last multiplication. Where thresholds are needed of
    tensors larger than a block of memory, one more read serves all combinations as a rule.

    Args:
        config: as of :func:`merge_checkpoints`.
        out: folder to make, with a sub-folder for each combination (``density=0.1,lambda=0.3``)
            and ``sweep.json``; it appears once, whole.
        settings: parameter → values: names of the configuration's ``parameters:``, ``seed``, or
            ``calibrate.NAME``.
        executor: as of :func:`merge_checkpoints`; those of this package read the checkpoints once,
            another one may read them once for each combination.

    Everything else as in :func:`merge_checkpoints`.

    Raises:
        ConfigError, CheckpointError, InputError, OutputError: before anything is written: an
            unknown parameter, a value out of range, more than 256 combinations, a disk too small
            for all of them.
        NonFiniteError, OutputError: on the way; nothing is left.

    >>> sweep_checkpoints("ties.yml", "sweep", {"density": [0.1, 0.2]})  # doctest: +SKIP
    """
    started = time.monotonic()
    refuse_executor(executor)
    own = read_config(config)
    check_settings(own, settings)
    chosen = combinations(settings)
    if Path(out).suffix == ".safetensors":
        raise InputError(f"output for a sweep: expected a folder, got the file {str(out)!r}.")
    target = check_out(out, False)
    options = RunOptions(
        device=device_of(device), backend=backend, max_shard_size=max_shard_size, memory=memory
    )
    refuse_backend(backend, options.device)
    configs = [configure(own, combination) for combination in chosen]
    models = open_models({r: own.resolve_model(r) for r in own.model_references})
    try:
        aligned = align(own, models)
        models = aligned.models
        plans = [
            plan_merge(
                each,
                aligned,
                str(Path(target) / combination.name),
                options,
                calibration=as_calibration(calibrate) or calibration_of(each),
                seed=each.seed or 0,
                compat=compat,
                allow_embedding_truncation=allow_embedding_truncation,
            )
            for combination, each in zip(chosen, configs, strict=True)
        ]
        warnings = _warnings(plans, settings)
        _check_disk(plans, target)

        def index(reports: Sequence[MergeReport]) -> str:
            return _index_text(own.merge_method, settings, chosen, reports, warnings)

        reports = run_sweep(
            plans,
            [combination.name for combination in chosen],
            target,
            executor=executor,
            nonfinite=nonfinite,
            progress=progress,
            finish=write_small_files,
            index=index,
        )
    finally:
        for model in models.values():
            model.close()
    report = SweepReport(target, own.merge_method, chosen, reports, warnings=warnings)
    report.seconds = time.monotonic() - started
    return report


def _check_disk(plans: Sequence[MergePlan], out: str) -> None:
    needed, free = sum(plan.disk_needed for plan in plans), free_bytes(out)
    if free < needed:
        raise OutputError(
            f"disk for {out!r}: expected {needed} free bytes for {len(plans)} models, got {free}. "
            "Sweep fewer values, free some space, or write elsewhere."
        )


def _warnings(plans: Sequence[MergePlan], settings: Mapping[str, Sequence[Any]]) -> list[str]:
    found = list(dict.fromkeys(w for plan in plans for w in plan.warnings))
    steps = [step for step in plans[0].steps if step.calibration is not None]
    if steps and merges_one_expert(steps):
        found.append(ONE_EXPERT)
    swept = {name.removeprefix("parameters.") for name, values in settings.items() if values[1:]}
    if steps and swept & {"lambda", "scale"}:
        found.append(
            "lambda cancels where rows are calibrated: combinations that differ in it alone "
            f"differ in the other {len(plans[0].steps) - len(steps)} tensors, and in rows that "
            "the clamp or a side holds. Sweep calibrate.scale instead"
        )
    return found


def _index_text(
    method: str,
    settings: Mapping[str, Sequence[Any]],
    chosen: Sequence[Combination],
    reports: Sequence[MergeReport],
    warnings: Sequence[str],
) -> str:
    """``sweep.json``: what each sub-folder is."""
    listed = [
        {"folder": c.name, "values": dict(c.values), "backend": report.backend}
        for c, report in zip(chosen, reports, strict=True)
    ]
    record = {
        "format": 1,
        "method": method,
        "set": {name: list(values) for name, values in settings.items()},
        "combinations": listed,
        "warnings": list(warnings),
    }
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
