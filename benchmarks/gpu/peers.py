"""TIES + WSC of one tensor on a GPU by other means: the formulas in eager torch, compiled by torch,
and the tools in use where they are installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from magic_fast.ops.job import Job
from magic_fast.ops.torch.backend import TorchBackend
from magic_fast.recipe import EpsMode
from magic_fast.reference import calibration as wsc
from magic_fast.reference import merge as reference

Call = Callable[[], object]


class Clock(Protocol):
    def median(self, runs: Sequence[Call]) -> float:
        """Seconds."""


#: peer → how many times as fast ours shall be
AIMS = {"eager torch": 25.0, "mergekit": 20.0, "torch.compile": 5.0}
_MODES = ("default", "max-autotune-no-cudagraphs")


def eager(job: Job) -> Call:
    """The authors' formulas layer by layer, as one writes them in torch."""
    assert job.calibration is not None
    authors = replace(job.calibration, eps_mode=EpsMode.ABSOLUTE, clamp=None)
    one = replace(job, calibration=authors, out=torch.empty_like(job.base), details=True)
    return lambda: TorchBackend().merge(one)


def _merge(job: Job) -> Callable[..., torch.Tensor]:
    """The reference as a function of tensors. The thresholds are found inside."""
    calibration = job.calibration
    assert calibration is not None

    def merge(base: torch.Tensor, *experts: torch.Tensor) -> torch.Tensor:
        decisions = reference.decide(base, experts, job.recipe, stream=job.stream)
        delta = reference.combine(base, experts, job.recipe, decisions, dtype=torch.float32)
        taus = reference.task_vectors(base, experts, torch.float32)
        rows = wsc.calibrate_rows(taus, delta, calibration)
        return (base.float() + wsc.apply_rows(delta, rows.factor, calibration.axes)).to(base.dtype)

    return merge


def compiled(job: Job, clock: Clock) -> Call:
    """The fastest of what torch.compile makes of the reference; raises where it makes nothing."""
    function, tensors = _merge(job), (job.base, *job.experts)
    best: tuple[float, Call] | None = None
    problem: Exception | None = None
    for mode in _MODES:
        try:
            torch._dynamo.reset()
            candidate = torch.compile(function, mode=mode)

            def call(candidate: Callable[..., torch.Tensor] = candidate) -> object:
                return candidate(*tensors)

            took = clock.median([call])
        except Exception as error:  # a compiler: anything may come
            problem = error
            continue
        if best is None or took < best[0]:
            best = took, call
    if best is None:
        assert problem is not None
        raise RuntimeError(f"torch.compile: {str(problem).strip().splitlines()[0][:120]}")
    return best[1]


def mergekit(job: Job) -> Call:
    """mergekit's TIES, without WSC."""
    from mergekit.merge_methods.api import merge_tensors

    parameters = {"weight": 1.0, "density": 0.2}
    given = [job.base, *job.experts]
    return lambda: merge_tensors(given, "ties", parameters=parameters, base_index=0)


def peers(job: Job, clock: Clock) -> dict[str, Callable[[], Call | str]]:
    """Name → what makes the call, or says why it is absent; those that take long to make last."""

    def or_words(make: Callable[[], Call]) -> Call | str:
        try:
            return make()
        except (ImportError, RuntimeError) as error:
            return str(error)

    return {
        "eager torch": lambda: eager(job),
        "mergekit": lambda: or_words(lambda: mergekit(job)),
        "torch.compile": lambda: or_words(lambda: compiled(job, clock)),
    }
