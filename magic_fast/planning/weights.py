"""The steps of WSC on checkpoints, and what a calibration is as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from magic_fast.calibration import WeightCalibration
from magic_fast.calibration.feature import FeatureCalibration
from magic_fast.checkpoint import Checkpoint
from magic_fast.engine import MergePlan, Step, common_shape, place
from magic_fast.engine.plan.step import FLOATS
from magic_fast.planning.options import RunOptions
from magic_fast.planning.steps import input_of
from magic_fast.recipe import Recipe


def calibration_text(names: Sequence[str], **settings: Any) -> str:
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
    found: dict[str, Any] = {
        k: str(v) if not isinstance(v, bool | int | float | list | type(None)) else v
        for k, v in vars(value).items()
        if not k.startswith("_") and k not in ("sensitive", "clamp")
    }
    if isinstance(value, WeightCalibration) and isinstance(value.row_axis, Mapping):
        axes = value.row_axis.items()
        found["row_axis"] = {p: a if isinstance(a, int) else list(a) for p, a in axes}
    found["clamp"] = None if value.clamp is None else list(value.clamp)
    found["sensitive"] = None if value.sensitive is None else list(value.sensitive)
    return found


def weight_steps(
    models: Mapping[str, Checkpoint],
    names: Sequence[str],
    settings: WeightCalibration,
    *,
    wide: bool = False,
) -> list[Step]:
    """One step a tensor; ``wide`` keeps what is calibrated in float32."""
    merged, base, *experts = names
    settings.check_names(models[merged])
    roles = models[merged].roles
    recipe = Recipe(weights=(1.0,) * len(experts))
    steps = []
    for name in models[merged]:
        own = input_of(models, merged, name)
        dtype = models[merged].stored_dtype(name)
        plain = Step(name, own.info.shape, dtype, None, (own,), copy=True)
        if own.info.dtype not in FLOATS:
            steps.append(plain)
            continue
        resolved = settings.resolve(name, own.info.shape, recipe.weights, role=roles[name])
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


def plan_calibration(
    steps: Sequence[Step],
    models: Mapping[str, Checkpoint],
    names: Sequence[str],
    out: str,
    options: RunOptions,
    settings: Mapping[str, Any],
    *,
    text: str | None = None,
    warnings: Sequence[str] = (),
) -> MergePlan:
    """The plan of a calibration that writes to ``out``.

    Args:
        steps: of each tensor of the merged model.
        models: reference → checkpoint, opened.
        names: merged, whose small files come along, base, experts.
        settings: of the calibration, by the names users know.
        text: for the model card; None: what the settings say.
    """
    donor = names[0]
    return MergePlan(
        "calibrate",
        steps,
        place(steps, out, options.max_shard_size, models[donor]),
        models,
        donor,
        out,
        recipe_text=calibration_text(names, **settings) if text is None else text,
        settings=settings,
        warnings=list(warnings),
        backend=options.backend,
        memory=options.memory,
        device=options.device,
    )
