"""Arcee Fusion. It is no recipe: what it compares is a divergence of whole rows."""

from __future__ import annotations

from typing import Any

from magic_fast.errors import InputError
from magic_fast.methods.elementwise.parts import Arguments
from magic_fast.methods.spec import MethodSpec, Paper
from magic_fast.ops import kth_magnitude
from magic_fast.ops.job import Job


def _arcee_fusion(job: Job, arguments: Arguments, preset: str) -> Any:
    from magic_fast.reference import fusion
    from magic_fast.reference.merge import decision_dtype

    if job.base is None or len(job.experts) != 1:
        got = f"{len(job.experts)} and {'no' if job.base is None else 'a'} base"
        raise InputError(
            f"experts for method 'arcee_fusion': expected one beside the base, got {got}. It goes "
            "from one model to another."
        )
    dtype = decision_dtype(job.base, job.experts)
    return fusion.arcee_fusion(job.base, job.experts[0], kth=kth_magnitude, dtype=dtype)


METHODS = (
    MethodSpec(
        "arcee_fusion",
        max_experts=1,
        function=_arcee_fusion,
        summary="the entries of one expert that matter most",
        use_when="one expert, little side effect",
        paper=Paper("mergekit"),
        reads="1",
        holds="one tensor of both models",
    ),
)
