"""Methods in the singular vectors of the task vectors. They apply to matrices, chosen by name;
every other tensor gets the mean task vector."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from magic_fast.ops.job import Job
from magic_fast.reference import spectral
from magic_fast.reference.merge import decision_dtype, task_vectors
from magic_fast.reference.spectral import EXACT, Factorizations
from magic_fast.spectral import FastFactorizations
from magic_fast.spectral.precision import full_float32

_NEVER = ("text_projection",)
_MAGIC_TSV_NEVER = ("token_embedding", "positional_embedding", "embeddings")

Formula = Callable[[Sequence[Tensor], Factorizations], Tensor]


def _applies(job: Job, arguments: Mapping[str, Any], never: Sequence[str]) -> bool:
    """Whether the tensor is a matrix that the method is for."""
    if job.experts[0].dim() != 2 or not job.experts[0].numel():
        return False
    pattern = arguments.get("tensors")
    if pattern is not None:
        return re.search(pattern, job.name) is not None
    return not any(word in job.name for word in never)


@torch.no_grad()
def _merged(job: Job, arguments: Mapping[str, Any], formula: Formula | None) -> Tensor:
    """base + λ·formula(τ), or with λ·mean τ where there is no formula for the tensor."""
    dtype = decision_dtype(job.base, job.experts)
    taus = task_vectors(job.base, job.experts, dtype)
    if formula is None:
        delta = spectral.mean(taus)
    elif not spectral.all_finite(taus):  # one NaN reaches every direction
        delta = torch.full_like(taus[0], math.nan)
    elif arguments.get("svd") == "exact":
        delta = formula([tau.double() for tau in taus], EXACT).to(dtype)
    else:
        label = f"'{job.name}'" if job.name else "the tensor"
        with full_float32():
            delta = formula(taus, FastFactorizations(label))
    delta = delta * arguments["scale"]
    merged: Tensor = delta if job.base is None else job.base.to(dtype) + delta
    return merged


def iso_c(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    """The sum with all its singular values made equal."""
    applies = _applies(job, arguments, _NEVER)
    return _merged(job, arguments, spectral.iso_c if applies else None)


def iso_cts(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    """The same in a common space and in one space of each expert's own."""
    fraction = arguments["common_space_fraction"]

    def formula(taus: Sequence[Tensor], by: Factorizations) -> Tensor:
        return spectral.iso_cts(taus, fraction, by)

    return _merged(job, arguments, formula if _applies(job, arguments, _NEVER) else None)


def tsv_m(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    """The leading triples of every expert, made orthogonal to one another. Of more experts than
    the matrix has rows or columns none has a leading triple: the mean (preset ``magic``: zero)."""
    never = _NEVER if preset != "magic" else (*_NEVER, *_MAGIC_TSV_NEVER)
    applies = _applies(job, arguments, never)
    if preset != "magic" and len(job.experts) > min(job.experts[0].shape, default=0):
        applies = False
    return _merged(job, arguments, spectral.tsv_m if applies else None)


def star(job: Job, arguments: Mapping[str, Any], preset: str) -> Tensor:
    """The mean of task vectors reduced to the singular triples that carry most of them."""
    eta = arguments["eta"]

    def formula(taus: Sequence[Tensor], by: Factorizations) -> Tensor:
        return spectral.mean([spectral.star(tau, eta) for tau in taus])

    return _merged(job, arguments, formula if job.experts[0].dim() == 2 else None)


SPECTRAL = {"iso_c": iso_c, "iso_cts": iso_cts, "star": star, "tsv_m": tsv_m}
