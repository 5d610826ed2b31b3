"""One merge of tensors, resolved: names and parameters to a recipe, tensors to jobs, jobs to what
is reported."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast import ops
from magic_fast.api.modules.names import kind_of
from magic_fast.api.options import MergeOptions, Weights
from magic_fast.api.results import MergeResult
from magic_fast.api.tensors.models import Named, Tensors
from magic_fast.calibration import WeightCalibration, as_calibration
from magic_fast.calibration.tensors import say_left
from magic_fast.errors import InputError
from magic_fast.methods.arguments import resolve_arguments
from magic_fast.methods.presets import build_recipe
from magic_fast.methods.registry import find_method
from magic_fast.methods.spec import MethodSpec, Question
from magic_fast.methods.statistics import recipe_of_statistics
from magic_fast.models import Kind, Role
from magic_fast.models.memory import roles_in_memory
from magic_fast.ops.job import Job, Stats
from magic_fast.recipe import Recipe, Reduce

DEFAULT_PRESET = "default"  # our own defaults, no other system's

log = logging.getLogger("magic_fast")


@dataclass(frozen=True)
class Call:
    """The arguments of one merge, resolved.

    Attributes:
        method, arguments: the method's name and its own parameters, defaults filled in.
        recipe: of an element-wise method; None for the others.
        calibration: WSC, or None.
        options: everything else; ``backend`` is filled in.
        like: the module that the tensors are of, which tells what each is, or None.
    """

    method: str
    arguments: dict[str, Any]
    recipe: Recipe | None
    calibration: WeightCalibration | None
    options: MergeOptions
    like: nn.Module | None = None

    @property
    def spec(self) -> MethodSpec:
        """The method itself."""
        return find_method(self.method)

    @property
    def preset(self) -> str:
        """The preset, by the name that methods know."""
        return self.options.preset or DEFAULT_PRESET

    @property
    def over_model(self) -> bool:
        """Whether one threshold over all tensors trims each expert."""
        return self.recipe is not None and self.recipe.over_model


def resolve_models(
    method: str,
    given: Mapping[str, Any],
    num_experts: int,
    options: MergeOptions,
    like: object,
    has_base: bool,
) -> Call:
    """:func:`resolve` for models of the kind of ``like``, with or without a base."""
    _check_base(method, has_base)
    module = like if isinstance(like, nn.Module) else None
    call = resolve(method, given, num_experts, options, like=module)
    if not has_base and call.calibration is not None:
        raise InputError(
            f"calibrate for method {method!r} without a base: expected None, got a "
            "calibration. Calibration compares task vectors, so it needs the base."
        )
    return call


def _check_base(method: str, given: bool) -> None:
    """Refuses a base for methods that take none, and none for those that need one."""
    spec = find_method(method)
    if not given and spec.base == "required":
        raise InputError(
            f"base for method {method!r}: expected a tensor or a state dict, got None. "
            "Use merge_task_vectors() where the experts are task vectors already."
        )
    if given and spec.base == "none":
        raise InputError(
            f"base for method {method!r}: expected None, got a model. This method works on "
            "whole models: pass base=None and the base among the experts."
        )


def numbers_of(weights: Weights) -> Any:
    return weights.tolist() if isinstance(weights, Tensor) else weights


def resolve(
    method: str,
    given: Mapping[str, Any],
    num_experts: int,
    options: MergeOptions,
    *,
    like: nn.Module | None = None,
) -> Call:
    """Names and values of a call, checked; ``given`` has the method's own parameters."""
    preset, seed, masks = options.preset or DEFAULT_PRESET, options.seed, options.masks
    arguments = resolve_arguments(method, given, num_experts, preset)
    calibration = as_calibration(options.calibrate)
    if calibration is not None:
        calibration = calibration.with_axes(options.row_axis)
    recipe = None
    if find_method(method).recipe is not None:
        arguments["seed"] = seed or 0
        recipe = build_recipe(method, num_experts, arguments, preset=preset, compat=options.compat)
    if seed is not None and (recipe is None or not recipe.trim.is_random):
        raise InputError(
            f"seed for method {method!r}: expected none, got {seed}. Nothing in it is random."
        )
    if masks is not None and recipe is not None and recipe.consensus is not None:
        recipe = replace(recipe, consensus=replace(recipe.consensus, given=True))
    elif masks is not None and (recipe is None or not recipe.trim.is_random):
        raise InputError(
            f"masks for method {method!r}: expected none, got some. They replace the draw of "
            "a random trim or the task masks of a consensus; here is neither."
        )
    if calibration is not None and num_experts == 1:
        log.warning("calibrating the merge of one expert gives back a full-size task vector")
    if options.details:
        options = replace(options, backend=options.chosen_backend)
    return Call(method, arguments, recipe, calibration, options, like)


