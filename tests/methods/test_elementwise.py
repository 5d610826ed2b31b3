"""SCE, RAM, NearSwap, Arcee Fusion and PCB against their definitions, written out with loops and
sorts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import magic_fast as mf
from magic_fast.reference import fusion

SHAPES = [(7, 33), (65,), (6, 3, 3, 3), (1,), ()]


def vectors(shape: tuple[int, ...], k: int, seed: int = 0) -> list[Tensor]:
    """Multiples of 1/64, a third of them 0: many ties, and sums that float32 holds exactly."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(-40, 41, shape, generator=g) * (torch.rand(shape, generator=g) < 0.67)) / 64
        for _ in range(k)
    ]


def close(got: Tensor, want: Tensor, scale: float = 1.0) -> None:
    assert got.shape == want.shape
    limit = 2e-6 * max(scale, float(want.abs().max()) if want.numel() else scale)
    assert bool(((got.double() - want).abs() <= limit).all())


def sce_loop(taus: Sequence[Tensor], topk: float) -> Tensor:
    x = torch.stack([t.flatten() for t in taus]).double()
    if topk < 1:
        variance = ((x - x.mean(0)) ** 2).mean(0).float()
        count = int(int((variance != 0).sum()) * topk)
        order = sorted(range(x.shape[1]), key=lambda i: (-float(variance[i]), i))
        mask = torch.zeros(x.shape[1], dtype=torch.float64)
        mask[order[:count]] = 1
        x = x * mask
    omega = (x**2).mean(1)
    omega = omega / omega.sum() if omega.sum() > 0 else torch.full_like(omega, 1 / len(taus))
    out = torch.zeros(x.shape[1], dtype=torch.float64)
    for i in range(x.shape[1]):
        sign = 1 if float(x[:, i].sum()) >= 0 else -1
        agree = [k for k in range(len(taus)) if float(x[k, i]) * sign > 0]
        if agree:
            share = sum(float(omega[k]) for k in agree)
            out[i] = sum(float(omega[k] * x[k, i]) for k in agree) / share
    return out.reshape(taus[0].shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 4])  # sums over 1, 2 or 4 are exact: equal variances tie
@pytest.mark.parametrize("topk", [1.0, 0.5, 0.1])
def test_sce(shape: tuple[int, ...], k: int, topk: float) -> None:
    taus = vectors(shape, k)
    close(mf.merge_task_vectors(taus, "sce", select_topk=topk), sce_loop(taus, topk))


