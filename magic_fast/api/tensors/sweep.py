"""``sweep``: the same tensors merged by many recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magic_fast import ops
from magic_fast.api.options import Calibrate, MergeOptions
from magic_fast.api.tensors.models import Named, labelled, models_of, state_dict_of
from magic_fast.api.tensors.resolve import Call, execute, job_of, numbers_of, resolve
from magic_fast.calibration.weight import RowAxis
from magic_fast.engine.execute.scales import LEAST, merge_scales, shares, unscaled, worth_sharing
from magic_fast.errors import InputError
from magic_fast.methods.registry import find_method
from magic_fast.ops.choice import choose
from magic_fast.ops.job import Job, View
from magic_fast.recipe import Recipe, Selection

_MOST = 256
_OF_A_RECIPE = frozenset({"calibrate", "preset", "seed", "compat"})  # options it may set
_WORDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def sweep(
    base: Any,
    experts: Any,
    recipes: Sequence[Mapping[str, Any]],
    *,
    calibrate: Calibrate = None,
    preset: str | None = None,
    backend: str | None = None,
    nonfinite: str = MergeOptions.nonfinite,
    row_axis: RowAxis | None = None,
    seed: int | None = None,
    compat: str | None = None,
    name: str = "",
) -> list[Any]:
    """The same experts merged in many ways: the results of as many calls of :func:`merge`, for
    less.

    On the native backend, uncalibrated recipes of one tensor form its task vectors once, and those
    that differ in ``scale`` alone share thresholds, votes and Δ. The results are those of separate
    merges, bit for bit but for the sign of a zero.

    Args:
        base, experts, calibrate, preset, backend, nonfinite, row_axis, seed, compat, name: as of
            :func:`merge`.
        recipes: for each result the arguments of its merge, such as
            ``{"method": "ties", "density": 0.1, "scale": 0.3}``; ``calibrate``, ``preset``,
            ``seed`` and ``compat`` in it go before those above. At most 256.

    Returns:
        One result per recipe, in order, each of the kind of ``base`` (of a module its state dict).

    Raises:
        InputError, NonFiniteError, BackendError: as :func:`merge`; all recipes are checked before
            anything is computed.

    >>> experts = [torch.tensor([1.0, 0, 0, -2]), torch.tensor([3.0, 0, 0, 2])]
    >>> recipes = [{"method": "ties", "density": 1.0, "scale": s} for s in (0.5, 1.0)]
    >>> sweep(torch.zeros(4), experts, recipes)
    [tensor([1., 0., 0., 1.]), tensor([2., 0., 0., 2.])]
    """
    models = models_of(experts, "experts")
    start = None if base is None else state_dict_of(base, "base")
    if not 1 <= len(recipes) <= _MOST:
        raise InputError(f"recipes: expected 1 to {_MOST}, got {len(recipes)}.")
    common = MergeOptions(
        calibrate, preset, backend, nonfinite, row_axis, name=name, seed=seed, compat=compat
    )
    calls = [
        _call(n, recipe, start is not None, len(models), common) for n, recipe in enumerate(recipes)
    ]
    table = Named(labelled(start, models))
    results: list[dict[str, Tensor]] = [{} for _ in calls]
    jobs = [
        _jobs(table, call, start is not None, out) for call, out in zip(calls, results, strict=True)
    ]
    _run(calls, jobs)
    if table.bare:
        return [out[""] for out in results]
    return results


def _call(
    n: int, recipe: Mapping[str, Any], has_base: bool, num_experts: int, common: MergeOptions
) -> Call:
    given = dict(recipe)
    method = given.pop("method", "ties")
    for odd in {"out", *MergeOptions.__dataclass_fields__} - _OF_A_RECIPE & given.keys():
        raise InputError(
            f"recipes[{n}]: expected arguments of a method, got {odd!r}. It belongs to sweep "
            "itself, or to merge alone."
        )
    spec = find_method(method)
    if spec.base == ("none" if has_base else "required"):
        raise InputError(
            f"base for method {method!r} of recipes[{n}]: expected "
            f"{'None, got a model' if has_base else 'a tensor or a state dict, got None'}."
        )
    options = replace(common, **{k: given.pop(k) for k in _OF_A_RECIPE & given.keys()})
    if not has_base and options.calibrate is not None:
        raise InputError(
            f"calibrate of recipes[{n}] without a base: expected None, got a calibration."
        )
    given["weights"] = numbers_of(given.get("weights"))
    return resolve(method, given, num_experts, options)


def _jobs(table: Named, call: Call, has_base: bool, out: dict[str, Tensor]) -> list[Job]:
    """The jobs of one recipe, and its result with room for them; integers are copied."""
    if call.calibration is not None and not table.bare:
        call.calibration.check_names(table.names)
    jobs = []
    for name in table.names:
        copied = table.copied(name)
        if copied is not None:
            out[name] = copied.clone()
            continue
        row = table.row(name)
        start, own = (row[0], row[1:]) if has_base else (None, row)
        out[name] = torch.empty(row[0].shape, dtype=row[0].dtype, device=row[0].device)
        jobs.append(job_of(call, name or call.options.name, start, own, out[name], k_masks=None))
    return jobs


def _run(calls: Sequence[Call], jobs: Sequence[list[Job]]) -> None:
    """Every job, together where that is cheaper."""
    together = [n for n, call in enumerate(calls) if call.recipe is not None]
    known: list[dict[Recipe, Selection]] = [{} for _ in jobs[0]]
    _select_model([(calls[n], jobs[n]) for n in together], known)
    done: set[tuple[int, int]] = set()
    for t in range(len(jobs[0])):
        done |= _shared({n: jobs[n][t] for n in together}, known[t], t, calls)
    for n, call in enumerate(calls):
        left = [job for t, job in enumerate(jobs[n]) if (n, t) not in done]
        if left:
            execute(left, call)


def _select_model(
    pairs: Sequence[tuple[Call, list[Job]]], known: Sequence[dict[Recipe, Selection]]
) -> None:
    """Thresholds over the whole model, once for recipes that differ in their scale alone."""
    found: dict[Recipe, list[Selection | None]] = {}
    for call, jobs in pairs:
        if not call.over_model:
            continue
        assert call.recipe is not None
        key = unscaled(call.recipe)
        if key not in found:
            ops.select_model(jobs, backend=call.options.backend)
            found[key] = [job.selection for job in jobs]
        for t, selection in enumerate(found[key]):
            jobs[t].selection = selection
            if selection is not None:
                known[t][key] = selection


def _shared(
    jobs: Mapping[int, Job], known: dict[Recipe, Selection], t: int, calls: Sequence[Call]
) -> set[tuple[int, int]]:
    """Merges one tensor by the recipes that may share their work; which those were."""
    usable = {n: job for n, job in jobs.items() if shares(job) and _is_plain(job)}
    if not worth_sharing(list(usable.values())):
        return set()
    chosen = choose(list(usable.values()), calls[0].options.backend)
    backend = next((one for one in chosen if ops.offers(one, "splits")), None)
    if backend is None:
        return set()
    together = [n for n, one in zip(usable, chosen, strict=True) if one is backend]
    views = [
        replace(j, base=_view(j.base), experts=[_view(e) for e in j.experts], out=_view(j.out))
        for j in (usable[n] for n in together)
    ]
    if not worth_sharing(views) or merge_scales(views, known, backend.name) is None:
        return set()
    return {(n, t) for n in together}


def _is_plain(job: Job) -> bool:
    """Contiguous arrays on the CPU, large enough."""
    arrays: list[Any] = [job.base, job.out, *job.experts]
    return math.prod(arrays[0].shape) >= LEAST and all(
        a.dtype in _WORDS and a.is_contiguous() and a.device.type == "cpu" for a in arrays
    )


def _view(x: Any) -> View:
    return View(x.data_ptr(), _WORDS[x.dtype], tuple(x.shape), x)