def roles_of(call: Call, table: Named) -> Mapping[str, Role]:
    """What the tensors are, where that is asked: by a calibration."""
    if call.calibration is None:
        return {}
    roles = roles_in_memory(call.like, table.first)
    say_left(call.calibration.tensors, roles)
    return roles


def left_out(call: Call, first: Tensors) -> dict[str, Tensor]:
    """Those of the first model's tensors that are not merged."""
    choice = call.options.choice
    if not choice:
        return {}
    if isinstance(first, Tensor):
        raise InputError(
            "include and exclude: expected none for a tensor, got some. They choose among the "
            "tensors of state dicts and modules."
        )
    roles = roles_in_memory(call.like, first)
    choice.check([roles])
    names = choice.left_out(roles)
    return {name: x for name, x in first.items() if name in names}


def masks_of(call: Call, name: str) -> list[Tensor | None] | None:
    if call.options.masks is None:
        return None
    return [m.get(name) if isinstance(m, Mapping) else m for m in call.options.masks]


def job_of(
    call: Call,
    name: str,
    base: Tensor | None,
    experts: Sequence[Tensor],
    out: Tensor | None,
    k_masks: list[Tensor | None] | None,
    role: Role | None = None,
) -> Job:
    weights = call.arguments.get("weights", (1.0,) * len(experts))
    if call.recipe is not None:
        weights = call.recipe.weights
    calibration = None
    if call.calibration is not None:
        calibration = call.calibration.resolve(name, tuple(experts[0].shape), weights, role=role)
    recipe = call.recipe or Recipe(weights=weights)
    mean = None
    if base is not None and kind_of(name, experts[0]) is Kind.STATISTICS:
        mean = recipe_of_statistics(call.method, len(experts))
    if mean is not None:
        return Job(base, experts, mean, out, name, details=call.options.details)
    return Job(
        base,
        experts,
        recipe,
        out,
        name,
        masks=None if recipe.consensus is not None else k_masks,
        task_masks=k_masks if recipe.consensus is not None else None,
        calibration=calibration,
        details=call.options.details,
    )


def prepare(jobs: Sequence[Job], call: Call) -> None:
    """What looks at all tensors before any is merged: thresholds and bounds over the model."""
    if call.over_model and any(job.selection is None for job in jobs):
        ops.select_model(jobs, backend=call.options.backend)


def run(jobs: Sequence[Job], call: Call) -> list[Stats]:
    """Jobs that are prepared, each into its ``out``."""
    directions, function = call.spec.directions, call.spec.function
    backend, nonfinite = call.options.backend, call.options.nonfinite
    if directions is not None:
        for job in jobs:
            has_base = job.base is not None
            job.directions = directions(
                Question(len(job.experts), has_base, call.arguments, call.preset, job.name)
            )
    if function is None:
        return ops.merge(jobs, backend=backend, nonfinite=nonfinite)
    means = [job for job in jobs if is_mean(job)]
    rest = [job for job in jobs if not is_mean(job)]
    told = dict(zip(map(id, means), ops.merge(means, nonfinite=nonfinite), strict=True))
    found = ops.run_function(
        rest, lambda job: function(job, call.arguments, call.preset),
        backend=backend, nonfinite=nonfinite,
    )  # fmt: skip
    told |= zip(map(id, rest), found, strict=True)
    return [told[id(job)] for job in jobs]


def is_mean(job: Job) -> bool:
    """Whether a job is one of running statistics, which are a mean under any method."""
    own = kind_of(job.name, job.experts[0]) is Kind.STATISTICS
    return own and job.base is not None and bool(job.recipe.reduce == Reduce.MEAN)


def execute(jobs: Sequence[Job], call: Call) -> list[Stats]:
    prepare(jobs, call)
    return run(jobs, call)


def details_of(merged: Any, jobs: Sequence[Job], stats: Sequence[Stats], bare: bool) -> MergeResult:
    fields: dict[str, dict[str, Any]] = {}
    for job, found in zip(jobs, stats, strict=True):
        decisions = found.extra.get("decisions")
        raw = found.coefficient
        values = {
            "keep_masks": None if decisions is None else decisions.keep,
            "elected_sign": None if decisions is None else decisions.elected,
            "thresholds": found.selection.threshold,
            "keep_probability": None if decisions is None else decisions.keep_probability,
            "rescale_factors": found.selection.factor,
            "coefficients": None if raw is None else torch.as_tensor(raw),
        }
        for key, value in values.items():
            fields.setdefault(key, {})[job.name] = value
    if bare:
        return MergeResult(merged, **{k: next(iter(v.values())) for k, v in fields.items()})
    return MergeResult(merged, **fields)
