"""``merge_into``: a merge written into a model that is there, without a second copy of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from magic_fast.api.options import Calibrate, MergeOptions, Weights, Words
from magic_fast.api.tensors.bounds import bound, largest_input
from magic_fast.api.tensors.models import (
    Named,
    first_of_tied,
    labelled,
    models_of,
    state_dict_of,
    tied_groups,
    without,
)
from magic_fast.api.tensors.resolve import (
    Call,
    job_of,
    left_out,
    numbers_of,
    prepare,
    resolve_models,
    roles_of,
    run,
)
from magic_fast.calibration.weight import RowAxis
from magic_fast.errors import InputError
from magic_fast.models import TensorChoice
from magic_fast.ops.checks import check, extent_of
from magic_fast.ops.choice import choose
from magic_fast.ops.job import Job

#: Of the results that cannot go straight to their place, so many bytes are held at a time (or one
#: tensor): enough that many small ones share one call.
_SCRATCH_BYTES = 16 << 20


def merge_into(
    model: Any,
    base: Any,
    experts: Any,
    method: str = "ties",
    *,
    weights: Weights = None,
    scale: float | None = None,
    calibrate: Calibrate = None,
    preset: str | None = None,
    backend: str | None = None,
    nonfinite: str = MergeOptions.nonfinite,
    row_axis: RowAxis | None = None,
    seed: int | None = None,
    compat: str | None = None,
    include: Words = (),
    exclude: Words = (),
    **method_params: Any,
) -> Any:
    """Writes the merge of the experts into ``model``: the values of :func:`merge`, in the dtypes,
    on the devices and with the strides that the model has.

    Before the first write everything is checked and every input is read once for NaN and infinity,
    so that an error leaves the model as it was; where a result might overflow the model's dtype, it
    is computed once for nothing. Tied weights are merged once, under their first name. Memory on
    top: 16 MiB, or the largest tensor, where a result cannot go straight to its place (the model is
    also an input, has other strides, or is on another device), else none.

    Args:
        model: module or state dict, whose parameters and buffers are written. It may be ``base`` or
            an expert itself, or share tensors of the same name with them.
        base, experts: modules or state dicts with its names (of tied weights one is enough), all on
            one device.
        method, weights, scale, calibrate, preset, backend, nonfinite, row_axis, seed, compat,
            include, exclude: as of :func:`merge`. With ``nonfinite="propagate"`` nothing is read
            beforehand.
        **method_params: as of :func:`merge`.

    Returns:
        ``model``.

    Raises:
        InputError: also where the model shares memory between tensors of different names, other
            than tied ones, or tied weights differ in an input.
        NonFiniteError, BackendError: as of :func:`merge`.

    >>> model, expert = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    >>> for layer, weight in ((model, 1.0), (expert, 2.0)):
    ...     _ = torch.nn.init.constant_(layer.weight, weight)
    >>> merge_into(model, model, [expert], "task_arithmetic", scale=0.5).weight.item()
    1.5
    """
    targets = state_dict_of(model, "model")
    if isinstance(targets, Tensor):
        raise InputError(
            "model: expected a module or a state dict, got a tensor. merge() has out= for tensors."
        )
    models = models_of(experts, "experts")
    given = {"weights": numbers_of(weights), "scale": scale, **method_params}
    options = MergeOptions(
        calibrate, preset, backend, nonfinite, row_axis, seed=seed, compat=compat,
        choice=TensorChoice(include, exclude),
    )  # fmt: skip
    call = resolve_models(method, given, len(models), options, model, base is not None)
    groups = tied_groups(targets)
    all_models = labelled(base, models)
    whole = left_out(call, first_of_tied(all_models[:1], groups)[0][1])
    table = Named(without(first_of_tied(all_models, groups, whole), whole))
    if call.calibration is not None:
        call.calibration.check_names(table.names)
    places = {names[0]: targets[names[0]] for names in groups}
    first = all_models[0][0]
    _check_memory(places, [*table.tensors(), *((first, name, x) for name, x in whole.items())])
    jobs, copies = _jobs(table, places, call, base is not None)
    for name, x in whole.items():
        _check_place(name, places[name], x, first)
        copies.append((places[name], x))
    with torch.no_grad():
        _write(jobs, copies, call)
    return model


def _jobs(
    table: Named, places: Mapping[str, Tensor], call: Call, has_base: bool
) -> tuple[list[tuple[Job, Tensor]], list[tuple[Tensor, Tensor]]]:
    """(job, where its result goes) of every floating tensor; (place, value) of the others."""
    jobs, copies, roles = [], [], roles_of(call, table)
    for name in table.names:
        row, place = table.row(name), places[name]
        copied = table.copied(name)
        _check_place(name, place, row[0], "base" if has_base else "experts[0]")
        if copied is not None:
            copies.append((place, copied))
            continue
        start, own = (row[0], row[1:]) if has_base else (None, row)
        job = job_of(call, name, start, own, None, None, roles.get(name))
        check(job)
        jobs.append((job, place))
    if call.recipe is not None:
        blanks = [torch.empty_like(place, device="meta").contiguous() for _, place in jobs]
        choose(
            [replace(j, out=x) for (j, _), x in zip(jobs, blanks, strict=True)],
            call.options.backend,
        )
    return jobs, copies


def _check_place(name: str, place: Tensor, like: Tensor, what: str) -> None:
    """Refuses a place that cannot take the result."""
    if place.shape != like.shape:
        raise InputError(
            f"shape of '{name}' in the model: expected {tuple(like.shape)} as in {what}, got "
            f"{tuple(place.shape)}. All models must have the same architecture."
        )
    if place.is_floating_point() != like.is_floating_point():
        raise InputError(
            f"dtype of '{name}' in the model: expected {like.dtype} as in {what}, got "
            f"{place.dtype}."
        )


def _check_memory(places: Mapping[str, Tensor], inputs: Sequence[tuple[str, str, Tensor]]) -> None:
    """Refuses tensors of the model that share memory with other tensors of it or of an input: one
    would be written before it is read as the other."""
    taken = sorted((*extent_of(x), name) for name, x in places.items() if x.numel())
    for (_, stop, name), (start, _, other) in pairwise(taken):
        if start < stop:
            raise InputError(
                f"tensor '{other}' of the model: expected memory of its own, got memory that "
                f"overlaps '{name}'. Merge into a model without such views."
            )
    starts = [start for start, _, _ in taken]
    for what, name, x in inputs:
        first, last = extent_of(x)
        at = max(0, bisect_right(starts, first) - 1)
        for start, stop, own in taken[at:]:
            if start >= last:
                break
            if first < stop and own != name:
                raise InputError(
                    f"tensor '{own}' of the model: expected memory of its own, got memory that "
                    f"overlaps '{name}' of {what}, which is still to be read. Copy that one first."
                )


def _write(
    jobs: Sequence[tuple[Job, Tensor]], copies: Sequence[tuple[Tensor, Tensor]], call: Call
) -> None:
    largest = [1.0] * len(jobs)
    if call.options.nonfinite == "error":
        largest = [largest_input(job) for job, _ in jobs]
    prepare([job for job, _ in jobs], call)
    doubtful = [
        (job, place)
        for (job, place), size in zip(jobs, largest, strict=True)
        if _may_fail(job, place, size, call)
    ]
    for _ in _computed(doubtful, call, straight=False):
        pass
    for place, result in _computed(jobs, call, straight=True):
        place.copy_(result)
    for place, value in copies:
        place.copy_(value)


def _may_fail(job: Job, place: Tensor, largest: float, call: Call) -> bool:
    """Whether only the computation tells that it succeeds."""
    if call.spec.may_refuse:
        return True
    if call.options.nonfinite != "error":
        return False
    reach = bound(job, largest, is_recipe=call.recipe is not None)
    return not reach < torch.finfo(place.dtype).max


def _computed(
    jobs: Sequence[tuple[Job, Tensor]], call: Call, *, straight: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs the jobs, some at a time: (place, result) of each that was not written to its place.

    Args:
        straight: results go to their place where that is no input, is contiguous and on the
            device of the inputs.
    """
    batch: list[tuple[Job, Tensor]] = []
    held = 0
    for job, place in jobs:
        out = place
        if not straight or not _goes_straight(job, place):
            out = torch.empty(place.shape, dtype=place.dtype, device=job.experts[0].device)
            size = out.numel() * out.element_size()
            if batch and held + size > _SCRATCH_BYTES:
                yield from _run(batch, call)
                batch, held = [], 0
            held += size
        batch.append((replace(job, out=out), place))
    if batch:
        yield from _run(batch, call)


def _run(batch: Sequence[tuple[Job, Tensor]], call: Call) -> Iterator[tuple[Tensor, Tensor]]:
    run([job for job, _ in batch], call)
    for job, place in batch:
        if job.out is not place:
            assert job.out is not None
            yield place, job.out


def _goes_straight(job: Job, place: Tensor) -> bool:
    if not place.is_contiguous() or place.device != job.experts[0].device:
        return False
    first, last = extent_of(place)
    inputs = [*job.experts, *([] if job.base is None else [job.base])]
    extents = [extent_of(x) for x in inputs]
    return not any(a < last and first < b for a, b in extents)
