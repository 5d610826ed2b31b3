"""Select against sorting: thresholds, cuts, and what sits on segment borders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magic_fast import ops
from magic_fast.ops.job import Job
from magic_fast.recipe import Recipe, TieRule, Trim, TrimRule


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A sample far smaller than the tensor, so that brackets miss and several scans are needed."""
    from magic_fast.ops.gpu import jobs as gpu_jobs

    monkeypatch.setattr(gpu_jobs, "SAMPLE", 64)
    yield


def _kept_by_sorting(x: Tensor, count: int) -> Tensor:
    """bool: the ``count`` largest |x|, equal ones by index."""
    order = torch.sort(x.abs().flatten(), descending=True, stable=True).indices
    keep = torch.zeros(x.numel(), dtype=torch.bool)
    keep[order[:count]] = True
    return keep


def _check(x: Tensor, density: float, rule: TrimRule = TrimRule.MAGNITUDE) -> None:
    trim = Trim(rule, density=(density,), gamma=(0.05,))
    job = Job(None, [x], Recipe((1.0,), trim=trim), torch.empty_like(x))
    ops.merge([job], backend="triton")
    assert job.out is not None
    if rule is TrimRule.BAND:
        top, kept = trim.band_counts(0, x.numel())
        wanted = _kept_by_sorting(x, top + kept) & ~_kept_by_sorting(x, top)
    else:
        wanted = _kept_by_sorting(x, trim.kept_count(0, x.numel()))
    assert torch.equal(job.out.flatten(), torch.where(wanted, x.flatten(), torch.zeros(1)))


def _values(kind: str, n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if kind == "normal":
        x = torch.randn(n, generator=g)
    elif kind == "few":
        x = torch.randint(-4, 5, (n,), generator=g).float()
    elif kind == "equal":
        x = torch.full((n,), -0.5)
    elif kind == "rising":
        x = torch.arange(n).float() - n / 3
    else:  # one outlier range that no sample of runs sees
        x = torch.randn(n, generator=g) * 1e-3
        x[n // 2 : n // 2 + 7] = 1e30
    return x + 0.0  # no negative zero: it has no place of its own in a sort


@given(
    kind=st.sampled_from(["normal", "few", "equal", "rising", "outliers"]),
    n=st.integers(1, 3000),
    density=st.sampled_from([0.001, 0.2, 0.5, 0.97]),
    seed=st.integers(0, 9),
)
@settings(max_examples=12)
def test_whole_sample_selects_what_sorting_does(
    kind: str, n: int, density: float, seed: int
) -> None:
    _check(_values(kind, n, seed), density)


@pytest.mark.parametrize("kind", ["normal", "few", "equal", "rising", "outliers"])
@pytest.mark.parametrize("density", [0.002, 0.2, 0.9])
def test_brackets_that_miss_are_mended(sampled: None, kind: str, density: float) -> None:
    """64 of 9001 magnitudes bracket nothing reliably; the scans after the first must."""
    _check(_values(kind, 9001, 3), density)


def test_a_band_has_two_exact_edges(sampled: None) -> None:
    _check(_values("few", 5003, 1), 0.6, TrimRule.BAND)


@pytest.mark.parametrize("ties", [TieRule.KEEP_ALL, TieRule.DROP_ALL])
def test_ties_all_stay_or_all_go(sampled: None, ties: TieRule) -> None:
    x = _values("few", 4001, 2)
    trim = Trim(TrimRule.MAGNITUDE, density=(0.3,), tie_rule=ties)
    job = Job(None, [x], Recipe((1.0,), trim=trim), torch.empty_like(x))
    (stats,) = ops.merge([job], backend="triton")
    (wanted,) = ops.merge([job], backend="torch")
    assert stats.kept == wanted.kept
    assert stats.selection.threshold == wanted.selection.threshold


def test_experts_of_one_call_do_not_mix(sampled: None) -> None:
    """Different magnitudes, counts and dtypes: each expert has its own threshold and cut."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(6000, generator=g).bfloat16()
    scales = (1e-3, 1.0, 30.0)
    experts = [base.float() + s * torch.randn(6000, generator=g) for s in scales]
    experts[1] = experts[1].bfloat16()
    trim = Trim(TrimRule.MAGNITUDE, density=(0.1, 1.0, 0.7))
    found = [
        ops.select(Job(base, experts, Recipe((1.0,) * 3, trim=trim)), backend=backend)
        for backend in ("triton", "torch")
    ]
    assert found[0].threshold == found[1].threshold
    assert found[0].factor == found[1].factor
