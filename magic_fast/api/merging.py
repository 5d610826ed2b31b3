"""``merge`` and ``merge_task_vectors``: names and parameters to jobs, jobs to tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from magic_fast import ops
from magic_fast.api.results import MergeResult
from magic_fast.api.tensors import Named, Tensors, models_of, state_dict_of
from magic_fast.calibration import WeightCalibration, as_calibration
from magic_fast.errors import InputError
from magic_fast.methods.arguments import find_method, resolve_arguments
from magic_fast.methods.functions import FUNCTIONS, PREPARATIONS
from magic_fast.methods.recipes import build_recipe
from magic_fast.ops.backend import Job, Stats
from magic_fast.ops.checks import check
from magic_fast.recipe import Recipe, TrimScope

log = logging.getLogger("magic_fast")

Masks = Sequence[Tensor | None] | Sequence[Mapping[str, Tensor] | None]


@dataclass
class Call:
    """The arguments of one merge, resolved."""

    method: str
    arguments: dict[str, Any]
    recipe: Recipe | None
    calibration: WeightCalibration | None
    preset: str
    backend: str | None
    nonfinite: str
    name: str
    row_axis: int | tuple[int, ...] | None
    masks: Masks | None
    details: bool

    @property
    def over_model(self) -> bool:
        """Whether one threshold over all tensors trims each expert."""
        trim = None if self.recipe is None else self.recipe.trim
        return trim is not None and trim.by_magnitude and trim.scope is TrimScope.MODEL


def merge(
    base: Any,
    experts: Any,
    method: str = "ties",
    *,
    weights: float | Sequence[float] | Tensor | None = None,
    scale: float | None = None,
    calibrate: str | WeightCalibration | Mapping[str, Any] | None = None,
    preset: str | None = None,
    backend: str | None = None,
    out: Any = None,
    nonfinite: str = "error",
    row_axis: int | tuple[int, ...] | None = None,
    masks: Masks | None = None,
    name: str = "",
    seed: int | None = None,
    compat: str | None = None,
    details: bool = False,
    **method_params: Any,
) -> Any:
    """The experts of one base merged into one model: base + scale·Δ, calibrated row by row on
    request.

    Args:
        base: tensor, state dict or module; None for the methods on whole models (``linear``,
            ``passthrough``). To ``karcher`` it is one more model.
        experts: K of the same kind (tensors may be one stacked [K, …] tensor). float32, float16,
            bfloat16 in any mix; float64 runs in double precision. Integer tensors must agree and
            are copied.
        method: ``ties`` by default; docs/methods.md lists them all.
        weights: per-expert factor, one number or K.
        scale: factor on the merged task vector; None: the method's own default.
        calibrate: None, ``"wsc"`` or a :class:`WeightCalibration`.
        preset: reproduce ``mergekit``, ``peft``, ``ties_merging``, ``fusion_bench``, ``magic`` or
            ``sd_mecha`` exactly; None: our defaults.
        backend: ``native``, ``torch``; None chooses.
        out: tensor or state dict that takes the result; it overlaps no input. Default: new, dtype
            of the base.
        nonfinite: ``"error"`` or ``"propagate"``.
        row_axis: axis of the output units for calibration (default 0).
        masks: K keep masks (or None) that replace the draw of a random trim; K task masks of
            ``consensus_ta`` instead of those it would compute.
        name: tensor name of a bare tensor (keys the random masks and the messages).
        seed: of the random trims.
        compat: ``"mergekit-0.1.4"`` matches that release's faults.
        details: return a :class:`MergeResult` instead of the bare result.
        **method_params: density, gamma, epsilon, normalize, rescale, t, … as the method has them.

    Returns:
        The same kind as ``base``: a tensor, or a dict of tensors in the base's order.

    Raises:
        InputError: shapes, dtypes, names or parameters that do not fit.
        NonFiniteError: NaN or infinity in an input, or an overflow of the result.
        BackendError: the backend asked for cannot run this.

    >>> experts = [torch.tensor([1.0, 0, 0, -2]), torch.tensor([3.0, 0, 0, 2])]
    >>> merge(torch.zeros(4), experts, "ties", density=1.0)
    tensor([2., 0., 0., 2.])
    """
    models = models_of(experts, "experts")
    start = None if base is None else state_dict_of(base, "base")
    spec = find_method(method)
    if base is None and spec.base == "required":
        raise InputError(
            f"base for method {method!r}: expected a tensor or a state dict, got None. "
            "Use merge_task_vectors() where the experts are task vectors already."
        )
    if base is not None and spec.base == "none":
        raise InputError(
            f"base for method {method!r}: expected None, got a model. This method works on "
            "whole models: "
            "pass base=None and the base among the experts."
        )
    given = {"weights": _numbers(weights), "scale": scale, **method_params}
    call = resolve(
        method,
        given,
        len(models),
        calibrate,
        preset,
        backend,
        nonfinite,
        row_axis,
        masks,
        name,
        seed,
        compat,
        details,
    )
    if base is None and call.calibration is not None:
        raise InputError(
            f"calibrate for method {method!r} without a base: expected None, got a calibration. "
            "Calibration compares task vectors, so it needs the base."
        )
    return _run(start, models, call, out)


def merge_task_vectors(
    task_vectors: Any,
    method: str = "ties",
    *,
    weights: float | Sequence[float] | Tensor | None = None,
    scale: float | None = None,
    calibrate: str | WeightCalibration | Mapping[str, Any] | None = None,
    preset: str | None = None,
    backend: str | None = None,
    out: Any = None,
    nonfinite: str = "error",
    row_axis: int | tuple[int, ...] | None = None,
    masks: Masks | None = None,
    name: str = "",
    seed: int | None = None,
    compat: str | None = None,
    details: bool = False,
    **method_params: Any,
) -> Any:
    """scale·Δ of K task vectors: :func:`merge` where the differences are formed already.

    Args:
        task_vectors: list of tensors or state dicts, or one stacked [K, …] tensor.
        weights: number, K numbers, or a 1-D tensor whose dtype promotes the result under preset
            ``peft``.

    Everything else as in :func:`merge`. The result has the dtype of the first task vector.

    >>> merge_task_vectors(torch.tensor([[1.0, -1.0], [3.0, 1.0]]), "average")
    tensor([2., 0.])
    """
    models = models_of(task_vectors, "task_vectors")
    given = {"weights": _numbers(weights), "scale": scale, **method_params}
    call = resolve(
        method,
        given,
        len(models),
        calibrate,
        preset,
        backend,
        nonfinite,
        row_axis,
        masks,
        name,
        seed,
        compat,
        details,
    )
    promoted = weights.dtype if preset == "peft" and isinstance(weights, Tensor) else None
    return _run(None, models, call, out, promote=promoted)


def _numbers(weights: float | Sequence[float] | Tensor | None) -> Any:
    return weights.tolist() if isinstance(weights, Tensor) else weights


def resolve(
    method: str,
    given: Mapping[str, Any],
    num_experts: int,
    calibrate: str | WeightCalibration | Mapping[str, Any] | None,
    preset: str | None,
    backend: str | None,
    nonfinite: str,
    row_axis: int | tuple[int, ...] | None,
    masks: Masks | None,
    name: str,
    seed: int | None,
    compat: str | None,
    details: bool,
) -> Call:
    preset = preset or "default"
    arguments = resolve_arguments(method, given, num_experts, preset)
    calibration = as_calibration(calibrate)
    recipe = None
    if method not in FUNCTIONS:
        arguments["seed"] = seed or 0
        recipe = build_recipe(method, num_experts, arguments, preset=preset, compat=compat)
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
    if details and backend not in (None, "auto", "torch"):
        raise InputError(
            f"details with backend {backend!r}: expected backend 'torch', which keeps masks "
            "and votes, "
            f"got {backend!r}. Leave the backend out."
        )
    if details:
        backend = "torch"
    return Call(
        method,
        arguments,
        recipe,
        calibration,
        preset,
        backend,
        nonfinite,
        name,
        row_axis,
        masks,
        details,
    )


def _run(
    base: Tensors | None,
    experts: Sequence[Tensors],
    call: Call,
    out: Any,
    promote: torch.dtype | None = None,
) -> Any:
    labelled = [(f"experts[{k}]", e) for k, e in enumerate(experts)]
    if base is not None:
        labelled.insert(0, ("base", base))
    table = Named(labelled)
    if call.calibration is not None and not table.bare:
        call.calibration.check_names(table.names)
    results: dict[str, Tensor] = {}
    jobs: list[Job] = []
    for name in table.names:
        copied = table.copied(name)
        if copied is not None:
            results[name] = _copy(copied, _destination(out, name, table.bare))
            continue
        row = table.row(name)
        start = row[0] if base is not None else None
        own = row[1:] if base is not None else row
        target = _destination(out, name, table.bare)
        if target is None:
            dtype = row[0].dtype if promote is None else torch.promote_types(row[0].dtype, promote)
            target = torch.empty(row[0].shape, dtype=dtype, device=row[0].device)
        results[name] = target
        jobs.append(job_of(call, name or call.name, start, own, target, k_masks=_masks(call, name)))
    stats = execute(jobs, call)
    merged = results[""] if table.bare else {n: results[n] for n in table.names}
    if not call.details:
        return merged
    return _details(merged, jobs, stats, table.bare)


def _destination(out: Any, name: str, bare: bool) -> Tensor | None:
    if out is None:
        return None
    if bare:
        if not isinstance(out, Tensor):
            raise InputError(f"out: expected a tensor like the inputs, got {type(out).__name__}.")
        return out
    if not isinstance(out, Mapping) or name not in out:
        raise InputError(f"out: expected a dict with a tensor for '{name}', got none.")
    target: Tensor = out[name]
    return target


def _copy(source: Tensor, target: Tensor | None) -> Tensor:
    return source.clone() if target is None else target.copy_(source)


def _masks(call: Call, name: str) -> list[Tensor | None] | None:
    if call.masks is None:
        return None
    found: list[Tensor | None] = []
    for m in call.masks:
        found.append(m.get(name) if isinstance(m, Mapping) else m)
    return found


def job_of(
    call: Call,
    name: str,
    base: Tensor | None,
    experts: Sequence[Tensor],
    out: Tensor,
    k_masks: list[Tensor | None] | None,
) -> Job:
    weights = call.arguments.get("weights", (1.0,) * len(experts))
    if call.recipe is not None:
        weights = call.recipe.weights
    calibration = None
    if call.calibration is not None:
        calibration = call.calibration.resolve(
            name, tuple(experts[0].shape), weights, row_axis=call.row_axis
        )
    recipe = call.recipe or Recipe(weights=weights)
    return Job(
        base,
        experts,
        recipe,
        out,
        name,
        masks=None if recipe.consensus is not None else k_masks,
        task_masks=k_masks if recipe.consensus is not None else None,
        calibration=calibration,
        details=call.details,
    )


def execute(jobs: Sequence[Job], call: Call) -> list[Stats]:
    if call.recipe is None:
        function: Callable[..., Tensor] = FUNCTIONS[call.method]
        if call.method in PREPARATIONS:
            for job in jobs:
                check(job)
            call.arguments |= PREPARATIONS[call.method](
                lambda: ((job.base, job.experts) for job in jobs), call.arguments
            )
        return ops.run_function(
            jobs, lambda job: function(job, call.arguments, call.preset),
            backend=call.backend, nonfinite=call.nonfinite,
        )  # fmt: skip
    if call.over_model and any(job.selection is None for job in jobs):
        ops.select_model(jobs)
    return ops.merge(jobs, backend=call.backend, nonfinite=call.nonfinite)


def _details(merged: Any, jobs: Sequence[Job], stats: Sequence[Stats], bare: bool) -> MergeResult:
    fields: dict[str, dict[str, Any]] = {}
    for job, found in zip(jobs, stats, strict=True):
        decisions = found.extra.get("decisions")
        values = {
            "keep_masks": None if decisions is None else decisions.keep,
            "elected_sign": None if decisions is None else decisions.elected,
            "thresholds": found.selection.threshold,
            "keep_probability": None if decisions is None else decisions.keep_probability,
            "rescale_factors": found.selection.factor,
            "coefficients": None
            if found.coefficient is None
            else torch.as_tensor(found.coefficient),
        }
        for key, value in values.items():
            fields.setdefault(key, {})[job.name] = value
    if bare:
        return MergeResult(merged, **{k: next(iter(v.values())) for k, v in fields.items()})
    return MergeResult(merged, **fields)
