"""Means of directions against their definitions on the vectors themselves, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import magic_fast as mf
from magic_fast.reference.gram import Vectors

SHAPES = [(7, 33), (65,), (6, 3, 3, 3), (1, 1), ()]


def models(shape: tuple[int, ...], k: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g)
    return base, [base + 0.3 * torch.randn(shape, generator=g) for _ in range(k)]


def close(got: Tensor, want: Tensor) -> None:
    """float32 elements, rounded a few times: 1e-6 of the largest."""
    assert got.shape == want.shape
    limit = 1e-6 * max(1.0, float(want.abs().max()) if want.numel() else 1.0)
    assert bool(((got.double() - want).abs() <= limit).all())


def slerp_vectors(a: Tensor, b: Tensor, t: float) -> Tensor:
    cosine = float((a * b).sum() / (max(a.norm(), 1e-7) * max(b.norm(), 1e-7)))
    cosine = min(max(cosine, -1.0), 1.0)
    if 1 - cosine**2 < 1e-12:
        return (1 - t) * a + t * b
    omega = math.acos(cosine)
    return (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)


def by_vector(
    one: Callable[[list[Tensor]], Tensor], xs: Sequence[Tensor], axis: int | None
) -> Tensor:
    """``one`` on whole tensors, or on every vector along an axis."""
    if axis is None or xs[0].dim() == 0:
        return one([x.flatten() for x in xs]).reshape(xs[0].shape)
    moved = [x.movedim(axis, -1) for x in xs]
    rows = [m.reshape(-1, m.shape[-1]) for m in moved]
    out = torch.stack([one([r[i] for r in rows]) for i in range(rows[0].shape[0])])
    return out.reshape(moved[0].shape).movedim(-1, axis)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(
    ("settings", "axis"),
    [
        ({}, None),
        ({"nuslerp_flatten": False}, -1),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, 0),
        ({"nuslerp_row_wise": True}, None),  # only without flattening
    ],
)
def test_nuslerp(
    shape: tuple[int, ...], with_base: bool, settings: dict[str, Any], axis: int | None
) -> None:
    base, experts = models(shape, 2)
    start = base.double() if with_base else torch.zeros(shape, dtype=torch.float64)
    xs = [e.double() - start for e in experts]
    want = start + by_vector(lambda v: slerp_vectors(v[0], v[1], 0.5 / 1.2), xs, axis)
    got = mf.merge(base if with_base else None, experts, "nuslerp", weights=[0.7, 0.5], **settings)
    close(got, want)


def test_nuslerp_corners() -> None:
    a, zero = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2, 2)
    # weights that cancel: half each; parallel: plain
    close(mf.merge(None, [a, 3 * a], "nuslerp", weights=[1, -1]), 2 * a.double())
    # a zero vector is orthogonal to all: sin(π/4)
    close(mf.merge(None, [a, zero], "nuslerp"), math.sqrt(0.5) * a.double())
    close(mf.merge(None, [a, -a], "nuslerp"), zero.double())  # antiparallel: plain
    assert torch.equal(mf.merge(a, [a, a], "nuslerp"), a)
    with pytest.raises(mf.InputError, match=r"experts for method 'nuslerp': expected 2, got 3"):
        mf.merge(None, [a, a, a], "nuslerp")


def multislerp_vectors(xs: list[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    w = torch.tensor(weights, dtype=torch.float64)
    w = w / w.sum() if normalize else w
    u = torch.stack([x / (x.norm() + 1e-8) for x in xs])
    mean = (w[:, None] * u).sum(0)
    mean = mean / mean.norm()
    tangent = sum(wk * (uk - (uk @ mean) * mean) for wk, uk in zip(w, u, strict=True))
    angle = tangent.norm() + 1e-8
    length = sum(wk * x.norm() for wk, x in zip(w, xs, strict=True))
    return (mean * torch.cos(angle) + tangent * torch.sin(angle) / angle) * length


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_multislerp(shape: tuple[int, ...], with_base: bool, normalize: bool, k: int) -> None:
    base, experts = models(shape, k)
    weights = [0.3 + 0.1 * i for i in range(k)]
    start = base.double() if with_base else torch.zeros(shape, dtype=torch.float64)
    xs = [(e.double() - start).flatten() for e in experts]
    want = start + multislerp_vectors(xs, weights, normalize).reshape(shape)
    got = mf.merge(
        base if with_base else None, experts, "multislerp", weights=weights,
        normalize_weights=normalize,
    )  # fmt: skip
    close(got, want)


def test_multislerp_corners() -> None:
    a = torch.tensor([1.0, 2.0, -1.0])
    base = torch.tensor([4.0, 4.0, 4.0])
    assert torch.equal(mf.merge(None, [a], "multislerp"), a)  # one input is returned
    assert torch.equal(mf.merge(base, [a], "multislerp", weights=3.0), a)
    assert torch.equal(mf.merge(base, [base] * 3, "multislerp"), base)  # nothing moved
    close(mf.merge(None, [a, a, a], "multislerp"), a.double())
    # two that cancel: their weighted sum; more: an error that names the tensor
    close(mf.merge(None, [a, -2 * a], "multislerp"), -0.5 * a.double())
    c = torch.tensor([1.0, 0.0])
    third = [
        torch.tensor([math.cos(x), math.sin(x)]) for x in (0, 2 * math.pi / 3, 4 * math.pi / 3)
    ]
    with pytest.raises(mf.InputError, match="vectors for 'w': expected a mean direction, got 3"):
        mf.merge(None, third, "multislerp", name="w")
    with pytest.raises(mf.InputError, match="expected a sum other than 0"):
        mf.merge(None, [c, c], "multislerp", weights=[1, -1])


def karcher_vectors(xs: list[Tensor], max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    units = [x / x.norm() for x in xs if x.norm() > tol]
    length = sum(float(x.norm()) for x in xs) / len(xs)
    if not units:
        return torch.zeros_like(xs[0])
    u = sum(units) / len(units)
    u = units[0].clone() if u.norm() < tol else u / u.norm()
    for _ in range(max_iter):
        step = torch.zeros_like(u)
        for unit in units:
            cosine = float((u @ unit).clamp(-1, 1))
            theta = math.acos(cosine)
            if theta >= tol:
                step += theta / math.sin(theta) * (unit - cosine * u) / len(units)
        size = float(step.norm())
        if size < tol:
            break
        u = math.cos(size) * u + math.sin(size) / size * step
        u = u / u.norm()
    return u * length


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("max_iter", [1, 10])
def test_karcher(shape: tuple[int, ...], k: int, max_iter: int) -> None:
    _, experts = models(shape, k)
    experts = [e + i for i, e in enumerate(experts)]  # far from parallel
    want = karcher_vectors([e.double().flatten() for e in experts], max_iter).reshape(shape)
    close(mf.merge(None, experts, "karcher", max_iter=max_iter), want)


def test_karcher_takes_the_base_as_one_more_model() -> None:
    base, experts = models((7, 33), 2)
    got = mf.merge(base, experts, "karcher")
    assert torch.equal(got, mf.merge(None, [base, *experts], "karcher"))
    want = karcher_vectors([x.double().flatten() for x in (base, *experts)]).reshape(7, 33)
    close(got, want)


def test_karcher_corners() -> None:
    a, zero = torch.tensor([1.0, 2.0, -2.0]), torch.zeros(3)
    assert torch.equal(mf.merge(None, [a], "karcher"), a)
    assert torch.equal(mf.merge(None, [zero, zero], "karcher"), zero)
    for tol in (1e-5, 0.0):  # a tolerance of 0: no angle, and no step to divide by
        close(mf.merge(None, [a, a, a], "karcher", tol=tol), a.double())
    # a zero tensor has no direction, but counts in the mean length
    close(mf.merge(None, [a, zero], "karcher"), a.double() / 2)
    close(mf.merge(None, [a, -a], "karcher"), a.double())  # no mean: starts at the first, θ = π


def stock_vectors(taus: list[Tensor], absolute: bool) -> Tensor:
    k = len(taus)
    cosines = []
    for i in range(k):
        for j in range(i + 1, k):
            product = float(taus[i].norm() * taus[j].norm())
            product = max(product, 1e-6) if absolute else product or 1.0
            cosines.append(min(max(float(taus[i] @ taus[j]) / product, -1.0), 1.0))
    mean = sum(cosines) / len(cosines)
    divisor = 1 + (k - 1) * mean
    t = 0.0 if abs(divisor) < 1e-6 else k * mean / divisor
    return t * sum(taus) / k


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize(
    ("preset", "scale"), [("default", 1.0), ("default", 1e-5), ("mergekit", 1e-5)]
)
def test_model_stock(
    shape: tuple[int, ...], k: int, filter_wise: bool, preset: str, scale: float
) -> None:
    _, taus = models(shape, k)
    taus = [scale * t for t in taus]
    want = by_vector(
        lambda v: stock_vectors(v, preset == "mergekit"),
        [t.double() for t in taus],
        -1 if filter_wise else None,
    )
    got = mf.merge_task_vectors(taus, "model_stock", filter_wise=filter_wise, preset=preset)
    close(got / scale, want / scale)


def test_model_stock_corners() -> None:
    a, zero = torch.tensor([1.0, 2.0]), torch.zeros(2)
    base = torch.tensor([5.0, 5.0])
    assert torch.equal(mf.merge(base, [base, base], "model_stock"), base)
    close(mf.merge(base, [a, a, a], "model_stock"), a.double())  # cosine 1: t = 1
    close(mf.merge_task_vectors([a, zero], "model_stock"), zero.double())  # cosine 0: t = 0
    close(mf.merge_task_vectors([a, -a], "model_stock"), zero.double())  # 1 + (K−1)c̄ = 0
    with pytest.raises(mf.InputError, match="'model_stock': expected at least 2, got 1"):
        mf.merge(base, [a], "model_stock")


@pytest.mark.parametrize("shape", [(7, 33), (65,), (6, 3, 3, 3)])
def test_slerp_per_row(shape: tuple[int, ...]) -> None:
    a, (b,) = models(shape, 1)
    b = b + torch.randn(shape, generator=torch.Generator().manual_seed(9))

    def one(v: list[Tensor]) -> Tensor:
        cosine = float(v[0] @ v[1] / (v[0].norm() * v[1].norm()))
        if abs(cosine) > 0.9995:
            return 0.7 * v[0] + 0.3 * v[1]
        return slerp_vectors(v[0], v[1], 0.3)

    want = by_vector(one, [a.double(), b.double()], -1)
    close(mf.merge(a, [b], "slerp", t=0.3, per_row=True), want)


@pytest.mark.parametrize("axis", [None, -1, 0])
def test_vectors_in_blocks(axis: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any block size gives the same sums and the same combination."""
    base, experts = models((9, 14), 3)
    plain = Vectors.of(base.bfloat16(), experts, torch.float32, axis)
    gram, weights = plain.gram(), torch.rand(plain.experts[0].shape[0], 3)
    combined = plain.combine(weights)
    assert combined.shape == (9, 14)
    for elements in (1, 5, 40):
        monkeypatch.setattr("magic_fast.reference.gram._BLOCK_ELEMENTS", elements)
        torch.testing.assert_close(plain.gram(), gram, rtol=1e-13, atol=1e-13)
        assert torch.equal(plain.combine(weights), combined)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher", "model_stock"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    """float64 in double precision; halves rounded once from float32."""
    base, experts = models((7, 33), 2)
    base, experts = base.to(dtype), [e.to(dtype) for e in experts]
    got = mf.merge(base, experts, method)
    wide = mf.merge(base.double(), [e.double() for e in experts], method)
    assert got.dtype == dtype
    if dtype == torch.float64:
        assert torch.equal(got, wide)
    else:
        ulp = 2**-8 if dtype == torch.bfloat16 else 2**-11
        assert bool(((got.double() - wide).abs() <= ulp * wide.abs() + 1e-6).all())


@pytest.mark.parametrize(
    "method", ["nuslerp", "multislerp", "karcher", "model_stock", "sce", "ram"]
)
def test_empty_tensors(method: str) -> None:
    base = torch.zeros(0, 4)
    assert mf.merge(base, [base, base], method).shape == (0, 4)
