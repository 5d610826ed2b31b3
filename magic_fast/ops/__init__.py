"""The primitives: check, choose a backend, call it. One definition of each; backends only
implement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from magic_fast.errors import BackendError, InputError, NonFiniteError
from magic_fast.ops.backend import Backend, Capable, merge_many, offers
from magic_fast.ops.checks import check, dtype_word
from magic_fast.ops.choice import asked_for, automatic, choose, offering, refuse_backend, streaming
from magic_fast.ops.job import Array, Job, Stats, View
from magic_fast.ops.registry import BackendStatus, backends, implementation, why_unavailable
from magic_fast.ops.search import select_over
from magic_fast.recipe import Recipe, Selection

__all__ = [
    "Array",
    "Backend",
    "BackendStatus",
    "Job",
    "Stats",
    "View",
    "asked_for",
    "automatic",
    "backends",
    "calibrate",
    "choose",
    "dtype_word",
    "implementation",
    "kth_magnitude",
    "merge",
    "offers",
    "refuse_backend",
    "row_stats",
    "run_function",
    "scale",
    "select",
    "select_model",
    "streaming",
    "why_unavailable",
]


def select(job: Job, *, backend: str | None = None) -> Selection:
    """Thresholds, tie cuts, factors and majority sign of one tensor."""
    check(job)
    return choose([job], backend, primitive="select")[0].select(job)


def merge(
    jobs: Sequence[Job], *, backend: str | None = None, nonfinite: str = "error"
) -> list[Stats]:
    """Runs the jobs, each into its ``out``; those of one backend go in one call.

    Args:
        nonfinite: ``"error"``: a NaN or infinity in an input, or a finite result that overflows,
            raises :class:`NonFiniteError` after the call (``out`` is then unspecified);
            ``"propagate"`` lets it through.
    """
    _check_nonfinite_word(nonfinite)
    for job in jobs:
        check(job)
        if job.out is None:
            raise InputError(f"out for '{job.name}': expected an array, got None.")
    chosen = choose(jobs, backend)
    if len(jobs) == 1:
        stats = [chosen[0].merge(jobs[0])]
        stats[0].backend = chosen[0].name
    else:
        stats = _by_backend(jobs, chosen)
    if nonfinite == "error":
        for job, found in zip(jobs, stats, strict=True):
            raise_nonfinite(job, found)
    return stats


def _by_backend(jobs: Sequence[Job], chosen: Sequence[Backend]) -> list[Stats]:
    """Runs jobs, those of one backend in one call; what each found, in their order."""
    parts: dict[int, list[int]] = {}
    for n, one in enumerate(chosen):
        parts.setdefault(id(one), []).append(n)
    stats = {}
    for part in parts.values():
        one = chosen[part[0]]
        for n, result in zip(part, merge_many(one, [jobs[n] for n in part]), strict=True):
            result.backend = one.name
            stats[n] = result
    return [stats[n] for n in range(len(jobs))]


def kth_magnitude(x: Array, k: int) -> float:
    """The k-th largest |x|, k from 1, exactly: by a backend that offers it, else by PyTorch.

    Args:
        x: tensor of float64, float32, float16 or bfloat16, any shape.
    """
    backend = offering("kth_magnitude", Job(None, [x], Recipe((1.0,))))
    if backend is not None:
        return cast(Capable, backend).kth_magnitude(x, k)
    import torch

    from magic_fast.reference import trim

    return trim.kth_magnitude(x if x.dtype == torch.float64 else x.float(), k)


def select_model(jobs: Sequence[Job], *, backend: str | None = None) -> None:
    """Gives every job the selection of a trim over all of them at once (scope ``model``): by the
    backend that will merge them all, if it searches pieces, else by the reference."""
    for job in jobs:
        check(job)
    ordered = sorted(jobs, key=lambda job: job.name)
    if not ordered:
        return
    recipe, chosen = ordered[0].recipe, choose(ordered, backend)
    first = chosen[0]
    alone = all(one is first for one in chosen)
    # norms are of each tensor, under a threshold over all of them
    if alone and offers(first, "search") and not recipe.needs_factors:
        selections = select_over(ordered, cast(Capable, first).search)
    else:
        from magic_fast.reference.scope import select_model as reference

        selections = reference(lambda: ((job.base, job.experts) for job in ordered), recipe)
    for job, selection in zip(ordered, selections, strict=True):
        job.selection = selection


def run_function(
    jobs: Sequence[Job],
    function: Callable[[Job], Any],
    *,
    backend: str | None = None,
    nonfinite: str = "error",
) -> list[Stats]:
    """Runs methods that are no recipe: ``function`` gives the merged tensor of a job before
    rounding; the calibration, the rounding and the checks are those of every merge."""
    from magic_fast.ops.slabs import first_nonfinite
    from magic_fast.ops.torch.backend import TorchBackend
    from magic_fast.reference.arithmetic import plain_arithmetic

    _check_nonfinite_word(nonfinite)
    if backend not in (None, "auto", "torch"):
        raise BackendError(
            f"backend {backend!r}: expected 'torch' for this method, which is no element-wise "
            "recipe."
        )
    stats = []
    for job in jobs:
        check(job)
        with plain_arithmetic():
            stats.append(TorchBackend().finish(job, function(job)))
        stats[-1].backend = TorchBackend.name
        if nonfinite == "error":
            if job.out is not None and stats[-1].overflow < 0:  # NaN made of finite values
                stats[-1].first_nonfinite += (first_nonfinite(job.out),)
            raise_nonfinite(job, stats[-1])
    return stats


def calibrate(
    job: Job, merged: Array, *, backend: str | None = None, nonfinite: str = "error"
) -> Stats:
    """WSC of a tensor that was merged elsewhere, into ``job.out``."""
    _check_nonfinite_word(nonfinite)
    check(job)
    check(_with_merged(job, merged))
    chosen = choose([job], backend, primitive="calibrate")[0]
    stats = cast(Capable, chosen).calibrate(job, merged)
    stats.backend = chosen.name
    if nonfinite == "error":
        raise_nonfinite(job, stats)
    return stats


def row_stats(job: Job, merged: Array, *, backend: str | None = None) -> tuple[Any, Any, Any]:
    """gram f64 [rows, K, K], dots f64 [rows, K], norm2 f64 [rows]."""
    check(job)
    check(_with_merged(job, merged))
    chosen = choose([job], backend, primitive="row_stats")[0]
    return cast(Capable, chosen).row_stats(job, merged)


def scale(job: Job, merged: Array, coefficient: Array, *, backend: str | None = None) -> None:
    """out = base + coefficient[row]·(merged − base)."""
    check(_with_merged(job, merged))
    chosen = choose([job], backend, primitive="scale")[0]
    cast(Capable, chosen).scale(job, merged, coefficient)


def _with_merged(job: Job, merged: Array) -> Job:
    """A job whose base is ``merged``, so that the same checks cover it."""
    return Job(base=merged, experts=job.experts, recipe=job.recipe, out=job.out, name=job.name)


def _check_nonfinite_word(word: str) -> None:
    if word not in ("error", "propagate"):
        raise InputError(f"nonfinite: expected 'error' or 'propagate', got {word!r}.")


def raise_nonfinite(job: Job, stats: Stats) -> None:
    """Turns what the kernels recorded into the error a user can act on."""
    label = f"'{job.name}'" if job.name else "the tensor"
    advice = "Repair the checkpoint, or pass nonfinite='propagate' to let it through."
    places = [("the base", stats.base_nonfinite)]
    names = [f"expert {k}" for k in range(len(job.experts))] + ["the merged model"]
    places += list(zip(names, stats.first_nonfinite, strict=False))
    for what, index in places:
        if index >= 0:
            raise NonFiniteError(
                f"NaN or infinity in {what} for {label}: expected finite values, got one at "
                "flat index "
                f"{index}. {advice}"
            )
    if stats.overflow >= 0:
        assert job.out is not None
        raise NonFiniteError(
            f"result for {label}: expected values within {dtype_word(job.out)}, got an "
            "overflow at flat "
            f"index {stats.overflow}. Use a wider output dtype, or pass nonfinite='propagate'."
        )
