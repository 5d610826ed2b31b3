"""Steps of a plan that run as methods on whole tensors do, and that no user names: calibrations of
a model that was merged elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from magic_fast.methods.spec import MethodSpec, decompositions
from magic_fast.ops.job import Job


def _scale_channels(job: Job, arguments: Mapping[str, Any], preset: str) -> Any:
    """base + factor·(expert − base), a factor for each index of ``axis``."""
    import torch

    from magic_fast.reference.features import fold

    (merged,) = job.experts
    wide = torch.promote_types(merged.dtype, torch.float32)
    factor = torch.tensor(arguments["factor"], dtype=torch.float64)
    assert job.base is not None
    return fold(job.base.to(wide), merged.to(wide), factor, arguments["axis"])


def _svc(job: Job, arguments: Mapping[str, Any], preset: str) -> Any:
    """base + the calibrated Δ; the merged model stands behind the experts."""
    from magic_fast.reference import spectral
    from magic_fast.reference.merge import decision_dtype, task_vectors

    *taus, delta = task_vectors(job.base, job.experts, decision_dtype(job.base, job.experts))
    assert job.base is not None
    return job.base.to(delta.dtype) + spectral.svc(taus, delta, arguments["alpha"]).to(delta.dtype)


METHODS = (
    MethodSpec("scale_channels", function=_scale_channels),
    MethodSpec("svc", function=_svc, workspace=decompositions(8)),  # 7 copies were measured
)