def test_sce_corners() -> None:
    base, one = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.0])
    assert torch.equal(mf.merge(base, [base, base], "sce"), base)
    assert torch.equal(mf.merge(base, [one], "sce"), one)  # K = 1, nothing selected away
    assert torch.equal(mf.merge(base, [one], "sce", select_topk=0.5), base)  # no variance: k = 0
    zero = torch.zeros(2)
    assert torch.equal(mf.merge_task_vectors([zero, one], "sce"), one)
    # equal variances: the lowest index stays
    a = torch.tensor([1.0, 1.0, 1.0, 1.0])
    got = mf.merge_task_vectors([a, torch.zeros(4)], "sce", select_topk=0.5)
    assert torch.equal(got, torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_sce_of_small_task_vectors() -> None:
    """By default a common factor changes nothing; mergekit weighs equally below 1e-6."""
    taus = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    small = [t * 2**-20 for t in taus]
    got = mf.merge_task_vectors(small, "sce")
    assert torch.equal(got, mf.merge_task_vectors(taus, "sce") * 2**-20)
    equal = mf.merge_task_vectors(small, "sce", preset="mergekit")
    assert torch.equal(equal, torch.tensor([2.0, 3.0]) * 2**-20)


def test_ram() -> None:
    taus = [torch.tensor([1.0, 0.5, 0.0, 0.001]), torch.tensor([3.0, 0.0, 0.0, 0.0])]
    got = mf.merge_task_vectors(taus, "ram", epsilon=0.01)
    assert torch.equal(got, torch.tensor([2.0, 0.5, 0.0, 0.0]))
    base = torch.ones(4)
    assert torch.equal(mf.merge(base, [base] * 3, "ram"), base)
    # |δ| > ε, strictly
    at = torch.tensor([0.25, 0.5])
    assert torch.equal(mf.merge_task_vectors([at], "ram", epsilon=0.25), torch.tensor([0.0, 0.5]))


def test_ramplus() -> None:
    """Expert 0 moves 4 elements, one of them shared: 1 + 0.5·(1/3) on its own three; expert 1 moves
    one alone and one shared: ratio 1, held at alpha."""
    taus = [
        torch.tensor([3.0, 3.0, 3.0, 2.0, 0.0, 0.0]),
        torch.tensor([0.0, 0.0, 0.0, 4.0, 5.0, 0.0]),
    ]
    got = mf.merge_task_vectors(taus, "ramplus_tl", r=0.5, alpha=0.8)
    want = torch.tensor([3.5, 3.5, 3.5, 3.0, 7.0, 0.0], dtype=torch.float64)
    close(got, want)
    plain = mf.merge_task_vectors(taus, "ramplus_tl", r=0.0)
    assert torch.equal(plain, mf.merge_task_vectors(taus, "ram"))


def test_nearswap() -> None:
    a = torch.tensor([0.0, 0.0, 1.0, 1.0])
    b = torch.tensor([0.25, 2.0, 1.0, -3.0])
    got = mf.merge(a, [b], "nearswap", t=0.5)
    assert torch.equal(got, torch.tensor([0.25, 0.5, 1.0, 0.5]))
    assert torch.equal(mf.merge(a, [b], "nearswap", t=0.0), a)
    with pytest.raises(mf.InputError, match="'nearswap': expected one beside the base, got 2"):
        mf.merge(a, [b, b], "nearswap", t=0.5)
    with pytest.raises(mf.InputError, match="parameter 't' for method 'nearswap'"):
        mf.merge(a, [b], "nearswap")


def fusion_loop(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    if a.dim() == 0:
        return b  # no divergence: importance 0 everywhere, which reaches its own quantiles
    rows_a, rows_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, a.shape[-1])
    scores = torch.empty_like(rows_a)
    for r in range(len(rows_a)):
        p = torch.exp(rows_b[r]) / torch.exp(rows_b[r]).sum() + 1e-8
        q = torch.exp(rows_a[r]) / torch.exp(rows_a[r]).sum() + 1e-8
        scores[r] = (rows_b[r] - rows_a[r]).abs() * (p * torch.log(p / q)).sum()
    ordered = sorted(scores.flatten().tolist())
    q1, q2, q3 = (ordered[int(u * (len(ordered) - 1))] for u in (0.25, 0.5, 0.75))
    keep = scores >= q2 + 1.5 * (q3 - q1)
    return torch.where(keep, rows_b, rows_a).reshape(a.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_arcee_fusion(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    got = mf.merge(a, [b], "arcee_fusion")
    assert torch.equal(got, fusion_loop(a, b).float())


@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_arcee_fusion_finds_its_quantiles_anywhere(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Natively and in PyTorch; near each other, divergences round to just below 0 as well."""
    g = torch.Generator().manual_seed(4)
    a = torch.randn(64, 300, generator=g)
    b = a + spread * torch.randn(64, 300, generator=g)
    found = mf.merge(a, [b], "arcee_fusion")
    assert 0.5 < float((found == a).float().mean()) < 1
    monkeypatch.setenv("MAGIC_FAST_BACKEND", "torch")
    assert torch.equal(mf.merge(a, [b], "arcee_fusion"), found)


@pytest.mark.parametrize("shape", [(9, 31), (2, 5, 31), (1, 31), (3, 1)])
@pytest.mark.parametrize("piece", [1, 62, 100])
def test_arcee_fusion_in_pieces(
    piece: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any size they give the bits that the whole tensor gives, inputs of two dtypes."""
    g = torch.Generator().manual_seed(5)
    a, b = torch.randn(shape, generator=g).bfloat16(), torch.randn(shape, generator=g).half()
    whole = fusion.importance(a.float(), b.float())
    monkeypatch.setattr(fusion, "_PIECE", piece)
    seen: list[int] = []
    real = fusion.importance
    monkeypatch.setattr(fusion, "importance", lambda x, y: (seen.append(x.numel()), real(x, y))[1])
    got = fusion.arcee_fusion(a, b, dtype=torch.float32)
    assert sum(seen) == a.numel()
    assert shape != (9, 31) or len(seen) == {1: 4, 62: 4, 100: 3}[piece]
    assert torch.equal(got, fusion_of(whole, a.float(), b.float()))


def fusion_of(scores: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """From importances in float32."""
    ordered, n = scores.flatten().sort().values, scores.numel()
    q1, q2, q3 = (ordered[int(u * (n - 1))] for u in (0.25, 0.5, 0.75))
    return torch.where(scores >= q2 + 1.5 * (q3 - q1), b, a)


def test_arcee_fusion_keeps_the_dtype() -> None:
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randn(8, 8, generator=g).bfloat16() for _ in range(2))
    got = mf.merge(a, [b], "arcee_fusion")
    assert got.dtype == torch.bfloat16
    assert bool(((got == a) | (got == b)).all())
    assert torch.equal(mf.merge(a, [a], "arcee_fusion"), a)
    assert mf.merge(a[:0], [a[:0]], "arcee_fusion").shape == (0, 8)


def pcb_sorted(taus: Sequence[Tensor], ratio: float, scale: float) -> Tensor:
    """All elements in one vector."""
    x = torch.stack([t.flatten() for t in taus]).double()
    k, n = x.shape
    total = x.sum(0)

    def minmax(v: Tensor) -> Tensor:
        span = v.max() - v.min()
        return (v - v.min()) / span if span > 0 else torch.zeros_like(v)

    shares, values = [], []
    for tau in x:
        ordered = tau.abs().sort().values
        low, high = ordered[int(1e-4 * n)], ordered[max(int((1 - 1e-4) * n - 1), 0)]
        alpha = tau.abs().clamp(low, high)
        p = torch.exp(k * minmax(alpha) ** 2) * torch.tanh(tau * total)
        cut = p.sort().values[min(int((1 - ratio) * n), n - 1)]
        shares.append(minmax(p.clamp(min=cut)))
        values.append(torch.sign(tau) * alpha)
    share = torch.stack(shares)
    delta = (share * torch.stack(values)).sum(0) / share.sum(0).clamp(min=1e-12)
    return scale * delta.reshape(taus[0].shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("ratio", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_pcb_of_one_tensor(shape: tuple[int, ...], k: int, ratio: float, scope: str) -> None:
    """One tensor is a whole model too. 0.9 and 1.0 put the cut among negative scores."""
    g = torch.Generator().manual_seed(5)
    taus = [torch.randn(shape, generator=g) for _ in range(k)]
    got = mf.merge_task_vectors(taus, "pcb", ratio=ratio, scope=scope)
    close(got, pcb_sorted(taus, ratio, 1.2), scale=4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pcb_over_a_model(dtype: torch.dtype) -> None:
    """One competition over all tensors, integer ones apart, whatever the order of names."""
    g = torch.Generator().manual_seed(6)
    shapes = {"b": (40, 50), "a": (70,), "c": (3, 4, 5), "empty": (0,)}
    taus = [{n: torch.randn(s, generator=g, dtype=dtype) for n, s in shapes.items()} for _ in "123"]
    got = mf.merge_task_vectors(taus, "pcb", scale=0.7)
    flat = pcb_sorted([torch.cat([t[n].flatten() for n in shapes]) for t in taus], 0.1, 0.7)
    close(torch.cat([got[n].flatten() for n in shapes]), flat, scale=4.0)
    alone = mf.merge_task_vectors(taus, "pcb", scale=0.7, scope="tensor")
    assert not torch.equal(alone["a"], got["a"])
    close(alone["a"], pcb_sorted([t["a"] for t in taus], 0.1, 0.7), scale=4.0)


def test_pcb_corners() -> None:
    zero = torch.zeros(4, 4)
    base = torch.ones(4, 4)
    for scope in ("tensor", "model"):
        assert torch.equal(mf.merge(base, [base, base], "pcb", scope=scope), base)
        assert torch.equal(mf.merge_task_vectors([zero], "pcb", scope=scope), zero)
    with pytest.raises(mf.InputError, match="shape of expert 1 for 'w'"):
        mf.merge({"w": base}, [{"w": base}, {"w": torch.ones(2, 4)}], "pcb")


@pytest.mark.parametrize(
    ("method", "settings", "k"),
    [
        ("sce", {"select_topk": 0.5}, 3),
        ("ram", {}, 3),
        ("ramplus_tl", {}, 3),
        ("pcb", {}, 3),
        ("nearswap", {"t": 0.1}, 1),
        ("arcee_fusion", {}, 1),
        ("slerp", {"t": 0.3, "per_row": True}, 1),
        ("nuslerp", {}, 2),
        ("multislerp", {}, 3),
        ("karcher", {}, 3),
        ("model_stock", {"filter_wise": True}, 3),
        ("consensus_ta", {}, 3),
        ("consensus_ta", {"on": "ties", "density": 0.5}, 3),
        ("magmax", {}, 3),
        ("emr_unified", {}, 3),
    ],
)
def test_calibration_follows(method: str, settings: dict[str, object], k: int) -> None:
    """calibrate= is what calibrate_weights does afterwards, but for the rounding in between."""
    g = torch.Generator().manual_seed(8)
    base = torch.randn(12, 20, generator=g, dtype=torch.float64)
    experts = [base + torch.randn(12, 20, generator=g, dtype=torch.float64) for _ in range(k)]
    together = mf.merge(base, experts, method, calibrate="wsc", backend="torch", **settings)
    merged = mf.merge(base, experts, method, backend="torch", **settings)
    after, report = mf.calibrate_weights(base, experts, merged, backend="torch")
    assert bool((report.tensors[0].coefficient != 1).any())
    assert not torch.equal(together, merged)
    torch.testing.assert_close(together, after, rtol=1e-11, atol=1e-11)


def test_experts_of_weight_zero_do_not_calibrate() -> None:
    g = torch.Generator().manual_seed(8)
    base = torch.zeros(4, 16)
    a, b, c = (torch.randn(4, 16, generator=g) for _ in range(3))
    got = mf.merge(base, [a, b, 100 * c], "multislerp", weights=[1, 1, 0], calibrate="wsc")
    assert math.isclose(
        float(got.norm()),
        float(mf.merge(base, [a, b], "multislerp", calibrate="wsc").norm()),
        rel_tol=1e-5,
    )
