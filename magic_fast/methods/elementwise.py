"""Methods by element that are no recipe: what Arcee Fusion compares is a divergence of whole rows,
what PCB adds up are scores with exponentials, ranked over tensor or model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from magic_fast.errors import InputError
from magic_fast.ops.backend import Job
from magic_fast.reference import fusion
from magic_fast.reference import pcb as competition
from magic_fast.reference.merge import decision_dtype, task_vectors

_BOUNDS = "bounds"


def _taus(job: Job) -> list[Tensor]:
    return task_vectors(job.base, job.experts, decision_dtype(job.base, job.experts))


def _with_base(job: Job, delta: Tensor) -> Tensor:
    return delta if job.base is None else job.base.to(delta.dtype) + delta


def _pair(job: Job, method: str) -> tuple[Tensor, Tensor]:
    """The base and the one expert."""
    if job.base is None or len(job.experts) != 1:
        got = f"{len(job.experts)} and {'no' if job.base is None else 'a'} base"
        raise InputError(
            f"experts for method {method!r}: expected one beside the base, got {got}. It goes from "
            "one model to another."
        )
    dtype = decision_dtype(job.base, job.experts)
    return job.base.to(dtype), job.experts[0].to(dtype)


def arcee_fusion(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    return fusion.arcee_fusion(*_pair(job, "arcee_fusion"))


def prepare_pcb(source: competition.Source, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Under scope ``model`` the bounds of all tensors together."""
    if arguments["scope"] != "model":
        return {}
    return {_BOUNDS: competition.model_bounds(source, arguments["ratio"])}


def pcb(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    taus = _taus(job)
    if not taus[0].numel():
        return _with_base(job, torch.zeros_like(taus[0]))
    if arguments["scope"] == "tensor":
        bounds = competition.tensor_bounds(taus, arguments["ratio"])
    else:
        bounds = arguments[_BOUNDS]
    return _with_base(job, competition.pcb(taus, bounds) * arguments["scale"])


ELEMENTWISE = {
    "arcee_fusion": arcee_fusion,
    "pcb": pcb,
}
