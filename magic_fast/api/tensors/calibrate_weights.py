"""``calibrate_weights``: WSC on a model that any other tool merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast import ops
from magic_fast.api.modules.state import as_state_dict, with_values
from magic_fast.api.options import MergeOptions
from magic_fast.api.results import CalibrationReport, TensorCalibration
from magic_fast.api.tensors.models import (
    Named,
    destination,
    labelled,
    models_of,
    state_dict_of,
)
from magic_fast.calibration import WeightCalibration, as_calibration
from magic_fast.calibration.tensors import say_left
from magic_fast.calibration.weight import RowAxis
from magic_fast.errors import InputError
from magic_fast.models.memory import roles_in_memory
from magic_fast.ops.job import Job, count_repaired
from magic_fast.recipe import Recipe


def calibrate_weights(
    base: Any,
    experts: Any,
    merged: Any,
    *,
    calibration: str | WeightCalibration | Mapping[str, Any] = "wsc",
    weights: list[float] | None = None,
    row_axis: RowAxis | None = None,
    backend: str | None = None,
    out: Any = None,
    nonfinite: str = MergeOptions.nonfinite,
    name: str = "",
    model_type: str | None = None,
) -> tuple[Any, CalibrationReport]:
    """The merged model with the magnitudes of its rows restored: base + ξ_r·(merged − base)
    (docs/methods.md).

    Args:
        base: tensor, state dict or module; None where ``experts`` and ``merged`` are task vectors.
        experts: K of the same kind; ξ comes from their raw task vectors.
        merged: the model to calibrate, of the same names and shapes.
        calibration: ``"wsc"`` or settings.
        weights: K numbers; experts of weight 0 do not count. Default: all count.
        row_axis: axis of the output units, or a mapping of patterns of names to axes, as of
            :class:`WeightCalibration`; default: its own.
        out: takes the result; default: new, dtype of ``merged``.
        model_type: transformers' name of the architecture, which tells the axis of the output units
            (GPT-2 has its weights [in, out]). Default: that of the module ``merged``.

    Returns:
        (calibrated, report): the same kind as ``merged``; tensors that are not calibrated are
        copied.

    >>> base, merged = torch.zeros(1, 2), torch.tensor([[0.5, 0.5]])
    >>> experts = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    >>> calibrated, report = calibrate_weights(base, experts, merged)
    >>> calibrated
    tensor([[0.7071, 0.7071]])
    """
    settings = as_calibration(calibration)
    if settings is None:
        raise InputError("calibration: expected 'wsc' or a WeightCalibration, got None.")
    settings = settings.with_axes(row_axis)
    models = models_of(experts, "experts")
    table = Named([("merged", state_dict_of(merged, "merged")), *labelled(base, models)])
    if not table.bare:
        settings.check_names(table.names)
    recipe = Recipe(weights=(1.0,) * len(models) if weights is None else tuple(weights))
    roles = roles_in_memory(merged, table.first, model_type)
    say_left(settings.tensors, roles)
    report = CalibrationReport()
    results: dict[str, Tensor] = {}
    for tensor_name in table.names:
        row = table.row(tensor_name)
        label = tensor_name or name
        target = destination(out, tensor_name, table.bare, "merged")
        copied = table.copied(tensor_name)
        shape = tuple(row[0].shape)
        resolved = None
        if copied is None:
            resolved = settings.resolve(label, shape, recipe.weights, role=roles.get(tensor_name))
        if resolved is None:
            results[tensor_name] = row[0].clone() if target is None else target.copy_(row[0])
            report.tensors.append(TensorCalibration(label, shape, False))
            continue
        target = torch.empty_like(row[0]) if target is None else target
        start, own = (row[1], row[2:]) if base is not None else (None, row[1:])
        job = Job(start, own, recipe, target, label, calibration=resolved)
        found = ops.calibrate(job, row[0], backend=backend, nonfinite=nonfinite)
        results[tensor_name] = target
        report.tensors.append(
            TensorCalibration(
                label,
                shape,
                True,
                torch.as_tensor(found.coefficient),  # the native backend hands out a buffer
                count_repaired(found),
                found.extra.get("magnitude_before"),
                found.extra.get("magnitude_after"),
            )
        )
    if table.bare:
        return results[""], report
    if isinstance(merged, nn.Module) and out is None:
        return with_values(merged, results), report
    return as_state_dict(results, table.first), report
