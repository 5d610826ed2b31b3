"""Rules for the edges: empty and 0-d tensors, integer buffers, zero experts, what comes back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import magic_fast as mf
from support.backends import backend_params

METHODS: dict[str, dict[str, Any]] = {
    "average": {},
    "task_arithmetic": {},
    "ties": {},
    "dare_ties": {"seed": 1},
    "della": {"seed": 1},
    "breadcrumbs": {},
}


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", backend_params())
def test_empty_tensors(backend: str, method: str, shape: tuple[int, ...]) -> None:
    base = torch.zeros(shape, dtype=torch.bfloat16)
    merged = mf.merge(
        base, [base, base], method, calibrate="wsc", backend=backend, **METHODS[method]
    )
    assert merged.shape == base.shape and merged.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", backend_params())
def test_scalars(backend: str) -> None:
    base = torch.tensor(1.0)
    experts = [torch.tensor(2.0), torch.tensor(5.0)]
    for method, wanted in (("average", 3.5), ("task_arithmetic", 6.0), ("ties", 3.5)):
        merged = mf.merge(base, experts, method, calibrate="wsc", backend=backend)
        assert merged.shape == () and merged.item() == wanted


def test_integer_tensors_are_copied() -> None:
    ids = torch.arange(4)
    states = [{"w": torch.ones(2), "ids": ids.clone(), "flag": torch.tensor([True])}] * 2
    merged = mf.merge(states[0], states, "average")
    assert torch.equal(merged["ids"], ids) and merged["ids"].dtype == torch.int64
    assert merged["flag"].dtype == torch.bool
    assert merged["ids"].data_ptr() != states[0]["ids"].data_ptr()


@pytest.mark.parametrize("backend", backend_params())
def test_zero_experts_and_zero_votes(backend: str) -> None:
    zero, tau = torch.zeros(4), torch.tensor([1.0, -2.0, 0.0, 3.0])
    options = {"density": 1.0, "backend": backend}
    assert mf.merge_task_vectors([zero, zero], "ties", **options).tolist() == [0.0] * 4
    assert mf.merge_task_vectors([zero, tau], "ties", **options).tolist() == tau.tolist()
    # +τ and −τ: a vote of zero elects + by default, the original code keeps the negatives where
    # the whole tensor votes zero too
    assert mf.merge_task_vectors([tau, -tau], "ties", **options).tolist() == [1, 2, 0, 3]
    magic = mf.merge_task_vectors([tau, -tau], "ties", preset="magic", **options)
    assert magic.tolist() == [-1, -2, 0, -3]


@pytest.mark.parametrize("backend", backend_params())
def test_ties_at_the_threshold(backend: str) -> None:
    x = torch.tensor([[1.0, -1.0, 1.0, 1.0, 2.0]])
    keep = {
        "default": [1, 0, 0, 0, 2],  # exactly ⌊0.4·5⌋ = 2, lowest index first
        "mergekit": [1, 0, 0, 0, 2],
        "peft": [1, 0, 0, 0, 2],
        "magic": [1, -1, 1, 1, 2],  # everything at the threshold
    }
    for preset, wanted in keep.items():
        merged = mf.merge_task_vectors(x, "ties", density=0.4, preset=preset, backend=backend)
        assert merged.tolist() == wanted, preset


def test_counts_of_the_three_rules() -> None:
    """n = 231, q = 0.2: ⌊q·n⌋ = 46."""
    x = torch.randperm(231, generator=torch.Generator().manual_seed(0)).float() + 1
    for rule, kept in (
        ("magnitude", 46),
        ("magnitude_plus_one", 47),
        ("magnitude_complement", 48),
        ("magnitude_drop", 231 - 184),
    ):
        assert int(mf.trim(x, rule, 0.2)[1].sum()) == kept, rule


def test_peft_may_keep_nothing_and_we_keep_one() -> None:
    x = torch.tensor([[1.0, 3.0, 2.0]])
    assert mf.merge_task_vectors(x, "ties", density=0.2).tolist() == [0, 3, 0]
    peft = mf.merge_task_vectors(x, "ties", density=0.2, preset="peft")
    assert peft.tolist() == [0, 0, 0]


def test_same_kind_in_same_kind_out() -> None:
    base, tau = torch.zeros(2, 3), torch.ones(2, 3)
    assert isinstance(mf.merge(base, torch.stack([tau, tau]), "average"), torch.Tensor)
    state = {"b": base, "a": base}
    merged = mf.merge(state, [{"a": tau, "b": tau}], "average")
    assert list(merged) == ["b", "a"]
    module = torch.nn.Linear(3, 2)
    assert isinstance(mf.merge(module, [torch.nn.Linear(3, 2)], "average"), torch.nn.Linear)


def test_result_has_the_dtype_of_the_base_or_of_out() -> None:
    base = torch.zeros(3, dtype=torch.bfloat16)
    experts = [torch.ones(3), torch.ones(3, dtype=torch.float16)]
    assert mf.merge(base, experts, "average").dtype == torch.bfloat16
    assert mf.merge_task_vectors(experts, "average").dtype == torch.float32
    out = torch.empty(3, dtype=torch.float64)
    assert mf.merge(base, experts, "average", out=out) is out
    double = [torch.tensor([1.0 + 2.0**-40], dtype=torch.float64)]
    assert mf.merge_task_vectors(double, "average").item() == 1.0 + 2.0**-40


@pytest.mark.parametrize("backend", backend_params())
def test_rounded_once_to_nearest_even(backend: str) -> None:
    """1 + 2⁻⁹ lies halfway between two bfloat16 numbers below 1 + 2⁻⁷, and goes to the even one."""
    base = torch.ones(3, dtype=torch.bfloat16)
    taus = torch.tensor([2.0**-8, 3 * 2.0**-8, 2.0**-8 + 2.0**-20])
    merged = mf.merge(base, [1 + taus], "average", backend=backend)
    assert merged.tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-7]


def test_details_show_the_decisions() -> None:
    x = torch.tensor([[3.0, 0.5, -1.0], [1.0, -2.0, -3.0]])
    found = mf.merge_task_vectors(x, "ties", density=0.7, details=True)
    assert [m.tolist() for m in found.keep_masks] == [[True, False, True], [False, True, True]]
    assert found.thresholds == (1.0, 2.0)
    assert found.elected_sign.tolist() == [1, -1, -1]
    assert found.merged.tolist() == [3.0, -2.0, -2.0]
    assert torch.equal(found.merged, mf.merge_task_vectors(x, "ties", density=0.7))


def test_infinite_rows_are_left_alone_when_they_are_let_through() -> None:
    base = torch.zeros(2, 2)
    expert = torch.tensor([[1.0, 2.0], [math.inf, 1.0]])
    merged = mf.merge(base, [expert, expert], "average", calibrate="wsc", nonfinite="propagate")
    assert merged[0].tolist() == pytest.approx([3**-0.5, 2 * 3**-0.5], rel=1e-6)  # c = 1, K = 2
    assert merged[1].tolist() == [math.inf, 1.0]


@pytest.mark.parametrize("variant", ["manifold", "manifold_exact", "sphere", "spectral"])
def test_a_nan_is_an_error_of_the_input_under_every_calibration(variant: str) -> None:
    base, expert = torch.zeros(3, 4), torch.ones(3, 4)
    broken = expert.clone()
    broken[1, 1] = math.nan
    calibration = mf.WeightCalibration(variant=variant)  # type: ignore[arg-type]
    with pytest.raises(mf.NonFiniteError, match="NaN or infinity in expert 1"):
        mf.merge(base, [expert, broken], "average", calibrate=calibration)
    with pytest.raises(mf.NonFiniteError, match="NaN or infinity in expert 1"):
        mf.calibrate_weights(base, [expert, broken], expert, calibration=calibration)
