"""Methods in the singular vectors of the task vectors. They apply to matrices, chosen by name;
every other tensor gets the mean task vector. No torch is imported before one of them runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from magic_fast.methods.parameters import number, scale
from magic_fast.methods.spec import MethodSpec, Paper, ParameterSpec, decompositions
from magic_fast.ops.job import Job

_SVD = ParameterSpec("svd", kind="choice", default="auto", choices=("auto", "exact"))
_TENSORS = ParameterSpec("tensors", kind="pattern")  # absent: the method's own rule of names
_NEVER = ("text_projection",)
_MAGIC_TSV_NEVER = ("token_embedding", "positional_embedding", "embeddings")

Arguments = Mapping[str, Any]
#: From task vectors and factorisations (:mod:`magic_fast.reference.spectral`) to Δ.
Formula = Callable[[Sequence[Any], Any], Any]


def _applies(job: Job, arguments: Arguments, never: Sequence[str]) -> bool:
    """Whether the tensor is a matrix that the method is for."""
    if job.experts[0].dim() != 2 or not job.experts[0].numel():
        return False
    pattern = arguments.get("tensors")
    if pattern is not None:
        return re.search(pattern, job.name) is not None
    return not any(word in job.name for word in never)


def _merged(job: Job, arguments: Arguments, formula: Formula | None) -> Any:
    """base + λ·formula(τ), or with λ·mean τ where there is no formula for the tensor."""
    import torch

    from magic_fast.reference import spectral
    from magic_fast.reference.merge import decision_dtype, task_vectors
    from magic_fast.spectral import FastFactorizations
    from magic_fast.spectral.precision import full_float32

    with torch.no_grad():
        dtype = decision_dtype(job.base, job.experts)
        taus = task_vectors(job.base, job.experts, dtype)
        if formula is None:
            delta = spectral.mean(taus)
        elif not spectral.all_finite(taus):  # one NaN reaches every direction
            delta = torch.full_like(taus[0], math.nan)
        elif arguments.get("svd") == "exact":
            delta = formula([tau.double() for tau in taus], spectral.EXACT).to(dtype)
        else:
            label = f"'{job.name}'" if job.name else "the tensor"
            with full_float32():
                delta = formula(taus, FastFactorizations(label))
        delta = delta * arguments["scale"]
        return delta if job.base is None else job.base.to(dtype) + delta


def _iso_c(job: Job, arguments: Arguments, preset: str) -> Any:
    """The sum with all its singular values made equal."""
    from magic_fast.reference import spectral

    applies = _applies(job, arguments, _NEVER)
    return _merged(job, arguments, spectral.iso_c if applies else None)


def _iso_cts(job: Job, arguments: Arguments, preset: str) -> Any:
    """The same in a common space and in one space of each expert's own."""
    from magic_fast.reference import spectral

    fraction = arguments["common_space_fraction"]

    def formula(taus: Sequence[Any], by: Any) -> Any:
        return spectral.iso_cts(taus, fraction, by)

    return _merged(job, arguments, formula if _applies(job, arguments, _NEVER) else None)


def _tsv_m(job: Job, arguments: Arguments, preset: str) -> Any:
    """The leading triples of every expert, made orthogonal to one another. Of more experts than
    the matrix has rows or columns none has a leading triple: the mean (preset ``magic``: zero)."""
    from magic_fast.reference import spectral

    never = _NEVER if preset != "magic" else (*_NEVER, *_MAGIC_TSV_NEVER)
    applies = _applies(job, arguments, never)
    if preset != "magic" and len(job.experts) > min(job.experts[0].shape, default=0):
        applies = False
    return _merged(job, arguments, spectral.tsv_m if applies else None)


def _star(job: Job, arguments: Arguments, preset: str) -> Any:
    """The mean of task vectors reduced to the singular triples that carry most of them."""
    from magic_fast.reference import spectral

    eta = arguments["eta"]

    def formula(taus: Sequence[Any], by: Any) -> Any:
        return spectral.mean([spectral.star(tau, eta) for tau in taus])

    return _merged(job, arguments, formula if job.experts[0].dim() == 2 else None)


_ISO = Paper("No Task Left Behind", "2502.04959")
_TWELVE = "K task vectors and about twelve float64 copies of one"

# Copies: resident memory at its highest, K = 3, was 6.5 to 7.5 of them for iso_c, 9 to 11.5 for
# iso_cts and tsv_m, 3 to 4 for star (3000 x 3000, and 1600 x 1600 beside 640 x 640).
METHODS = (
    MethodSpec(
        "iso_c",
        (scale(), _SVD, _TENSORS),
        function=_iso_c,
        summary="all directions of the summed change made equally strong",
        use_when="many tasks",
        reads="1",
        holds="K task vectors and about eight float64 copies of one",
        workspace=decompositions(8),
        paper=_ISO,
    ),
    MethodSpec(
        "iso_cts",
        (number("common_space_fraction", 0.8, 0.0, 1.0), scale(), _SVD, _TENSORS),
        function=_iso_cts,
        summary="as iso_c, with directions of each task beside the common ones",
        use_when="many tasks that share little",
        reads="1",
        holds=_TWELVE,
        workspace=decompositions(12),
        paper=_ISO,
    ),
    MethodSpec(
        "tsv_m",
        (scale(), _SVD, _TENSORS),
        function=_tsv_m,
        summary="the leading singular directions of each task, made orthogonal",
        use_when="many tasks, low-rank changes",
        paper=Paper("Task Singular Vectors", "2412.00081"),
        reads="1",
        holds=_TWELVE,
        workspace=decompositions(12),
    ),
    MethodSpec(
        "star",
        (number("eta", 0.4, 0.0, 1.0, low_open=True), scale()),
        function=_star,
        summary="small singular values of each change dropped, the rest rescaled, then the mean",
        use_when="noisy changes",
        paper=Paper("STAR", "2502.10339"),
        reads="1",
        holds="K task vectors and about five float64 copies of one",
        workspace=decompositions(5),
    ),
)
