"""WSC against numbers known in closed form: rows built with exactly the Gram that they name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import magic_fast as mf
from support.backends import backend_params

K = 8
#: cosine of each pair → ξ of Δ = mean τ, eight experts of equal norm
TABLE = {
    0.00: {"manifold": 2.828, "manifold_exact": 2.828, "sphere": 2.828},
    0.05: {"manifold": 2.006, "manifold_exact": 2.828, "sphere": 2.434},
    0.10: {"manifold": 1.466, "manifold_exact": 2.828, "sphere": 2.169},
    0.20: {"manifold": 0.874, "manifold_exact": 2.828, "sphere": 1.826},
    0.50: {"manifold": 0.326, "manifold_exact": 2.828, "sphere": 1.333},
    1.00: {"manifold": 0.132, "manifold_exact": 1.000, "sphere": 1.000},  # singular: the sphere's
}
_UNGUARDED: dict[str, Any] = {"guards": False, "clamp": None, "eps_mode": "absolute"}


def equicorrelated(rho: float, rows: int = 3) -> list[Tensor]:
    """K task vectors [rows, K], unit norm, cosine ``rho`` between each two (rounded to float32)."""
    gram = (1 - rho) * torch.eye(K, dtype=torch.float64) + rho
    values, vectors = torch.linalg.eigh(gram)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    return [root[k].float().expand(rows, K).contiguous() for k in range(K)]


def orthogonal(norm2: float, cols: int = 4096) -> list[Tensor]:
    """K rows [1, cols], exactly orthogonal, every entry ±sqrt(norm2 / cols)."""
    sign = torch.ones(1, 1)
    while sign.shape[0] < K:
        sign = torch.cat([torch.cat([sign, sign], 1), torch.cat([sign, -sign], 1)])
    return [sign[k].repeat(cols // K)[None] * math.sqrt(norm2 / cols) for k in range(K)]


def mean(taus: list[Tensor]) -> Tensor:
    return torch.stack(taus).mean(0)


def coefficients(taus: list[Tensor], delta: Tensor, backend: str, **settings: Any) -> Tensor:
    """Raw ξ of every row."""
    _, report = calibrate(taus, delta, backend, **settings)
    return report.tensors[0].coefficient


def calibrate(taus: list[Tensor], delta: Tensor, backend: str = "torch", **settings: Any) -> Any:
    return mf.calibrate_weights(
        None, taus, delta, calibration=mf.WeightCalibration(**settings), backend=backend
    )


@pytest.mark.parametrize("variant", ["manifold", "manifold_exact", "sphere"])
@pytest.mark.parametrize("rho", TABLE)
@pytest.mark.parametrize("backend", backend_params())
def test_known_numbers(backend: str, rho: float, variant: str) -> None:
    taus = equicorrelated(rho)
    xi = coefficients(taus, mean(taus), backend, variant=variant)
    c = (1 + (K - 1) * rho) / K
    exact = {
        "manifold": (K * c**2 + (1 - K * c) ** 2 * c) ** -0.5,
        "manifold_exact": math.sqrt(K) if rho < 1 else 1.0,
        "sphere": c**-0.5,
    }[variant]
    assert exact == pytest.approx(TABLE[rho][variant], abs=5e-4)
    assert xi.tolist() == pytest.approx([exact] * 3, rel=2e-6)


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("backend", backend_params())
def test_known_numbers_during_a_merge(backend: str, rho: float) -> None:
    taus = equicorrelated(rho)
    base = torch.zeros(3, K)
    merged = mf.merge(base, taus, "average", calibrate="wsc", backend=backend)
    c = (1 + (K - 1) * rho) / K
    wanted = (K * c**2 + (1 - K * c) ** 2 * c) ** -0.5 * mean(taus)
    assert torch.allclose(merged, wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("variant", ["manifold", "sphere"])
@pytest.mark.parametrize("backend", backend_params())
def test_a_factor_on_the_merge_cancels(backend: str, variant: str) -> None:
    taus = equicorrelated(0.1)
    one = calibrate(taus, mean(taus), backend, variant=variant, clamp=None)[0]
    for factor in (8.0, 0.3):  # the 1e-8 in the root is 3e-7 of what is there at 0.3
        other = calibrate(taus, mean(taus) * factor, backend, variant=variant, clamp=None)[0]
        assert torch.allclose(one, other, rtol=2e-6)


@pytest.mark.parametrize("backend", backend_params())
def test_absolute_eps_reads_too_much_on_small_weights(backend: str) -> None:
    """4096 columns of deviation 1e-6: ‖τ‖² = 4e-9 is below the authors' 1e-8."""
    taus = orthogonal(4096 * 1e-12)
    absolute = coefficients(taus, mean(taus), backend, eps_mode="absolute")
    assert absolute.item() == pytest.approx(5.9, abs=0.05)
    relative = coefficients(taus, mean(taus), backend, eps_mode="relative")
    assert relative.item() == pytest.approx(2.828, abs=5e-4)


