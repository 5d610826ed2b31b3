"""``merge`` and ``merge_task_vectors``: models in, one model out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.api.modules.state import as_state_dict, module_like, tensors_of
from magic_fast.api.options import Calibrate, Masks, MergeOptions, Weights, Words
from magic_fast.api.tensors.models import (
    Named,
    Tensors,
    destination,
    first_of_tied,
    labelled,
    models_of,
    state_dict_of,
    tied_groups,
    without,
)
from magic_fast.api.tensors.resolve import (
    Call,
    details_of,
    execute,
    job_of,
    left_out,
    masks_of,
    numbers_of,
    resolve,
    resolve_models,
    roles_of,
)
from magic_fast.calibration.weight import RowAxis
from magic_fast.errors import InputError
from magic_fast.models import TensorChoice
from magic_fast.ops.job import Job


def merge(
    base: Any,
    experts: Any,
    method: str = "ties",
    *,
    weights: Weights = None,
    scale: float | None = None,
    calibrate: Calibrate = None,
    preset: str | None = None,
    backend: str | None = None,
    out: Any = None,
    nonfinite: str = MergeOptions.nonfinite,
    row_axis: RowAxis | None = None,
    masks: Masks | None = None,
    name: str = "",
    seed: int | None = None,
    compat: str | None = None,
    details: bool = False,
    include: Words = (),
    exclude: Words = (),
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
        backend: a name that ``mf.backends()`` lists; None chooses.
        out: tensor or state dict that takes the result; it overlaps no input. Default: new, dtype
            of the base. :func:`merge_into` writes into modules.
        nonfinite: ``"error"`` or ``"propagate"``.
        row_axis: axis of the output units for calibration, or a mapping of patterns of names to
            axes, as of :class:`WeightCalibration`; default: by the model's layout.
        masks: K keep masks (or None) that replace the draw of a random trim; K task masks of
            ``consensus_ta`` instead of those it would compute.
        name: tensor name of a bare tensor (keys the random masks and the messages).
        seed: of the random trims.
        compat: ``"mergekit-0.1.4"`` matches that release's faults.
        details: return a :class:`MergeResult` instead of the bare result.
        include, exclude: which tensors of state dicts and modules are merged
            (:class:`~magic_fast.models.TensorChoice`): regular expressions on names, kinds such as
            ``head``, ``embedding`` or ``router``, parts such as ``vision``. What is left out stays
            the base's (without a base, the first expert's); the experts need not have it.
        **method_params: density, gamma, epsilon, normalize, rescale, t, … as the method has them.

    Returns:
        The same kind as ``base`` (without one, as the first expert): a tensor; a dict of tensors in
        the base's order; or a new module, its tied weights merged once, under their first name.

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
    given = {"weights": numbers_of(weights), "scale": scale, **method_params}
    like = experts[0] if base is None else base
    options = MergeOptions(
        calibrate, preset, backend, nonfinite, row_axis, masks, name, seed, compat, details,
        TensorChoice(include, exclude),
    )  # fmt: skip
    call = resolve_models(method, given, len(models), options, like, base is not None)
    if out is not None or not isinstance(like, nn.Module):
        return _run(start, models, call, out)
    return _run_module(like, start, models, call)


def merge_task_vectors(
    task_vectors: Any,
    method: str = "ties",
    *,
    weights: Weights = None,
    scale: float | None = None,
    calibrate: Calibrate = None,
    preset: str | None = None,
    backend: str | None = None,
    out: Any = None,
    nonfinite: str = MergeOptions.nonfinite,
    row_axis: RowAxis | None = None,
    masks: Masks | None = None,
    name: str = "",
    seed: int | None = None,
    compat: str | None = None,
    details: bool = False,
    include: Words = (),
    exclude: Words = (),
    **method_params: Any,
) -> Any:
    """scale·Δ of K task vectors: :func:`merge` where the differences are formed already.

    Args:
        task_vectors: list of tensors or state dicts, or one stacked [K, …] tensor.
        weights: number, K numbers, or a 1-D tensor whose dtype promotes the result under preset
            ``peft``.

    Everything else as in :func:`merge`. The result has the dtype of the first task vector; what
    ``include`` and ``exclude`` leave out is zero in it.

    >>> merge_task_vectors(torch.tensor([[1.0, -1.0], [3.0, 1.0]]), "average")
    tensor([2., 0.])
    """
    models = models_of(task_vectors, "task_vectors")
    given = {"weights": numbers_of(weights), "scale": scale, **method_params}
    options = MergeOptions(
        calibrate, preset, backend, nonfinite, row_axis, masks, name, seed, compat, details,
        TensorChoice(include, exclude),
    )  # fmt: skip
    call = resolve(method, given, len(models), options)
    promoted = weights.dtype if preset == "peft" and isinstance(weights, Tensor) else None
    return _run(None, models, call, out, promote=promoted, of_task_vectors=True)


def _run_module(
    like: nn.Module, base: Tensors | None, experts: Sequence[Tensors], call: Call
) -> Any:
    """A new module of the kind of ``like``, its tied weights merged once and still tied."""
    groups = tied_groups(tensors_of(like))
    models = labelled(base, experts)
    kept = left_out(call, first_of_tied(models[:1], groups)[0][1])
    named = first_of_tied(models, groups, kept)
    merged = module_like(like, {name for names in groups for name in names})
    state = {name: x.detach() for name, x in tensors_of(merged).items()}
    start = None if base is None else named[0][1]
    own = [model for _, model in named[len(named) - len(experts) :]]
    found = _run(start, own, call, {names[0]: state[names[0]] for names in groups})
    if not call.options.details:
        return merged
    found.merged = merged
    return found


def _run(
    base: Tensors | None,
    experts: Sequence[Tensors],
    call: Call,
    out: Any,
    promote: torch.dtype | None = None,
    *,
    of_task_vectors: bool = False,
) -> Any:
    named = labelled(base, experts)
    kept = left_out(call, named[0][1])
    table = Named(without(named, kept) if kept else named)
    if call.calibration is not None and not table.bare:
        call.calibration.check_names(table.names)
    roles = roles_of(call, table)
    results: dict[str, Tensor] = {}
    jobs: list[Job] = []
    for name in table.names:
        copied = table.copied(name)
        target = _destination(out, name, table.bare)
        if copied is not None:
            results[name] = copied.clone() if target is None else target.copy_(copied)
            continue
        row = table.row(name)
        start, own = (row[0], row[1:]) if base is not None else (None, row)
        if target is None:
            dtype = row[0].dtype if promote is None else torch.promote_types(row[0].dtype, promote)
            target = torch.empty(row[0].shape, dtype=dtype, device=row[0].device)
        results[name] = target
        label = name or call.options.name
        jobs.append(job_of(call, label, start, own, target, masks_of(call, name), roles.get(name)))
    for name, x in kept.items():
        if of_task_vectors:
            x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, promote or x.dtype))
        target = _destination(out, name, False)
        results[name] = x.clone() if target is None else target.copy_(x)
    stats = execute(jobs, call)
    first = named[0][1]
    merged: Any = results.get("")
    if not isinstance(first, Tensor):
        merged = as_state_dict({n: results[n] for n in first}, first)
    if not call.options.details:
        return merged
    return details_of(merged, jobs, stats, table.bare)


def _destination(out: Any, name: str, bare: bool) -> Tensor | None:
    if isinstance(out, nn.Module):
        raise InputError(
            "out: expected a tensor or a dict like the inputs, got a module. merge_into() writes "
            "into modules."
        )
    return destination(out, name, bare, "the inputs")
