"""Methods that are no recipe: small functions over whole tensors. Each takes the job (base,
experts, tensor name), the method's arguments and the preset, and returns the merged tensor in
float32 (float64 for float64 inputs), before the final rounding and any calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from magic_fast.methods.elementwise import ELEMENTWISE
from magic_fast.methods.spectral import SPECTRAL
from magic_fast.ops.job import Job
from magic_fast.reference import spectral
from magic_fast.reference.features import fold
from magic_fast.reference.merge import decision_dtype, task_vectors

Function = Callable[[Job, Mapping[str, Any], str], Tensor]

FUNCTIONS: Mapping[str, Function] = {**ELEMENTWISE, **SPECTRAL}


def _scale_channels(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    """base + factor·(expert − base), a factor for each index of ``axis``."""
    (merged,) = job.experts
    wide = torch.promote_types(merged.dtype, torch.float32)
    factor = torch.tensor(arguments["factor"], dtype=torch.float64)
    assert job.base is not None
    return fold(job.base.to(wide), merged.to(wide), factor, arguments["axis"])


def _svc(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    """base + the calibrated Δ; the merged model stands behind the experts."""
    *taus, delta = task_vectors(job.base, job.experts, decision_dtype(job.base, job.experts))
    assert job.base is not None
    base: Tensor = job.base.to(delta.dtype)
    return base + spectral.svc(taus, delta, arguments["alpha"]).to(delta.dtype)


#: What a step of a plan may also be; no method that a user names.
STEPS: Mapping[str, Function] = {**FUNCTIONS, "scale_channels": _scale_channels, "svc": _svc}
