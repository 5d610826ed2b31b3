"""The corners that every method of the registry meets: one expert, a zero task vector, all of them
zero, ties, vectors, filters and scalars, with and without WSC. Embeddings of different sizes:
test_methods_yaml.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import magic_fast as mf
from magic_fast.methods.registry import find_method, names

# parameters that make a method act on tensors this small; others run with their defaults
SETTINGS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.1},
    "sce": {"select_topk": 0.5},
    "ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.1},
    "della_linear": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1},
}
METHODS = names()
BY_ROWS = {"arcee_fusion", "della", "della_linear"}  # a softmax, or ranks, within a row
# one expert has no second task to agree with, and no variance to be chosen by
NOTHING_OF_ONE = {"consensus_ta", "sce"}
BY_MATRICES = {"iso_c", "iso_cts", "tsv_m", "star"}
WSC = pytest.mark.parametrize("calibrate", [None, "wsc"])


def counts(method: str) -> list[int]:
    """The fewest experts it takes, and three or as many as it takes."""
    spec = find_method(method)
    return sorted({spec.min_experts, min(spec.max_experts or 3, 3)})


def models(shape: tuple[int, ...], k: int) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(11)
    base = torch.randn(shape, generator=g)
    return base, [base + 0.3 * torch.randn(shape, generator=g) for _ in range(k)]


def merge(method: str, base: Tensor, experts: list[Tensor], **more: Any) -> Tensor:
    settings = {**SETTINGS.get(method, {}), **more}
    if find_method(method).base != "none":
        merged: Tensor = mf.merge(base, experts, method, name="w", **settings)
        return merged
    calibration = settings.pop("calibrate", None)  # of whole models: a step of its own
    merged = mf.merge(None, experts, method, name="w", **settings)
    if calibration is not None:
        merged, _ = mf.calibrate_weights(base, experts, merged, calibration=calibration, name="w")
    return merged


@WSC
@pytest.mark.parametrize("shape", [(8, 16), (65,), (4, 3, 2, 2), ()])
@pytest.mark.parametrize("method", METHODS)
def test_shapes(method: str, shape: tuple[int, ...], calibrate: str | None) -> None:
    for k in counts(method):
        base, experts = models(shape, k)
        kept = [x.clone() for x in (base, *experts)]
        merged = merge(method, base, experts, calibrate=calibrate)
        assert merged.shape == base.shape
        assert merged.dtype == base.dtype
        assert bool(merged.isfinite().all())
        if base.dim() > 1:
            assert torch.equal(merged, base) == (k == 1 and method in NOTHING_OF_ONE)
        for x, before in zip((base, *experts), kept, strict=True):
            assert torch.equal(x, before)


@pytest.mark.parametrize("method", sorted(set(METHODS) - BY_ROWS - BY_MATRICES))
def test_a_filter_is_its_elements(method: str) -> None:
    """What looks at elements, or at a tensor as one vector, does not see its shape."""
    for k in counts(method):
        base, experts = models((4, 3, 2, 2), k)
        flat = merge(method, base.flatten(), [e.flatten() for e in experts])
        torch.testing.assert_close(merge(method, base, experts).flatten(), flat)


@WSC
@pytest.mark.parametrize("shape", [(8, 16), (65,)])
@pytest.mark.parametrize("method", METHODS)
def test_experts_that_are_the_base(
    method: str, shape: tuple[int, ...], calibrate: str | None
) -> None:
    for k in counts(method):
        base, _ = models(shape, k)
        merged = merge(method, base, [base.clone() for _ in range(k)], calibrate=calibrate)
        torch.testing.assert_close(merged, base)


@WSC
@pytest.mark.parametrize("method", [m for m in METHODS if find_method(m).max_experts is None])
def test_one_expert_that_is_the_base(method: str, calibrate: str | None) -> None:
    """Among others that are not: no division by its norm."""
    base, experts = models((8, 16), 3)
    experts[1] = base.clone()
    merged = merge(method, base, experts, calibrate=calibrate)
    assert bool(merged.isfinite().all())
    assert not torch.equal(merged, base)


@WSC
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_zeros(method: str, calibrate: str | None) -> None:
    """A row that is zero in every model stays zero."""
    for k in counts(method):
        base, experts = models((8, 16), k)
        for x in (base, *experts):
            x[2] = 0
        merged = merge(method, base, experts, calibrate=calibrate)
        assert bool(merged.isfinite().all())
        torch.testing.assert_close(merged[2], torch.zeros(16), rtol=0, atol=1e-6)


@WSC
@pytest.mark.parametrize("shape", [(8, 16), (65,), (4, 3, 2, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_ties(method: str, shape: tuple[int, ...], calibrate: str | None) -> None:
    """Five values in all, so that equal magnitudes, zero votes and equal variances are everywhere:
    every backend takes the same of them, and the same every time."""
    for k in counts(method):
        g = torch.Generator().manual_seed(5)
        base, *experts = (torch.randint(-2, 3, shape, generator=g) / 4 for _ in range(k + 1))
        experts[-1] = experts[0].clone()  # two that agree in everything
        merged = merge(method, base, experts, calibrate=calibrate)
        assert bool(merged.isfinite().all())
        assert torch.equal(merged, merge(method, base, experts, calibrate=calibrate))
        plain = merge(method, base, experts, calibrate=calibrate, backend="torch")
        torch.testing.assert_close(merged, plain)
