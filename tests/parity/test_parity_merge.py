"""Every backend against float64 truth: values within the budget; masks, counts and cuts exact."""

from __future__ import annotations

import pytest
import torch

from magic_fast import ops
from magic_fast.errors import BackendError
from magic_fast.ops.job import Job
from magic_fast.recipe import Recipe, Trim, TrimRule
from magic_fast.reference import merge as reference
from magic_fast.reference.trim import variance
from support.backends import backend_params
from support.cases import MergeCase, is_quick, merge_cases
from support.oracle import assert_within_budget, truth

_CASES = [
    pytest.param(case, id=case.word, marks=() if is_quick(case) else pytest.mark.slow)
    for case in dict.fromkeys(merge_cases())
]


def run(job: Job, backend: str) -> ops.Stats:
    """The job on one backend; skipped, with its words, where the backend refuses it."""
    try:
        return ops.merge([job], backend=backend)[0]
    except BackendError as refusal:
        if backend == "torch":  # runs everything
            raise
        pytest.skip(str(refusal))


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("backend", backend_params())
def test_merge(backend: str, case: MergeCase) -> None:
    job = case.job()
    inputs = [t.clone() for t in ([] if job.base is None else [job.base]) + list(job.experts)]
    stats = run(job, backend)
    found = truth(job)
    assert_within_budget(job.out, found)
    kept = tuple(
        e.numel() if m is None else int(m.sum())
        for e, m in zip(job.experts, found.decisions.keep, strict=True)
    )
    assert stats.kept == kept
    assert stats.base_nonfinite == -1 and stats.overflow == -1
    assert all(i == -1 for i in stats.first_nonfinite)
    after = ([] if job.base is None else [job.base]) + list(job.experts)
    assert all(torch.equal(a, b) for a, b in zip(inputs, after, strict=True))


_SELECTING = [
    p for p in _CASES if p.values[0].job().recipe.needs_select and p.values[0].mix != "narrowed"
]


@pytest.mark.parametrize("case", _SELECTING)
@pytest.mark.parametrize("backend", backend_params())
def test_select(backend: str, case: MergeCase) -> None:
    job = case.job()
    try:
        found = ops.select(job, backend=backend)
    except BackendError as refusal:
        if backend == "torch":
            raise
        pytest.skip(str(refusal))
    expected = reference.select(
        job.base, job.experts, job.recipe, stream=job.stream, masks=job.masks
    )
    assert found.factor == expected.factor
    assert found.majority == expected.majority
    assert found.weights == expected.weights
    assert found.alone == expected.alone
    if job.recipe.trim.by_magnitude or job.recipe.needs_variance:
        assert found.threshold == expected.threshold
        assert found.top_threshold == expected.top_threshold
        _assert_same_cuts(job, expected, found)


def _assert_same_cuts(job: Job, expected: ops.Selection, found: ops.Selection) -> None:
    """Two cuts are the same where they keep the same entries: between two equals any will do."""
    taus = reference.task_vectors(
        job.base, job.experts, reference.decision_dtype(job.base, job.experts)
    )
    if job.recipe.needs_variance:
        taus = [variance(taus)] * len(taus)
    for k, tau in enumerate(taus):
        flat = tau.flatten().abs()
        for threshold, one, other in (
            (expected.threshold[k], expected.tie_cut[k], found.tie_cut[k]),
            (expected.top_threshold[k], expected.top_tie_cut[k], found.top_tie_cut[k]),
        ):
            equal = (flat == threshold).nonzero().flatten()
            assert int((equal < one).sum()) == int((equal < other).sum())


_TRIMS = {
    "magnitude": lambda q: Trim(TrimRule.MAGNITUDE, density=(q,)),
    "random": lambda q: Trim(TrimRule.RANDOM, density=(q,), seed=5),
    "ranked": lambda q: Trim(TrimRule.RANKED, density=(q,), epsilon=(q / 10,), seed=5),
    "band": lambda q: Trim(TrimRule.BAND, density=(q,), gamma=(0.05,)),
}


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1,), (3,), (5,), (131,), (7, 33), (300, 257)], ids=str)
@pytest.mark.parametrize("trim", _TRIMS)
@pytest.mark.parametrize("backend", backend_params())
def test_keep_mask_bit_for_bit(
    backend: str, trim: str, shape: tuple[int, ...], density: float
) -> None:
    """One expert, no base, no weight: what survives is the mask itself."""
    g = torch.Generator().manual_seed(3)
    x = torch.randint(1, 40, shape, generator=g).float() * (
        torch.randint(0, 2, shape, generator=g) * 2 - 1
    )
    recipe = Recipe((1.0,), trim=_TRIMS[trim](density))
    job = Job(None, [x], recipe, torch.empty(shape), "layers.0.weight")
    run(job, backend)
    keep = reference.decide(None, [x], recipe, stream=job.stream).keep[0]
    assert keep is not None
    assert torch.equal(job.out, torch.where(keep, x, torch.zeros_like(x)))