@pytest.mark.parametrize("eps_mode", ["relative", "none"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("backend", backend_params())
def test_relative_eps_is_free_of_scale(backend: str, scale: float, eps_mode: str) -> None:
    taus = orthogonal(4096 * scale**2)
    xi = coefficients(taus, mean(taus), backend, eps_mode=eps_mode)
    assert xi.item() == pytest.approx(math.sqrt(8), rel=1e-6)


@pytest.mark.parametrize("backend", backend_params())
def test_one_expert_gives_back_its_task_vector(backend: str) -> None:
    tau = torch.tensor([[3.0, -4.0], [0.5, 0.25]])
    for factor in (0.2, 1.0, 5.0):
        out, _ = calibrate([tau], factor * tau, backend)
        assert torch.allclose(out, tau, rtol=1e-6)


@pytest.mark.parametrize("variant", ["manifold", "manifold_exact", "sphere", "spectral"])
def test_one_where_the_merge_is_the_one_expert(variant: str) -> None:
    tau = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    xi = coefficients([tau], tau, "torch", variant=variant)
    assert xi.tolist() == pytest.approx([1.0] * 5, abs=1e-6)


def _with_zero_rows() -> tuple[list[Tensor], Tensor]:
    """Row 0: experts and merge zero; row 1: the merge zero; row 2: as any."""
    taus = equicorrelated(0.0)
    for t in taus:
        t[0] = 0
    delta = mean(taus)
    delta[1] = 0
    return taus, delta


@pytest.mark.parametrize("backend", backend_params())
def test_guards_leave_rows_without_direction_alone(backend: str) -> None:
    taus, delta = _with_zero_rows()
    out, report = calibrate(taus, delta, backend)
    assert report.tensors[0].repaired == 2
    assert out[:2].tolist() == [[0.0] * K] * 2
    assert torch.allclose(out[2], math.sqrt(8) * delta[2], rtol=1e-6)


@pytest.mark.parametrize("backend", backend_params())
def test_absolute_parity_reads_ten_thousand_on_a_zero_row(backend: str) -> None:
    taus, delta = _with_zero_rows()
    xi = coefficients(taus, delta, backend, **_UNGUARDED)
    assert xi[:2].tolist() == pytest.approx([1e4, 1e4], rel=1e-6)


def test_without_guards_a_list_repairs_nan_and_none_does_not() -> None:
    """The authors' order: without a list the product precedes the repair, and Inf stays."""
    tau = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    delta = torch.zeros(2, 2)
    settings: dict[str, Any] = {"variant": "sphere", "guards": False, "clamp": None}
    calibration = mf.WeightCalibration(**settings)
    raw, report = mf.calibrate_weights(
        None, [tau], delta, calibration=calibration, nonfinite="propagate"
    )
    xi = report.tensors[0].coefficient
    assert math.isnan(xi[0]) and xi[1] == math.inf
    assert bool(torch.isnan(raw).all())
    listed = mf.WeightCalibration(**settings, sensitive=())
    repaired, _ = mf.calibrate_weights(
        None, [tau], delta, calibration=listed, nonfinite="propagate"
    )
    assert repaired[0].tolist() == [0.0, 0.0]
    assert bool(torch.isnan(repaired[1]).all())


@pytest.mark.parametrize("backend", backend_params())
def test_clamp_holds_what_noise_would_blow_up(backend: str) -> None:
    """Antiparallel experts: Δ is nothing but a remainder, and raw ξ is beyond reason."""
    tau = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    delta = tau * 1e-4
    out, report = calibrate([tau, -tau], delta, backend)
    assert report.tensors[0].coefficient.min() > 1000
    assert torch.allclose(out, 10 * delta, rtol=1e-6)
    small, _ = calibrate([tau, tau], 100 * tau, backend, variant="sphere")
    assert torch.allclose(small, 0.1 * 100 * tau, rtol=1e-6)


@pytest.mark.parametrize(("strength", "power"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (2.0, 2.0)])
@pytest.mark.parametrize("backend", backend_params())
def test_strength_is_an_exponent_and_comes_before_the_clamp(
    backend: str, strength: float, power: float
) -> None:
    taus = equicorrelated(0.0)
    out, _ = calibrate(taus, mean(taus), backend, strength=strength, clamp=(0.1, 5.0))
    assert torch.allclose(out, min(math.sqrt(8) ** power, 5.0) * mean(taus), rtol=1e-5)


@pytest.mark.parametrize("backend", backend_params())
def test_scale_acts_where_the_coefficient_does(backend: str) -> None:
    taus = torch.stack(equicorrelated(0.0))
    delta = mean(list(taus)) * torch.tensor([[1.0], [1.0], [10.0]])  # row 2 would shrink
    out, _ = calibrate(list(taus), delta, backend, scale=0.5, direction="grow")
    assert torch.allclose(out[:2], 0.5 * math.sqrt(8) * delta[:2], rtol=1e-6)
    assert torch.equal(out[2], delta[2])


@pytest.mark.parametrize(
    ("direction", "acts"), [("free", (1, 1)), ("grow", (1, 0)), ("shrink", (0, 1))]
)
@pytest.mark.parametrize("backend", backend_params())
def test_direction_row_by_row(backend: str, direction: str, acts: tuple[int, int]) -> None:
    taus = equicorrelated(0.0, rows=2)
    delta = mean(taus) * torch.tensor([[1.0], [5.0]])  # ξ: 2.83 and 0.57
    xi = (math.sqrt(8), math.sqrt(8) / 5)
    out, _ = calibrate(taus, delta, backend, direction=direction)
    for row in range(2):
        wanted = (xi[row] if acts[row] else 1.0) * delta[row]
        assert torch.allclose(out[row], wanted, rtol=1e-6)


def test_sensitive_tensors_only_shrink_and_all_others_only_grow() -> None:
    taus = [{n: t for n in ("a.weight", "b.weight")} for t in equicorrelated(0.0, rows=2)]
    delta = mean(equicorrelated(0.0, rows=2)) * torch.tensor([[1.0], [5.0]])
    merged = {"a.weight": delta, "b.weight": delta}

    def rows_that_act(sensitive: tuple[str, ...] | None) -> dict[str, list[bool]]:
        out, _ = calibrate(taus, merged, sensitive=sensitive)  # type: ignore[arg-type]
        return {n: [not torch.equal(out[n][r], delta[r]) for r in range(2)] for n in merged}

    both, grow, shrink = [True, True], [True, False], [False, True]
    assert rows_that_act(None) == {"a.weight": both, "b.weight": both}
    assert rows_that_act(()) == {"a.weight": grow, "b.weight": grow}  # an empty list is a list
    assert rows_that_act(("a.weight",)) == {"a.weight": shrink, "b.weight": grow}


def test_experts_of_weight_zero_do_not_count() -> None:
    taus = equicorrelated(0.2)
    weights = [1.0] * (K - 1) + [0.0]
    delta = mean(taus[:-1])
    one, _ = mf.calibrate_weights(None, taus, delta, weights=weights)
    other, _ = mf.calibrate_weights(None, taus[:-1], delta)
    assert torch.equal(one, other)
    merged = mf.merge(torch.zeros(3, K), taus, "task_arithmetic",
                      weights=weights, calibrate="wsc")  # fmt: skip
    alone = mf.merge(torch.zeros(3, K), taus[:-1], "task_arithmetic", calibrate="wsc")
    assert torch.allclose(merged, alone, rtol=1e-6)


def test_the_row_axis_is_the_axis_of_output_units() -> None:
    taus = equicorrelated(0.1)
    rows, _ = calibrate(taus, mean(taus))
    columns, _ = mf.calibrate_weights(
        None, [t.T.contiguous() for t in taus], mean(taus).T.contiguous(), row_axis=1
    )
    assert torch.allclose(columns.T, rows, rtol=1e-6)


def test_per_tensor_takes_the_whole_tensor_as_one_row() -> None:
    taus = [torch.randn(4, 6, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    whole, report = calibrate(taus, mean(taus), granularity="tensor")
    flat, _ = calibrate([t.reshape(1, -1) for t in taus], mean(taus).reshape(1, -1))
    assert torch.allclose(whole.reshape(1, -1), flat, rtol=1e-6)
    xi = report.tensors[0].coefficient
    assert xi.shape == (4,) and len(set(xi.tolist())) == 1


@pytest.mark.parametrize(
    ("name", "shape", "general", "magic"),
    [
        ("model.layers.0.mlp.up_proj.weight", (4, 6), True, True),
        ("model.layers.0.mlp.up_proj.bias", (4,), False, False),
        ("model.embed_tokens.weight", (4, 6), False, True),
        ("transformer.wte.weight", (4, 6), False, True),
        ("lm_head.weight", (4, 6), False, True),
        ("model.norm.weight", (4,), False, False),
        ("visual.ln_post.weight", (4, 6), True, False),
        ("visual.adaln_proj.weight", (4, 6), True, False),
        ("visual.conv1.weight", (6, 3, 2, 2), True, True),
        ("visual.conv2.bias", (6,), False, True),
        ("visual.downsample.0.weight", (4, 2, 2, 2), True, False),
        ("attn.in_proj_weight", (6, 2), True, True),
        ("", (4, 6), True, False),
        ("", (4,), False, False),
    ],
)
def test_which_tensors(name: str, shape: tuple[int, ...], general: bool, magic: bool) -> None:
    assert mf.WeightCalibration().selects(name, shape) is general
    assert mf.WeightCalibration(tensors="magic").selects(name, shape) is magic
