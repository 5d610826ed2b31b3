"""iso_c, iso_cts, tsv_m, star, svc and lines through the public calls, against formulas written out
here with the singular value decomposition of float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf
from magic_fast.reference.spectral import iso_cts_ranks, thin_svd
from spectral.spectra import distance, geometric, matrix

METHODS = ("iso_c", "iso_cts", "tsv_m", "star")


def svd_polar(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u * (s > 1e-10 * s.max())) @ vh


def top(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u[:, :count], s[:count], vh[:count]


def by_hand(method: str, taus: list[Tensor]) -> Tensor:
    """Δ in float64."""
    taus = [t.double() for t in taus]
    k, n, m = len(taus), min(taus[0].shape), torch.stack(taus).sum(0)
    if method == "iso_c":
        return svd_polar(m) * torch.linalg.svdvals(m).mean()
    if method == "star":
        reduced = []
        for tau in taus:
            u, s, vh = torch.linalg.svd(tau, full_matrices=False)
            r = int((s.cumsum(0) < 0.4 * s.sum()).sum()) + 1
            reduced.append((u[:, :r] * s[:r]) @ vh[:r] * s.sum() / s[:r].sum())
        return torch.stack(reduced).mean(0)
    if method == "tsv_m":
        parts = [top(t, n // k) for t in taus]
    else:
        c, own = iso_cts_ranks(taus[0].shape, k, 0.8)
        uc = top(m, c)[0]
        parts = [top(t - uc @ uc.T @ t, own) for t in taus] + [top(m, c)]
    u = svd_polar(torch.cat([p[0] for p in parts], 1))
    s = torch.cat([p[1] for p in parts])
    vh = svd_polar(torch.cat([p[2] for p in parts], 0))
    return (u * (s if method == "tsv_m" else s.mean().expand_as(s))) @ vh


def decaying(shape: tuple[int, int], k: int) -> list[Tensor]:
    return [matrix(shape, geometric(min(shape), 300), seed=i) * 0.3 for i in range(k)]


@pytest.mark.parametrize("svd", ["auto", "exact"])
@pytest.mark.parametrize("num_experts", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 8), (30, 12), (96, 160), (160, 96)], ids=str)
@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m"])
def test_against_the_formula(
    method: str, shape: tuple[int, int], num_experts: int, svd: str
) -> None:
    taus = decaying(shape, num_experts)
    got = mf.merge_task_vectors(taus, method, svd=svd)
    if method == "tsv_m" and min(shape) < num_experts:
        want = torch.stack(taus).mean(0)
    else:
        want = by_hand(method, taus)
    assert distance(got, want) <= (1e-3 if svd == "auto" else 1e-6)


@pytest.mark.parametrize("shape", [(1, 8), (30, 12), (40, 60)], ids=str)
def test_star_against_the_formula(shape: tuple[int, int]) -> None:
    taus = decaying(shape, 3)
    assert distance(mf.merge_task_vectors(taus, "star"), by_hand("star", taus)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_low_precision_inputs(method: str, dtype: torch.dtype) -> None:
    """One rounding, of the result: the decompositions see float32."""
    base = matrix((40, 60), geometric(40, 10)).to(dtype)
    experts = [(base.float() + t).to(dtype) for t in decaying((40, 60), 3)]
    taus = [e.float() - base.float() for e in experts]
    merged = mf.merge(base, experts, method)
    assert merged.dtype == dtype
    want = base.double() + by_hand(method, taus)
    ulp = torch.finfo(dtype).eps * want.abs().max()
    assert float((merged.double() - want).abs().max()) <= 1e-3 * want.abs().max() + ulp


@pytest.mark.parametrize("method", METHODS)
def test_other_tensors_get_the_mean(method: str) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"norm": (7,), "scalar": (), "conv": (3, 4, 2, 2), "empty": (0, 4),
              "visual.text_projection": (6, 6)}  # fmt: skip
    taus = [{n: torch.randn(s, generator=g) for n, s in shapes.items()} for _ in range(3)]
    merged = mf.merge_task_vectors(taus, method, scale=2.0)
    for name in shapes:
        if name == "visual.text_projection" and method == "star":
            continue  # star has no such rule
        mean = torch.stack([t[name].double() for t in taus]).mean(0)
        assert torch.allclose(merged[name].double(), 2 * mean, rtol=1e-6, atol=1e-6)


def test_preset_magic_keeps_embeddings_out_of_tsv_m() -> None:
    names = ("token_embedding.weight", "positional_embedding", "bert.embeddings.w", "fc.weight")
    taus = [dict.fromkeys(names, t) for t in decaying((12, 20), 2)]
    mean = (taus[0]["fc.weight"] + taus[1]["fc.weight"]) / 2
    ours = mf.merge_task_vectors(taus, "tsv_m")
    magic = mf.merge_task_vectors(taus, "tsv_m", preset="magic")
    for name in names:
        assert torch.allclose(magic[name], mean) == (name != "fc.weight")
        assert not torch.allclose(ours[name], mean)


def test_tensors_chooses_by_name() -> None:
    taus = [{"a.w": t, "b.w": t, "text_projection": t} for t in decaying((12, 20), 2)]
    mean = (taus[0]["a.w"] + taus[1]["a.w"]) / 2
    merged = mf.merge_task_vectors(taus, "iso_c", tensors=r"^b\.|text_projection")
    assert torch.allclose(merged["a.w"], mean)
    assert not torch.allclose(merged["b.w"], mean)
    assert torch.equal(merged["b.w"], merged["text_projection"])
    with pytest.raises(mf.InputError, match="expected a regular expression for tensor names"):
        mf.merge_task_vectors(taus, "iso_c", tensors="(")


@pytest.mark.parametrize("method", METHODS)
def test_all_zero(method: str) -> None:
    merged = mf.merge_task_vectors([torch.zeros(20, 30)] * 3, method)
    assert not merged.any()


@pytest.mark.parametrize("method", ["iso_cts", "tsv_m"])
def test_a_zero_expert_adds_nothing(method: str) -> None:
    """Its singular vectors are arbitrary, so they must not move those of the others."""
    (tau,) = decaying((24, 36), 1)
    merged = mf.merge_task_vectors([tau, torch.zeros_like(tau)], method)
    assert bool(torch.isfinite(merged).all())
    if method == "tsv_m":
        u, s, vh = top(tau.double(), 12)
        assert distance(merged, (u * s) @ vh) <= 1e-4


def test_identical_experts_of_tsv_m() -> None:
    """polar([U U]) = [U U]/√2: the truncated task vector itself."""
    (tau,) = decaying((24, 36), 1)
    merged = mf.merge_task_vectors([tau, tau], "tsv_m")
    u, s, vh = top(tau.double(), 12)
    assert distance(merged, (u * s) @ vh) <= 1e-4


@pytest.mark.parametrize(
    ("shape", "num_experts", "ranks"),
    [((768, 768), 8, (616, 19)), ((768, 3072), 8, (616, 19)), ((7, 33), 8, (7, 0)),
     ((7, 33), 1, (5, 2)), ((16, 16), 3, (13, 1))],
)  # fmt: skip
def test_iso_cts_ranks(shape: tuple[int, int], num_experts: int, ranks: tuple[int, int]) -> None:
    assert iso_cts_ranks(shape, num_experts, 0.8) == ranks


@pytest.mark.parametrize("method", METHODS)
def test_calibration_follows(method: str) -> None:
    base = matrix((40, 60), geometric(40, 10))
    experts = [base + t for t in decaying((40, 60), 3)]
    at_once = mf.merge(base, experts, method, calibrate="wsc")
    after, _ = mf.calibrate_weights(base, experts, mf.merge(base, experts, method))
    assert distance(at_once - base, after - base) <= 1e-5
    assert distance(at_once, mf.merge(base, experts, method)) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_bad_numbers(method: str) -> None:
    taus = decaying((70, 80), 2)
    taus[1][3, 4] = math.nan
    with pytest.raises(mf.NonFiniteError, match=r"expert 1 .* flat index 244"):
        mf.merge_task_vectors(taus, method)
    assert bool(mf.merge_task_vectors(taus, method, nonfinite="propagate").isnan().all())


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_iso_cts_at_the_ends(fraction: float) -> None:
    taus = decaying((24, 36), 3)
    merged = mf.merge_task_vectors(taus, "iso_cts", common_space_fraction=fraction)
    if fraction == 1.0:  # nothing but the common space: Iso-C
        assert distance(merged, by_hand("iso_c", taus)) <= 1e-4
    assert bool(torch.isfinite(merged).all())


def test_svc_against_the_formula() -> None:
    taus = decaying((14, 20), 3)
    delta = torch.stack(taus).sum(0)
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    want = torch.zeros_like(delta, dtype=torch.float64)
    for r in range(14):
        factor = 0.0
        for tau in taus:
            a = u[:, r] @ tau.double()
            factor += max(0.1, float(s[r] * (vh[r] @ a) / (a @ a)))
        want += s[r] * 3 / factor * torch.outer(u[:, r], vh[r])
    assert distance(mf.svc(None, taus, delta), want) <= 1e-6
    base = torch.full((14, 20), 0.5)
    shifted = mf.svc(base, [base + t for t in taus], base + delta)
    assert distance(shifted - base, want) <= 1e-5


def test_svc_copies_what_is_no_matrix() -> None:
    merged = {"norm": torch.tensor([1.0, 3.0]), "ids": torch.tensor([1, 2])}
    experts = [{"norm": torch.tensor([2.0, 3.0]), "ids": torch.tensor([1, 2])}]
    found = mf.svc(None, experts, merged)
    assert torch.equal(found["norm"], merged["norm"]) and torch.equal(found["ids"], merged["ids"])
    with pytest.raises(mf.InputError, match=r"alpha for svc: expected a finite number > 0, got 0"):
        mf.svc(None, experts, merged, alpha=0)
    with pytest.raises(mf.NonFiniteError, match="'w'"):
        mf.svc(None, [{"w": torch.full((2, 2), math.inf)}], {"w": torch.ones(2, 2)})


def test_a_decomposition_that_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    x = matrix((12, 20), geometric(12, 10))
    plain = torch.linalg.svd

    def stubborn(a: Tensor, **options: Any) -> Any:
        if a.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")
        return plain(a, **options)

    monkeypatch.setattr(torch.linalg, "svd", stubborn)
    u, s, vh = thin_svd(x)
    assert (u.dtype, u.shape, s.shape, vh.shape) == (x.dtype, (12, 12), (12,), (12, 20))
    assert distance((u * s) @ vh, x) <= 1e-6


def test_lines_scales_by_depth() -> None:
    names = {"embed.w": 1.0, "h.0.w": 1.0, "h.1.w": 1.5, "h.2.w": 2.0, "h.3.w": 1.0}
    merged = {n: torch.ones(2) for n in names}
    found = mf.lines(None, [merged], merged, alpha=1.0, beta=1.0, num_blocks=3)
    assert {n: float(t[0]) for n, t in found.items()} == names  # block 3 is outside


def test_lines_finds_its_first_factor() -> None:
    experts = [{"h.0.w": torch.tensor([1.0, -2.0])}, {"h.0.w": torch.tensor([2.0, -1.0])}]
    merged = {"h.0.w": torch.tensor([0.5, -1.0])}
    # ‖Σ τ‖₁ = 6, ‖Δ‖₁ = 1.5, K = 2: alpha = 2
    found = mf.lines(None, experts, merged, beta=5.0, num_blocks=1)
    assert found["h.0.w"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    ("params", "message"),
    [({"num_blocks": 0, "beta": 1.0}, "num_blocks for lines: expected a whole number >= 1, got 0"),
     ({"num_blocks": 2, "beta": math.nan}, "beta for lines: expected a finite number, got nan"),
     ({"num_blocks": 2, "beta": 1.0, "alpha": math.inf}, "alpha for lines: expected a finite")],
)  # fmt: skip
def test_lines_refuses(params: dict[str, Any], message: str) -> None:
    with pytest.raises(mf.InputError, match=message):
        mf.lines(None, [torch.ones(2)], torch.ones(2), **params)


@pytest.mark.parametrize("method", METHODS)
def test_from_a_configuration(method: str, tmp_path: Path) -> None:
    """YAML to folder, calibrated: the same values as the call on tensors."""
    models: dict[str, dict[str, Tensor]] = {}
    for i, name in enumerate(("base", "a", "b")):
        weight = matrix((16, 24), geometric(16, 5), seed=i)
        models[name] = {"layers.0.w.weight": weight, "norm.weight": weight[0].clone()}
        (tmp_path / name).mkdir()
        save_file(models[name], tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    config = f"""
merge_method: {method}
base_model: {tmp_path / "base"}
models: [{{model: {tmp_path / "a"}}}, {{model: {tmp_path / "b"}}}]
parameters: {{lambda: 0.7}}
dtype: float32
calibrate: wsc
"""
    mf.merge_checkpoints(config, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    want = mf.merge(models["base"], [models["a"], models["b"]], method, scale=0.7, calibrate="wsc")
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert torch.allclose(got[name], tensor, rtol=1e-5, atol=1e-6), name
