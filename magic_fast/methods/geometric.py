"""Methods between directions, over the Gram matrix of the vectors: one read for the inner
products, K coefficients in float64, one read to add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from magic_fast.errors import InputError
from magic_fast.ops.backend import Job
from magic_fast.recipe import per_expert
from magic_fast.reference import geometric
from magic_fast.reference.gram import Vectors
from magic_fast.reference.merge import decision_dtype, task_vectors
from magic_fast.reference.spherical import slerp as slerp_between
from magic_fast.reference.spherical import slerp_magic


def slerp(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
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
        a, b = base.to(dtype), experts[0].to(dtype)
        return slerp_between(a, b, arguments["t"], per_row=per_row)
    if len(experts) != 2:
        raise InputError(
            f"experts for method 'slerp': expected one with a base, or two, got {len(experts)}. "
            "Spherical interpolation runs between two models."
        )
    a, b = task_vectors(base, experts, dtype)
    merged = slerp_between(a, b, arguments["t"], per_row=per_row)
    return merged if base is None else base.to(dtype) + merged


def _vectors(job: Job, axis: int | None = None) -> Vectors:
    return Vectors.of(job.base, job.experts, decision_dtype(job.base, job.experts), axis)


def _whole(vectors: Vectors) -> Tensor:
    """The [K, K] Gram matrix on the CPU: the one synchronisation of a method."""
    return vectors.gram()[0].cpu()


def nuslerp(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    """Whole tensors, last-dimension rows, or fibres along dimension 0."""
    if len(job.experts) != 2:
        raise InputError(
            f"experts for method 'nuslerp': expected 2, got {len(job.experts)}. Spherical "
            "interpolation runs between two models; multislerp and karcher take more."
        )
    weights = per_expert(arguments["weights"], 2, "weights")
    axis = None
    if not arguments["nuslerp_flatten"]:
        axis = 0 if arguments["nuslerp_row_wise"] else -1
    vectors = _vectors(job, axis)
    return vectors.combine(geometric.nuslerp(vectors.gram(), weights))


def multislerp(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    vectors = _vectors(job)
    coefficients = geometric.multislerp(
        _whole(vectors),
        per_expert(arguments["weights"], len(job.experts), "weights"),
        normalize=arguments["normalize_weights"],
        eps=arguments["eps"],
        name=job.name,
    )
    return vectors.combine(coefficients[None])


def karcher(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    """Of whole models; a base is one of them."""
    models = [*job.experts] if job.base is None else [job.base, *job.experts]
    vectors = Vectors.of(None, models, decision_dtype(None, models))
    coefficients = geometric.karcher(
        _whole(vectors), max_iter=arguments["max_iter"], tol=arguments["tol"]
    )
    return vectors.combine(coefficients[None])


def model_stock(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    if len(job.experts) < 2:
        raise InputError(
            f"experts for method 'model_stock': expected at least 2, got {len(job.experts)}. It "
            "measures the angle between them."
        )
    vectors = _vectors(job, -1 if arguments["filter_wise"] else None)
    shares = geometric.model_stock(vectors.gram(), absolute=preset == "mergekit")
    return vectors.combine(shares)


GEOMETRIC = {
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
}
