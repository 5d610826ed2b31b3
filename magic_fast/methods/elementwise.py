"""Methods by element that are no recipe: what Arcee Fusion compares is a divergence of whole
rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from magic_fast import ops
from magic_fast.errors import InputError
from magic_fast.ops.backend import Job
from magic_fast.reference import fusion
from magic_fast.reference.merge import decision_dtype


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
    return fusion.arcee_fusion(*_pair(job, "arcee_fusion"), kth=ops.kth_magnitude)


ELEMENTWISE = {"arcee_fusion": arcee_fusion}
