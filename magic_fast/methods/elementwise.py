"""Methods by element that are no recipe: what Arcee Fusion compares is a divergence of whole
rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from magic_fast import ops
from magic_fast.errors import InputError
from magic_fast.ops.job import Job
from magic_fast.reference import fusion
from magic_fast.reference.merge import decision_dtype


def _pair(job: Job, method: str) -> tuple[Tensor, Tensor]:
    """The base and the one expert, as they are."""
    if job.base is None or len(job.experts) != 1:
        got = f"{len(job.experts)} and {'no' if job.base is None else 'a'} base"
        raise InputError(
            f"experts for method {method!r}: expected one beside the base, got {got}. It goes from "
            "one model to another."
        )
    return job.base, job.experts[0]


def arcee_fusion(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    base, expert = _pair(job, "arcee_fusion")
    dtype = decision_dtype(base, [expert])
    return fusion.arcee_fusion(base, expert, kth=ops.kth_magnitude, dtype=dtype)


ELEMENTWISE = {"arcee_fusion": arcee_fusion}
