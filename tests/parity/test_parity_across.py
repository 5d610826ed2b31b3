"""What the experts of an entry hold together, on tensors larger than a sample: several experts,
heavy values, thresholds that a bracket misses. Found exactly as the reference finds it."""

from __future__ import annotations

import pytest
import torch

from magic_fast import ops
from magic_fast.methods.presets import build_recipe
from magic_fast.ops.job import Job
from magic_fast.recipe import Recipe, RowCalibration
from magic_fast.reference import merge as reference
from support.backends import backend_params, why_not
from support.oracle import assert_within_budget, truth

SHAPE = (8, 4201)


RECIPES: dict[str, tuple[str, dict[str, object], str]] = {
    "sce": ("sce", {"select_topk": 0.3}, "default"),
    "sce_mergekit": ("sce", {"select_topk": 0.9}, "mergekit"),
    "sce_of_nothing": ("sce", {"select_topk": 1e-9}, "default"),
    "sce_of_all": ("sce", {"select_topk": 1.0}, "default"),
    "ramplus": ("ramplus_tl", {"r": 0.5, "alpha": 0.8, "epsilon": 0.2}, "default"),
    "pcb": ("pcb", {"ratio": 0.1, "scope": "tensor", "scale": 1.2}, "default"),
}


def recipe_of(word: str, k: int) -> Recipe:
    method, parameters, preset = RECIPES[word]
    return build_recipe(method, k, parameters, preset=preset)


def job_of(word: str, k: int, content: str) -> Job:
    g = torch.Generator().manual_seed(k)
    base = torch.randn(SHAPE, generator=g).to(torch.bfloat16)
    if content == "ties":
        taus = torch.randint(-3, 4, (k, *SHAPE), generator=g) / 8
        base = (base * 8).round() / 8
    else:
        taus = torch.randn((k, *SHAPE), generator=g) * torch.rand((k, 1, 1), generator=g)
    experts = [(base.float() + t).to(torch.bfloat16) for t in taus]
    out = torch.empty(SHAPE, dtype=torch.bfloat16)
    return Job(base, experts, recipe_of(word, k), out, "layers.0.weight")


def _cases() -> list[object]:
    # where values repeat, scores equal the cut of PCB, and rounding decides on which side they fall
    few = [(w, 3, c) for w in RECIPES for c in ("ties", "normal") if (w, c) != ("pcb", "ties")]
    return [*few, *(pytest.param(w, 9, "normal", marks=pytest.mark.slow) for w in RECIPES)]


@pytest.mark.parametrize(("word", "k", "content"), _cases())
@pytest.mark.parametrize("backend", backend_params())
def test_across(backend: str, word: str, k: int, content: str) -> None:
    job = job_of(word, k, content)
    if content == "normal":
        job.calibration = RowCalibration(*SHAPE)
    (stats,) = ops.merge([job], backend=backend)
    found, expected = stats.selection, reference.select(job.base, job.experts, job.recipe)
    if job.recipe.trim.by_magnitude or job.recipe.needs_variance:
        assert found.threshold == expected.threshold
        assert found.top_threshold == expected.top_threshold
    assert found.weights == expected.weights
    assert found.alone == expected.alone
    keep = reference.decide(job.base, job.experts, job.recipe, selection=expected).keep
    kept = tuple(job.experts[0].numel() if m is None else int(m.sum()) for m in keep)
    assert stats.kept == kept
    job.selection = found
    assert_within_budget(job.out, truth(job))


@pytest.mark.parametrize("content", ["ties", "normal"])
@pytest.mark.parametrize(
    "backend", [p for p in backend_params() if p.values[0] not in ("native", "torch")]
)
def test_scores_have_the_same_bounds_everywhere(backend: str, content: str) -> None:
    """exp and tanh are the same operations in every backend of ours, bit for bit (PyTorch has its
    own)."""
    if (reason := why_not("native")) is not None:
        pytest.skip(reason)
    job = job_of("pcb", 3, content)
    mine, theirs = (ops.select(job, backend=b) for b in (backend, "native"))
    assert mine.score_cut == theirs.score_cut
    assert mine.score_top == theirs.score_top


@pytest.mark.parametrize("word", ["sce", "sce_of_all", "ramplus", "pcb"])
@pytest.mark.parametrize("backend", backend_params())
def test_of_no_elements(backend: str, word: str) -> None:
    empty = torch.empty((0, 4))
    job = Job(empty, [empty, empty], recipe_of(word, 2), empty.clone(), "w")
    found = ops.select(job, backend=backend)
    expected = reference.select(job.base, job.experts, job.recipe)
    assert (found.weights, found.alone) == (expected.weights, expected.alone)
    (stats,) = ops.merge([job], backend=backend)
    assert stats.kept == (0, 0)
