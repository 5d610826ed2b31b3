"""Methods that are no recipe: small functions over whole tensors. Each takes the job (base,
experts, tensor name), the method's arguments and the preset, and returns the merged tensor in
float32 (float64 for float64 inputs), before the final rounding and any calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from magic_fast.errors import InputError
from magic_fast.ops.backend import Job
from magic_fast.reference.merge import decision_dtype, task_vectors
from magic_fast.reference.spherical import slerp, slerp_magic

Function = Callable[[Job, Mapping[str, Any], str], Tensor]


def _slerp(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    """Between the base and one expert, or between two task vectors (two whole models without a
    base)."""
    base, experts = job.base, job.experts
    dtype = decision_dtype(base, experts)
    per_row = bool(arguments.get("per_row", False))
    if preset == "magic":
        if len(experts) != 2:
            raise InputError(
                f"experts for method 'slerp' of preset 'magic': expected 2, got {len(experts)}."
            )
        if arguments["t"] != 0.5:
            raise InputError(
                f"t for method 'slerp' of preset 'magic': expected 0.5, got {arguments['t']}."
            )
        merged = slerp_magic(*task_vectors(base, experts, dtype))
        return merged if base is None else base.to(dtype) + merged
    if base is not None and len(experts) == 1:
        return slerp(base.to(dtype), experts[0].to(dtype), arguments["t"], per_row=per_row)
    if len(experts) != 2:
        raise InputError(
            f"experts for method 'slerp': expected one with a base, or two, got {len(experts)}. "
            "Spherical interpolation runs between two models."
        )
    a, b = task_vectors(base, experts, dtype)
    merged = slerp(a, b, arguments["t"], per_row=per_row)
    return merged if base is None else base.to(dtype) + merged


METHODS_WITHOUT_RECIPE = frozenset({"slerp"})
FUNCTIONS: Mapping[str, Function] = {"slerp": _slerp}
