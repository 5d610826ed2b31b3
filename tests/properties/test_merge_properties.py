"""What holds of every merge, whatever the numbers (hypothesis; the same examples on every run)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import magic_fast as mf
from magic_fast import ops
from magic_fast.ops.job import Job
from magic_fast.recipe import Recipe, Rescale, Trim, TrimRule, TrimScope
from support.backends import backend_params
from support.oracle import truth, ulp

few = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])

#: method → parameters; no draw depends on an expert's place
DETERMINISTIC: dict[str, dict[str, Any]] = {
    "average": {},
    "task_arithmetic": {"scale": 0.7},
    "ties": {"density": 0.4},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.1},
}
EVERY = {
    **DETERMINISTIC,
    "dare_linear": {"density": 0.5, "seed": 3},
    "dare_ties": {"density": 0.5, "seed": 3},
    "della": {"density": 0.5, "epsilon": 0.2, "seed": 3},
    "della_linear": {"density": 0.5, "epsilon": 0.2, "seed": 3},
}


@dataclass(frozen=True)
class Data:
    """Task vectors on a coarse grid (their sums are exact) or anywhere, and weights."""

    seed: int
    rows: int
    cols: int
    experts: int
    coarse: bool

    def taus(self) -> list[Tensor]:
        g = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.cols)
        if self.coarse:
            return [torch.randint(-9, 10, shape, generator=g) / 64 for _ in range(self.experts)]
        return [torch.randn(shape, generator=g) * 0.01 for _ in range(self.experts)]

    def base(self) -> Tensor:
        g = torch.Generator().manual_seed(self.seed + 1)
        return torch.randint(-64, 65, (self.rows, self.cols), generator=g) / 64

    def weights(self) -> list[float]:
        g = torch.Generator().manual_seed(self.seed + 2)
        return (0.1 + torch.rand(self.experts, generator=g)).tolist()


data = st.builds(
    Data,
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    cols=st.integers(1, 40),
    experts=st.integers(1, 6),
    coarse=st.booleans(),
)


@pytest.mark.parametrize("method", DETERMINISTIC)
@pytest.mark.parametrize("backend", backend_params())
@given(data=data, order=st.randoms(use_true_random=False))
@few
def test_the_order_of_experts_does_not_matter(
    backend: str, method: str, data: Data, order: Any
) -> None:
    """Within rounding, away from votes that rounding alone decides."""
    taus, weights = data.taus(), data.weights()
    places = list(range(data.experts))
    order.shuffle(places)
    weighted = {} if method == "average" else {"weights": weights}
    shuffled = {} if method == "average" else {"weights": [weights[p] for p in places]}
    options = {**DETERMINISTIC[method], "backend": backend}
    one = mf.merge_task_vectors(taus, method, **weighted, **options)
    other = mf.merge_task_vectors([taus[p] for p in places], method, **shuffled, **options)
    terms = torch.stack([abs(w) * t.abs() for w, t in zip(weights, taus, strict=True)]).sum(0)
    # K sums and a quotient, each within half a unit in the last place of the sum of magnitudes
    bound = (data.experts + 3) * ulp(terms.double() * 10, torch.float32)
    signed = torch.stack([w * t.double() for w, t in zip(weights, taus, strict=True)]).sum(0)
    decided = signed.abs() > 1e-5 * terms.double()
    error = (one.double() - other.double()).abs()
    if "ties" in method:
        found = mf.merge_task_vectors(
            taus, method, **weighted, **DETERMINISTIC[method], details=True
        )
        kept = [t if m is None else t * m for t, m in zip(taus, found.keep_masks, strict=True)]
        votes = sum(w * t.double() for w, t in zip(weights, kept, strict=True))
        decided = (votes.abs() > 1e-5 * terms.double()) | (terms == 0)
    else:
        decided = torch.ones_like(decided)
    assert bool((error <= bound)[decided].all())


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("backend", backend_params())
@given(data=data, exponent=st.integers(-20, 20))
@few
def test_powers_of_two_scale_exactly(backend: str, method: str, data: Data, exponent: int) -> None:
    taus = data.taus()
    options = {**EVERY[method], "backend": backend}
    plain = mf.merge_task_vectors(taus, method, **options)
    scaled = mf.merge_task_vectors([t * 2.0**exponent for t in taus], method, **options)
    assert torch.equal(scaled, plain * 2.0**exponent)


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("backend", backend_params())
@given(data=data, variant=st.sampled_from(["manifold", "manifold_exact", "sphere"]))
@few
def test_merge_with_calibration_is_merge_then_calibration(
    backend: str, method: str, data: Data, variant: str
) -> None:
    """But for the rounding of the merged weights, which the second reads and the first does not."""
    taus, base = data.taus(), data.base()
    experts = [base + t for t in taus]
    calibration = mf.WeightCalibration(variant=variant, scale=0.9)
    at_once = mf.merge(
        base, experts, method, calibrate=calibration, backend=backend, **EVERY[method]
    )
    merged = mf.merge(base, experts, method, backend=backend, **EVERY[method])
    after, report = mf.calibrate_weights(
        base, experts, merged, calibration=calibration, backend=backend
    )
    xi = report.tensors[0].coefficient.double()
    delta = (merged.double() - base.double()).norm(dim=1)
    # d is known to half a unit in the last place of a weight, √cols of them in a row: relative
    # error e of its norm; ξ moves by at most its condition times e, 10 within the clamp, and as
    # much again for the experts' own rounding
    e = 2.0**-23 * base.abs().max().clamp(min=1).double() * data.cols**0.5 / delta
    steady = (e < 1e-3) & (xi > 0.11) & (xi < 9) & (_well_conditioned(experts, base, variant))
    difference = (at_once.double() - after.double()).norm(dim=1)
    allowed = 100 * e * delta * xi.clamp(min=1) + 2.0**-22 * data.cols**0.5
    assert bool((difference <= allowed)[steady].all())


def _well_conditioned(experts: list[Tensor], base: Tensor, variant: str) -> Tensor:
    """Rows whose Gram is far from the bound at which `manifold_exact` turns to the sphere."""
    if variant != "manifold_exact":
        return torch.ones(base.shape[0], dtype=torch.bool)
    t = torch.stack([(e - base).double() for e in experts], 1)
    values = torch.linalg.eigvalsh(t @ t.transpose(1, 2))
    return values[:, 0] > 1e-2 * values[:, -1]


@pytest.mark.parametrize("method", [m for m in EVERY if "density" in EVERY[m]])
@pytest.mark.parametrize("backend", backend_params())
@given(data=data)
@few
def test_density_one_trims_nothing(backend: str, method: str, data: Data) -> None:
    """Whatever epsilon and gamma say."""
    taus, weights = data.taus(), data.weights()
    options = {k: v for k, v in EVERY[method].items() if k not in ("density",)}
    untrimmed = mf.merge_task_vectors(
        taus, method, weights=weights, density=1.0, backend=backend, **options
    )
    voting = method.endswith("ties") or method == "della"
    plain = mf.merge_task_vectors(
        taus,
        "ties" if voting else "task_arithmetic",
        weights=weights,
        backend=backend,
        normalize=method in ("ties", "della"),
        **({"density": 1.0} if voting else {}),
    )
    assert torch.equal(untrimmed, plain)


@pytest.mark.parametrize("backend", backend_params())
@given(data=data)
@few
def test_one_expert(backend: str, data: Data) -> None:
    """Every method that trims nothing gives back the one expert."""
    tau = data.taus()[:1]
    for method in ("average", "task_arithmetic", "linear"):
        assert torch.equal(mf.merge_task_vectors(tau, method, backend=backend), tau[0])
    kept = mf.merge_task_vectors(tau, "ties", density=0.3, backend=backend)
    trimmed, mask = mf.trim(tau[0], "magnitude", 0.3)
    assert torch.equal(kept, trimmed)
    assert int(mask.sum()) == max(1, int(tau[0].numel() * 0.3))


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("backend", backend_params())
@given(data=data, names=st.permutations(["a.weight", "b.weight", "c.weight"]))
@few
def test_the_order_of_a_state_dict_does_not_matter(
    backend: str, method: str, data: Data, names: list[str]
) -> None:
    states = [
        {n: t * (i + 1) for i, n in enumerate(("a.weight", "b.weight", "c.weight"))}
        for t in data.taus()
    ]
    mixed = [{n: s[n] for n in names} for s in states]
    options = {**EVERY[method], "backend": backend}
    one = mf.merge_task_vectors(states, method, **options)
    other = mf.merge_task_vectors(mixed, method, **options)
    assert list(other) == list(names)
    assert all(torch.equal(one[n], other[n]) for n in names)


@pytest.mark.parametrize("preset", ["ties_merging", "fusion_bench"])
@pytest.mark.parametrize("backend", backend_params())
@given(data=data, density=st.floats(0.01, 0.99))
@settings(few, max_examples=3)  # counts 65 536 digits for every tensor and expert
def test_scope_model_is_one_long_tensor(
    backend: str, preset: str, data: Data, density: float
) -> None:
    """Names sorted, row-major, the flat index running through."""
    taus = data.taus()
    parts = [
        {"b.weight": t, "a.bias": t[0] * 0.5, "c.scalar": t[0, 0] * 2, "d.empty": t[:0]}
        for t in taus
    ]
    names = sorted(parts[0])
    merged = mf.merge_task_vectors(parts, "ties", preset=preset, density=density, backend=backend)
    long = [torch.cat([p[n].flatten() for n in names]) for p in parts]
    whole = mf.merge_task_vectors(long, "ties", preset=preset, density=density, backend=backend)
    assert torch.equal(torch.cat([merged[n].flatten() for n in names]), whole)


@pytest.mark.parametrize("rule", ["magnitude", "band"])
@given(data=data, density=st.floats(0.05, 0.95))
@settings(few, max_examples=3)
def test_exact_cuts_run_through_the_whole_model(rule: str, data: Data, density: float) -> None:
    """Among equals the lowest running index stays: earlier tensors first."""
    taus = replace(data, coarse=True).taus()
    k = len(taus)
    trim = Trim(TrimRule(rule), density=(density,) * k, gamma=(0.1,) * k, scope=TrimScope.MODEL)
    recipe = Recipe((1.0,) * k, trim=trim, rescale=Rescale.NONE)
    parts = [{"a": t[:1], "b": t[1:], "c": t.flatten()} for t in taus]
    jobs = [
        Job(None, [p[n] for p in parts], recipe, torch.empty_like(parts[0][n]), n)
        for n in ("c", "a", "b")  # sorted by name before anything is counted
    ]
    ops.select_model(jobs)
    ops.merge(jobs)
    long = [torch.cat([p[n].flatten() for n in ("a", "b", "c")]) for p in parts]
    whole = Job(None, long, recipe, torch.empty_like(long[0]))
    ops.merge([whole])
    by_name = {job.name: job.out for job in jobs}
    assert torch.equal(torch.cat([by_name[n].flatten() for n in "abc"]), whole.out)


@given(data=data, density=st.floats(0.01, 1.0))
@few
def test_exactly_k_stay_lowest_index_first(data: Data, density: float) -> None:
    x = data.taus()[0].flatten()
    trimmed, mask = mf.trim(x, "magnitude", density)
    k = max(1, int(x.numel() * density)) if density < 1 else x.numel()
    assert int(mask.sum()) == k
    ranked = sorted(range(x.numel()), key=lambda i: (-abs(float(x[i])), i))
    assert mask.nonzero().flatten().tolist() == sorted(ranked[:k])
    assert torch.equal(trimmed, x * mask)


@pytest.mark.parametrize("backend", backend_params())
@given(data=data)
@few
def test_coefficient_one_where_the_merge_is_the_one_expert(backend: str, data: Data) -> None:
    tau = data.taus()[0]
    out, report = mf.calibrate_weights(None, [tau], tau, backend=backend)
    xi = report.tensors[0].coefficient
    live = tau.norm(dim=1) > 0
    assert bool(((xi - 1).abs() <= 1e-6)[live].all())
    assert torch.allclose(out, tau, rtol=1e-6)


@given(data=data)
@few
def test_the_oracle_sees_a_wrong_vote(data: Data) -> None:
    """The budget is far below what one wrong decision changes: the parity tests can fail."""
    taus = [t.sign() + t for t in data.taus()]
    job = Job(None, taus, Recipe((1.0,) * len(taus)), torch.empty_like(taus[0]))
    found = truth(job)
    wrong = replace(job, experts=[-taus[0], *taus[1:]])
    changed = (truth(wrong).result - found.result).abs()
    allowed = found.budget + ulp(found.result, torch.float32)
    assert bool((changed > allowed)[taus[0] != 0].all())
